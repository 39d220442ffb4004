"""Dispatch against a loop over choices: stable, complete, filled up; and the model's own plan."""

import pytest
import torch

from minids.kernels import plan_slots
from minids.kernels.dispatch import slots_for


def choices(tokens, experts, k, seed, device, twice=False):
    generator = torch.Generator().manual_seed(seed)
    skewed = torch.rand(tokens, experts, generator=generator) * torch.arange(1, experts + 1)
    found = skewed.topk(k).indices
    if twice:
        found[:, -1] = found[:, 0]
    return found.contiguous().to(device)


def by_hand(indices, experts, multiple):
    """Lists: every expert's choices in order, then its filling."""
    n, k = indices.shape
    slots, ends = [], []
    for e in range(experts):
        slots += [c for c in range(n * k) if indices[c // k, c % k] == e]
        slots += [n * k] * (-len(slots) % multiple)
        ends.append(len(slots))
    return slots, ends


@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 6, 3), (200, 8, 2), (70, 200, 8), (300, 64, 8)], ids=str)
@pytest.mark.parametrize("multiple", [1, 3, 128])
def test_every_choice_has_its_slot(where, sizes, multiple):
    backend, device = where
    n, experts, k = sizes
    indices = choices(n, experts, k, n, device)
    choice, token, slot, ends = plan_slots(indices, experts, multiple=multiple, backend=backend)
    wanted, wanted_ends = by_hand(indices.cpu(), experts, multiple)
    assert len(choice) == len(token) == slots_for(n * k, experts, multiple) >= len(wanted)
    assert ends.dtype == torch.int32 and ends.tolist() == wanted_ends
    assert choice.tolist() == wanted + [n * k] * (len(choice) - len(wanted))
    assert token.tolist() == [min(c // k, n - 1) for c in choice.tolist()]
    assert choice[slot.flatten()].tolist() == list(range(n * k))


def test_an_expert_chosen_twice_by_a_token(where):
    backend, device = where
    indices = choices(90, 16, 4, 0, device, twice=True)
    choice, _, slot, ends = plan_slots(indices, 16, backend=backend)
    wanted, wanted_ends = by_hand(indices.cpu(), 16, 1)
    assert choice.tolist() == wanted and ends.tolist() == wanted_ends
    assert slot.flatten().sort().values.tolist() == list(range(360))


def test_bad_input():
    indices = torch.zeros(3, 2, dtype=torch.int64)
    for call, exception, message in [
        (lambda: plan_slots(indices.int(), 4), TypeError, "indices: got dtype torch.int32, expected torch.int64"),
        (lambda: plan_slots(indices[:0], 4), ValueError, r"indices: got shape \(0, 2\)"),
        (lambda: plan_slots(indices.t(), 4), ValueError, r"indices: got shape \(2, 3\), expected a contiguous"),
        (lambda: plan_slots(indices, 0), ValueError, "experts: got 0"),
        (lambda: plan_slots(indices, 4, multiple=0), ValueError, "multiple: got 0"),
    ]:
        with pytest.raises(exception, match=message):
            call()


def test_registered(kernel):
    args = (choices(9, 6, 2, 0, kernel), 6, 4)
    torch.library.opcheck(torch.ops.minids.plan_slots.default, args, test_utils=("test_schema", "test_faketensor"))
