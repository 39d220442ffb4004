"""The routed experts as one operation: what it keeps of all slots, and when."""

import torch
from numbers_ import same_bits
from test_model import experts_case

from minids.kernels import experts as kernel_experts
from minids.kernels import plan_slots, routed_experts


def test_z_is_kept_for_gradients_alone(kernel, monkeypatch):
    """Without gradients the sum is the same and no z is handed on; with them z is there, for whatever needs a gradient."""
    made, indices = experts_case(kernel)
    choice, token, slot, ends = plan_slots(indices, 6, backend="triton")
    kept, forward = [], kernel_experts._forward.function

    def seen(*inputs):
        found = forward(*inputs)
        kept.append(tuple(found[1].shape))
        return found

    monkeypatch.setattr(kernel_experts, "_forward", seen)
    with torch.no_grad():
        alone = routed_experts(*made, token, slot, ends, choice)
    frozen = [t.detach() for t in made]
    outputs = [routed_experts(*frozen, token, slot, ends, choice)]
    for i in range(4):
        inputs = [t.detach().requires_grad_(i == j) for j, t in enumerate(made)]
        outputs.append(routed_experts(*inputs, token, slot, ends, choice))
    width = made[2].shape[1]
    assert kept == [(0, width)] * 2 + [(len(token), width)] * 4
    assert all(same_bits(out.detach(), alone) for out in outputs)


def test_registered_without_z(kernel):
    x, weights, gate_up, down = (t.detach() for t in experts_case(kernel)[0])
    choice, token, slot, ends = plan_slots(experts_case(kernel)[1], 6, backend="triton")
    args = (x, weights, gate_up, down, gate_up.clone(), down.clone(), token, slot, ends, choice, False)
    torch.library.opcheck(torch.ops.minids.routed_experts.default, args, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(torch.ops.minids.spread.default, (x, slot), test_utils=("test_schema", "test_faketensor"))
