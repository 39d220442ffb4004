"""Indices that lie outside their table, and devices that are not there, told before any work.

An index that is too large fails deep inside some product, and one below 0 may be taken for another without failing at
all. Only values that lie on the host are looked at: to look at those on a GPU would be to wait for it.
"""

import torch
from torch import Tensor


def check_indices(name: str, indices: Tensor, count: int, ignored: int | None = None) -> None:
    """Raises ValueError if an integer of ``indices`` is none of 0 to count - 1, ``ignored`` aside."""
    if type(indices) is not Tensor or not indices.is_cpu or indices.is_floating_point() or indices.numel() == 0:
        return
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():  # only shapes are being worked out
        return
    counted, also = indices, ""
    if ignored is not None:
        counted, also = indices[indices != ignored], f", and {ignored}"
    low, high = (int(bound) for bound in counted.aminmax()) if counted.numel() else (0, 0)
    if low < 0 or high >= count:
        raise ValueError(f"{name} from {low} to {high}: allowed are 0 to {count - 1}{also}")


def check_device(name: str | torch.device) -> torch.device:
    """The device of that name. Raises ValueError if there is none, or if it cannot be used here."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0] if "Expected one of" not in str(error) else "no such device"
        raise ValueError(f"device={str(name)!r} cannot be used ({why}); allowed are cpu, cuda, cuda:N") from None
    return device
