"""The grouped products' second kernel, which Triton's interpreter cannot run: against the references and plain Triton."""

import pytest
import torch
import torch.nn.functional as F
from numbers_ import error, same_bits, tame

from minids.kernels import experts as kernel_experts
from minids.kernels import grouped, grouped_gemm, grouped_wgrad, plan_slots, routed_experts

BF16 = torch.bfloat16
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]
# Where the experts' rows end, N and K: empty experts, single rows, tiles that end in their first or second half, more rows
# of tiles than a group has, numbers that are multiples of 8 alone.
CASES = [
    ([0, 70, 70, 200], 136, 72), ([0, 0, 200], 264, 64), ([64, 128, 200, 200], 8, 8), ([1, 2, 3, 200, 200], 256, 320),
    ([129, 130, 700, 1000, 1000, 1024], 512, 448), ([2500, 2501, 5001], 1032, 1000),
]  # fmt: skip


def int32(ends):
    return torch.tensor(ends, dtype=torch.int32, device="cuda")


def poison():
    """Memory that the results will probably get holds no numbers."""
    torch.full((1 << 25,), float("nan"), device="cuda")


def forward_case(ends, n, k, n_major):
    """x with room behind its rows, and W; summed channels in whole blocks for an N-major W, else plain Triton runs."""
    k = -(-k // 64) * 64 if n_major else k
    x, w = tame(ends[-1], k + 8, "cuda", dtype=BF16)[:, :k], tame(len(ends) * n, k, "cuda", 1, BF16).view(-1, n, k)
    return x, w.transpose(1, 2).contiguous().transpose(1, 2) if n_major else w


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("n_major", [False, True], ids=["k_major", "n_major"])
def test_forward(case, n_major):
    """Rows of infinities, of which there is one an expert, make no other row infinite."""
    (x, w), ends = forward_case(*case, n_major), int32(case[0])
    assert grouped.prefers_gluon(w.shape[1], BF16, x.device)
    rows = [end - 1 for end, before in zip(case[0], [0, *case[0]], strict=False) if end > before]
    expected = grouped.reference(x, w, ends)
    x[rows] = torch.inf
    poison()
    out = grouped_gemm(x, w, ends)
    others = torch.ones(len(x), dtype=torch.bool, device="cuda")
    others[rows] = False
    assert not out[rows].isfinite().all(1).any()
    assert not others.any() or error(out[others], expected[others]) < 3e-3


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("out_dtype", [BF16, torch.float32], ids=str)
def test_weight_gradient(case, out_dtype):
    ends, n, k = case
    dy, x = tame(ends[-1], n, "cuda", dtype=BF16), tame(ends[-1], k, "cuda", 1, BF16)
    expected = grouped.wgrad_reference(dy, x, int32(ends), out_dtype)
    poison()
    out = grouped_wgrad(dy, x, int32(ends), out_dtype=out_dtype)
    assert error(out, expected) < 3e-3
    empty = [e for e, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if a == b]
    assert not out[empty].any()
    for e in range(len(ends) - 1):  # what lies behind an expert's rows does not reach its gradient
        if ends[e] < ends[-1]:
            spoilt = [torch.where(torch.arange(len(t), device="cuda")[:, None] < ends[e], t, torch.inf) for t in (dy, x)]
            assert same_bits(grouped_wgrad(*spoilt, int32(ends), out_dtype=out_dtype)[: e + 1], out[: e + 1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_triton(case):
    """The readable kernels, which Hopper no longer runs by itself."""
    ends, n, k = case
    dy = tame(ends[-1], n, "cuda", dtype=BF16)
    for config, n_major in ((grouped.FORWARD, False), (grouped.DGRAD, True)):
        x, w = forward_case(*case, n_major)
        assert error(grouped.launch(x, w, int32(ends), config), grouped.reference(x, w, int32(ends))) < 3e-3
    x = forward_case(*case, False)[0]
    for out_dtype in (BF16, torch.float32):
        found = grouped.launch_wgrad(dy, x, int32(ends), out_dtype, grouped.WGRAD)
        assert error(found, grouped.wgrad_reference(dy, x, int32(ends), out_dtype)) < 3e-3


def experts_case(n, width, experts=6, chosen=2, hidden=328):
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, hidden), (n, chosen), (experts, 2 * width, hidden), (experts, hidden, width))
    x, weights, up, down = (torch.randn(*shape, generator=generator) for shape in shapes)
    scores = torch.rand(n, experts, generator=generator) * torch.tensor([1.0] * (experts - 1) + [0])  # the last: nobody's
    made = [x.to(BF16), weights.sigmoid(), (up / hidden**0.5).to(BF16), (down / width**0.5).to(BF16)]
    return [t.cuda().requires_grad_() for t in made], scores.topk(chosen).indices.cuda()


def run_experts(made, indices, d_out):
    choice, token, slot, ends = plan_slots(indices, len(made[2]))
    out = routed_experts(*made, token, slot, ends, choice)
    return out, torch.autograd.grad(out, made, d_out)


@pytest.mark.parametrize("n", [1, 23, 700])
@pytest.mark.parametrize("width", [128, 384])
def test_experts(n, width, monkeypatch):
    """SwiGLU with the first product, apart, and in FP64. Without gradients z is not written, and the sum is the same."""
    made, indices = experts_case(n, width)
    d_out = torch.randn(made[0].shape, generator=torch.Generator().manual_seed(3)).to(BF16).cuda()
    assert kernel_experts.fuses(made[2])
    out, gradients = run_experts(made, indices, d_out)
    choice, token, slot, ends = plan_slots(indices, len(made[2]))
    with torch.no_grad():
        assert same_bits(routed_experts(*made, token, slot, ends, choice), out)
        kept = kernel_experts._forward(*made, *made[2:], token, slot, ends, choice, False)
        assert same_bits(kept[0], out) and kept[1].shape == (0, 2 * width)
    monkeypatch.setattr(kernel_experts, "fuses", lambda *_: False)
    apart, apart_gradients = run_experts(made, indices, d_out)
    exact = [t.detach().double().requires_grad_() for t in made]
    gate, up = torch.einsum("nkfd,nd->nkf", exact[2][indices], exact[0]).chunk(2, -1)
    expected = torch.einsum("nkdf,nkf->nd", exact[3][indices], F.silu(gate) * up * exact[1][..., None])
    exact_gradients = torch.autograd.grad(expected, exact, d_out.double())
    assert error(out, expected) < 8e-3 and error(out, apart) < 4e-3
    for fused, one_by_one, right in zip(gradients, apart_gradients, exact_gradients, strict=True):
        assert error(fused, right) < 1e-2 and error(fused, one_by_one) < 6e-3


def test_graph():
    """Recorded once, replayed with another routing: no tile list is read by the host."""
    made, indices = experts_case(64, 128)
    made = [t.detach() for t in made]
    routings = [indices, (indices + 1) % 5]

    def run():
        choice, token, slot, ends = plan_slots(indices, 6)
        return routed_experts(*made, token, slot, ends, choice)

    expected = []
    for routing in routings:
        indices = routing.clone()
        expected.append(run())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for routing, right in zip(routings, expected, strict=True):
        indices.copy_(routing)
        graph.replay()
        assert same_bits(out, right)


def test_large():
    """As many rows as the benchmark's, ragged: against one product an expert."""
    torch.manual_seed(0)
    ends = torch.randint(0, 2048, (32,)).cumsum(0).int().cuda()
    m = int(ends[-1])
    x, dy, w = (torch.randn(*shape, device="cuda", dtype=BF16) for shape in ((m, 1024), (m, 640), (32, 640, 1024)))
    assert error(grouped_gemm(x, w, ends), grouped.reference(x, w, ends)) < 3e-3
    assert error(grouped_gemm(dy, w.transpose(1, 2), ends), grouped.reference(dy, w.transpose(1, 2), ends)) < 3e-3
    assert error(grouped_wgrad(dy, x, ends), grouped.wgrad_reference(dy, x, ends)) < 3e-3
