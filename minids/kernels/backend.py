"""Which implementation of an operation runs, and what every kernel needs: optional Triton, checks, one device's facts.

Every operation has a reference in PyTorch, which is its specification, and a Triton kernel. The choice, first found:

    1. the argument `backend="torch"` or `"triton"`
    2. the environment variable MINIDS_KERNELS=torch|triton
    3. the kernel for tensors on a CUDA device of capability 9.0 (Hopper) or above with Triton installed, else the
       reference

The third step is the only one that falls back. Where a kernel was asked for by name and cannot run, that is an error.
On the CPU a kernel runs under Triton's interpreter (TRITON_INTERPRET=1 before Python starts), for tests and teaching.

`registered` makes a kernel's launcher an operation that torch knows by name.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton is optional: references work without it

    class _NoLanguage:
        constexpr = int  # what the kernels' signatures mention

    triton, tl, TensorDescriptor = None, _NoLanguage, None

SELECTIVE = (_CachedTorchDispatchMode, _CachingTorchDispatchMode)
BACKENDS = ("torch", "triton")
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)  # kernels run in Triton's CPU interpreter
TILE = 128  # channels that share a scale, and the depth at which sums are promoted to FP32
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
OUT_DTYPES = (torch.bfloat16, torch.float32)


def jit(function=None, *, varying: Sequence[str] = ()):
    """`triton.jit`, or the function as it is where there is no Triton: nobody calls it there.

    varying: arguments that change from call to call (numbers of rows). Triton compiles a kernel anew for a number that is
    1 or a multiple of 16; for these it does not.
    """
    if function is None:
        return lambda f: jit(f, varying=varying)
    return triton.jit(function, do_not_specialize=list(varying)) if triton is not None else function


def choose(backend: str | None, *tensors: Tensor) -> str:
    """"torch" or "triton" for these inputs, as the module's head says.

    Raises:
        ValueError: an unknown name, tensors on several devices, or a kernel asked for that cannot run here.
    """
    source = "backend" if backend is not None else "MINIDS_KERNELS"
    name = backend if backend is not None else os.environ.get("MINIDS_KERNELS") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(f"got tensors on {' and '.join(sorted(map(str, devices)))}, expected one device")
    obstacle = _obstacle(tensors[0].device)
    if name == "triton" and obstacle:
        raise ValueError(f"{source}=triton: {obstacle}")
    if name is None:
        return "torch" if obstacle or tensors[0].device.type != "cuda" else "triton"
    return name


def traced() -> bool:
    """Whether somebody must see operations by their registered names. A selective checkpoint need not: what it does not
    know it runs again."""
    if torch.compiler.is_compiling():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    return not all(isinstance(mode, SELECTIVE) for mode in _get_current_dispatch_mode_stack())


class Operation:
    """A function of tensors, registered with torch.library as `minids::name` for all that traces: torch.compile, fake
    tensors. Where nothing does, it is called as it is: torch's way through the dispatcher and back costs 10 to 40
    microseconds a call, as much as a small kernel runs."""

    def __init__(self, name: str, function: Callable, mutates: Sequence[str] = ()):
        self.function, self.name, self.node = function, name, None
        self.op = torch.library.custom_op(f"minids::{name}", function, mutates_args=mutates)
        self.register_fake = self.op.register_fake

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As torch.library's; autograd outside of traces is given the same two functions."""
        self.op.register_autograd(backward, setup_context=setup_context)
        function = self.function

        class Node(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                output = function(*inputs)
                setup_context(ctx, inputs, output)
                return output

        Node.backward = staticmethod(backward)
        self.node = Node

    def __call__(self, *inputs):
        if traced():
            return getattr(torch.ops.minids, self.name).default(*inputs)
        if self.node is not None and torch.is_grad_enabled():
            return self.node.apply(*inputs)
        return self.function(*inputs)


def asked(ctx, count: int) -> list[bool]:
    """Which of the first ``count`` inputs' gradients the running backward is for. If `torch.autograd.grad` was given some
    inputs only, as a pipeline does that wants dx before dW, that is less than ctx.needs_input_grad says."""

    def runs(node) -> bool:
        try:
            return torch._C._will_engine_execute_node(node)
        except RuntimeError:  # a leaf whose gradient is asked for by name
            return True

    edges = zip(ctx.needs_input_grad[:count], ctx.next_functions[:count], strict=True)
    return [needed and node is not None and runs(node) for needed, (node, _) in edges]


def registered(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable], Operation]:
    """Decorator: the launcher of a kernel as an `Operation`. Its annotations become the schema; ``mutates`` names the
    arguments that it writes to."""
    return lambda function: Operation(name, function, mutates)


def _obstacle(device: torch.device) -> str | None:
    """Why no kernel can run on this device; None if it can."""
    if triton is None:
        return "Triton is not installed"
    if device.type == "cuda":
        found = capability(device)
        return None if found >= (9, 0) else f"{device} has capability {found}, the kernels need (9, 0) or above"
    if INTERPRETED and device.type == "cpu":
        return None
    return f"got tensors on {device}, expected a CUDA device (or the CPU with TRITON_INTERPRET=1 set before the start)"


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The device's compute capability; (0, 0) for the CPU. Remembered: asking takes longer than a launch."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; 4 pretended ones under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def check(name: str, x: Tensor, *, ndim: int | Sequence[int], dtype: torch.dtype | Sequence[torch.dtype]) -> None:
    """Raises TypeError or ValueError, with the name and what came, unless x has this dtype and number of dimensions."""
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    ndims = (ndim,) if isinstance(ndim, int) else tuple(ndim)
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected {' or '.join(map(str, dtypes))}")
    if x.ndim not in ndims:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {' or '.join(map(str, ndims))} dimensions")


def check_shape(name: str, x: Tensor, *allowed: tuple[int, ...]) -> None:
    """Raises ValueError unless x has one of the allowed shapes."""
    if tuple(x.shape) not in allowed:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {' or '.join(map(str, allowed))}")


def check_rows(name: str, x: Tensor) -> None:
    """Raises ValueError unless Hopper's copy engine can read x: unit stride inside rows, which start at multiples of 16
    bytes, as does x itself."""
    unit = 16 // x.element_size()
    if x.stride(-1) != 1 or any(s % unit for s in x.stride()[:-1]) or x.data_ptr() % 16:
        raise ValueError(
            f"{name}: got strides {x.stride()} and an address that is {x.data_ptr() % 16} modulo 16, expected "
            f"contiguous rows whose strides are multiples of {unit} elements and an address that is a multiple of 16"
        )


def check_ends(ends: Tensor, experts: int) -> None:
    """Raises unless ends is (E,) int32. Its values are not read: that would stop the device."""
    check("ends", ends, ndim=1, dtype=torch.int32)
    check_shape("ends", ends, (experts,))
