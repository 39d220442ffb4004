"""Rotation and joining of queries and keys: against the model's own rope and torch.cat, forward and backward."""

import pytest
import torch
from numbers_ import error

from minids.config import ModelConfig
from minids.kernels import rope
from minids.model.attention import MLA
from minids.model.rope import apply_rope, rope_table


def inputs(b, t, h, n, r, v, device, dtype=torch.float32, positions=None):
    generator = torch.Generator().manual_seed(0)
    sizes = ((b, t, h, n + r), (b, t, h, n + v), (b, t, n + r))
    q, kv, joint = (torch.randn(size, generator=generator).to(device, dtype).requires_grad_() for size in sizes)
    cfg = ModelConfig.preset("toy").replace(qk_rope_head_dim=r)
    positions = torch.arange(t).unsqueeze(0) if positions is None else positions
    return q, kv, joint, rope_table(cfg, positions).to(device)


def joined(q, kv, k_rope, table):
    """As the model writes it."""
    nope = q.shape[-1] - k_rope.shape[-1]
    key = apply_rope(k_rope.unsqueeze(-2), table).expand(*q.shape[:3], -1)
    q = torch.cat([q[..., :nope], apply_rope(q[..., nope:], table)], dim=-1)
    return q, torch.cat([kv[..., :nope], key], dim=-1), kv[..., nope:]


@pytest.mark.parametrize(
    "size", [(2, 3, 4, 8, 4, 8), (1, 5, 3, 12, 8, 20), (2, 2, 17, 16, 2, 4), (1, 1, 1, 2, 4, 1)], ids=str
)
def test_values_and_gradients(where, size):
    backend, device = where
    q, kv, joint, table = inputs(*size, device)
    k_rope = joint[..., -size[4] :]  # a view of every row's end, as in the model
    made, expected = rope.rope_heads(q, kv, k_rope, table, backend=backend), joined(q, kv, k_rope, table)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device) for x in expected]
    for a, b in zip(made, expected, strict=True):
        assert a.is_contiguous() and error(a, b.double()) < 2e-7
    found, wanted = (
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(outs, weights, strict=True)), (q, kv, joint))
        for outs in (made, expected)
    )
    for a, b in zip(found, wanted, strict=True):
        assert error(a, b.double()) < 3e-7


def test_rows_with_positions_of_their_own_in_bf16(where):
    backend, device = where
    positions = torch.tensor([[5, 6, 7], [0, 1, 2]])
    q, kv, joint, table = inputs(2, 3, 4, 16, 8, 16, device, torch.bfloat16, positions)
    with torch.no_grad():
        made = rope.rope_heads(q, kv, joint[..., -8:], table, backend=backend)
    for a, b in zip(made, joined(q, kv, joint[..., -8:], table), strict=True):
        assert torch.equal(a, b)  # FP32 inside, rounded once


@torch.no_grad()
def test_a_part_of_a_longer_table(kernel, monkeypatch):
    """Rows with positions of their own and a text one token shorter, as MTP reads them: the table is not contiguous."""
    torch.manual_seed(0)
    cfg = ModelConfig.preset("toy")
    mla = MLA(cfg).to(kernel)
    table = rope_table(cfg, torch.stack([torch.arange(9), torch.arange(9) % 5])).to(kernel)[:, :8]
    x = torch.randn(2, 8, cfg.hidden_size, device=kernel)
    outs = []
    for name in ("torch", "triton"):
        monkeypatch.setenv("MINIDS_KERNELS", name)
        outs.append(mla(x, table, None))
    assert not table.is_contiguous() and error(outs[1], outs[0].double()) < 1e-5


def test_bad_input():
    q, kv, joint, table = inputs(1, 3, 2, 8, 4, 8, "cpu")
    k_rope = joint[..., -4:]
    for args, exception, message in [
        ((q.double(), kv, k_rope, table), TypeError, "q: got dtype torch.float64"),
        ((q, kv.half(), k_rope, table), TypeError, "kv: got dtype torch.float16, expected torch.float32"),
        ((q, kv, k_rope[:, :2], table), ValueError, r"k_rope: got shape \(1, 2, 4\), expected \(1, 3, 4\)"),
        ((q, kv, k_rope, table[..., :1]), ValueError, r"table: got shape \(1, 3, 1\), expected \(1, 3, 2\)"),
        ((q, kv[:, :, :1], k_rope, table), ValueError, "q, kv, k_rope: got"),
        ((q.mT.contiguous().mT, kv, k_rope, table), ValueError, "q: got strides"),
    ]:
        with pytest.raises(exception, match=message):
            rope.rope_heads(*args)


def test_registered(kernel):
    q, kv, joint, table = inputs(1, 3, 2, 8, 4, 8, kernel)
    args = (q, kv, joint[..., -4:].detach().requires_grad_(), table)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.minids.rope_heads.default, args, test_utils=tests)
