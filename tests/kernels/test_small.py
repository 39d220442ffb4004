"""RMSNorm, router and cross entropy: values and gradients against FP64, and against the model's own."""

import pytest
import torch
from numbers_ import error, tame

from minids import ModelConfig
from minids.kernels import cross_entropy_, linear_cross_entropy, rms_norm, rms_norm_residual, router, routing
from minids.model.router import Gate

BF16 = torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (9, 1024), (150, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_rms_norm(where, shape, dtype):
    backend, device = where
    x, dy = tame(*shape, device, dtype=dtype), tame(*shape, device, 1, dtype)
    weight = tame(1, shape[1], device, 2)[0]
    made, exact = [[t.clone().requires_grad_() for t in (x.to(kind), weight.to(wide))] for kind, wide in
                   ((dtype, torch.float32), (torch.float64, torch.float64))]  # fmt: skip
    y = rms_norm(*made, 1e-6, backend=backend)
    expected = exact[0] * (exact[0].square().mean(-1, keepdim=True) + 1e-6).rsqrt() * exact[1]
    y.backward(dy)
    expected.backward(dy.double())
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    assert y.dtype == dtype and error(y, expected) < tolerance
    assert error(made[1].grad, exact[1].grad) < 1e-5
    if shape[1] > 1:  # of one column it is x / |x|: the gradient is the rounding of 0
        assert error(made[0].grad, exact[0].grad) < tolerance


KINDS = [(torch.float32, BF16), (torch.float32, torch.float32), (BF16, BF16), (BF16, None)]


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_residual(where, kinds):
    """The sum, its norm, and the gradients of all three, which come from both."""
    backend, device = where
    kind, of_delta = kinds
    x = tame(9, 300, device, dtype=kind)
    delta = None if of_delta is None else tame(9, 300, device, 1, of_delta)
    weight, d_total, dy = tame(1, 300, device, 2)[0], tame(9, 300, device, 3, kind), tame(9, 300, device, 4, BF16)
    made = [None if t is None else t.clone().requires_grad_() for t in (x, delta, weight)]
    exact = [None if t is None else t.double().requires_grad_() for t in (x, delta, weight)]
    total, y = rms_norm_residual(*made, 1e-6, out_dtype=BF16, backend=backend)
    wanted = exact[0] if delta is None else exact[0] + exact[1]
    wanted_y = wanted * (wanted.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * exact[2]
    torch.autograd.backward([total, y], [d_total, dy])
    torch.autograd.backward([wanted, wanted_y], [d_total.double(), dy.double()])
    assert total.dtype == kind and y.dtype == BF16
    assert error(total, wanted) < (1e-6 if kind == torch.float32 else 3e-3) and error(y, wanted_y) < 4e-3
    assert torch.equal(y, rms_norm(total, made[2], 1e-6, out_dtype=BF16, backend=backend))  # made again: the same bits
    for ours, theirs in zip(made, exact, strict=True):
        if ours is not None:
            assert ours.grad.dtype == ours.dtype
            assert error(ours.grad, theirs.grad) < (1e-5 if ours.dtype == kind == torch.float32 else 4e-3)


@pytest.mark.parametrize("of", ["sum", "norm"])
def test_residual_of_which_one_result_is_used(kernel, of):
    """As the last layer's, or a layer whose output nobody reads."""
    x, delta, weight = tame(5, 64, kernel), tame(5, 64, kernel, 1, BF16), tame(1, 64, kernel, 2)[0]
    found = []
    for backend in ("triton", "torch"):
        leaves = [t.clone().requires_grad_() for t in (x, delta, weight)]
        pair = rms_norm_residual(*leaves, 1e-6, backend=backend)
        found.append(torch.autograd.grad(pair[of == "norm"].square().sum(), leaves, allow_unused=True))
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype and error(ours, theirs) < (1e-5 if ours.dtype == torch.float32 else 4e-3)


def logits_of(n, e, device):
    """Scores that differ by much more than a last bit, so that every implementation chooses the same."""
    generator = torch.Generator().manual_seed(0)
    places = torch.stack([torch.randperm(e, generator=generator) for _ in range(n)])
    return (places / e * 8 - 4 + torch.rand(n, e, generator=generator) / e).to(device)


@pytest.mark.parametrize("program", [(1, 1), (16, 4)], ids=str)
@pytest.mark.parametrize("sizes", [(16, 4, 2, 3), (8, 1, 1, 8), (64, 8, 4, 8), (256, 8, 4, 8), (256, 1, 1, 8)], ids=str)
def test_router_is_the_models(where, sizes, program, monkeypatch):
    monkeypatch.setattr(routing, "_tokens", lambda n, e: program)
    backend, device = where
    e, n_group, topk_group, k = sizes
    cfg = ModelConfig.preset("toy", n_routed_experts=e, n_group=n_group, topk_group=topk_group, num_experts_per_tok=k)
    gate = Gate(cfg).to(device)
    with torch.no_grad():
        gate.e_score_correction_bias.copy_(torch.rand(e, generator=torch.Generator().manual_seed(1)) * 1e-3)
    made, expected = (logits_of(13, e, device).requires_grad_() for _ in range(2))
    weights, indices, scores = router(
        made, gate.e_score_correction_bias, n_group=n_group, topk_group=topk_group, k=k, scale=cfg.routed_scaling_factor,
        backend=backend,
    )  # fmt: skip
    wanted_scores = expected.sigmoid()
    wanted_indices = gate.choose(wanted_scores)
    wanted = gate.gate_values(wanted_scores, wanted_indices)
    order, wanted_order = indices.argsort(-1), wanted_indices.argsort(-1)
    assert torch.equal(indices.gather(-1, order), wanted_indices.gather(-1, wanted_order))
    torch.testing.assert_close(weights.gather(-1, order), wanted.gather(-1, wanted_order), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores, wanted_scores, rtol=1e-5, atol=1e-6)
    choices = scores.detach() + gate.e_score_correction_bias
    assert (choices.gather(-1, indices).diff(dim=-1) <= 0).all()  # the best choice first
    factor = torch.rand(e, device=device)
    (weights.square() * factor[indices]).sum().add((scores * factor).sum()).backward()
    (wanted.square() * factor[wanted_indices]).sum().add((wanted_scores * factor).sum()).backward()
    torch.testing.assert_close(made.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("used", ["weights", "scores"])
def test_router_with_one_of_its_gradients(where, used):
    """The load counts every choice; a result that nobody used sends no gradient."""
    backend, device = where
    made, expected = (logits_of(13, 16, device).requires_grad_() for _ in range(2))
    sizes = {"n_group": 4, "topk_group": 2, "k": 3, "scale": 2.5}
    weights, indices, scores, load = router(made, torch.zeros(16, device=device), **sizes, with_load=True, backend=backend)
    assert torch.equal(load, torch.bincount(indices.flatten(), minlength=16))
    plain = expected.sigmoid()
    chosen = plain.gather(-1, indices)
    if used == "weights":
        weights.square().sum().backward()
        (2.5 * chosen / chosen.sum(-1, keepdim=True)).square().sum().backward()
    else:
        scores.square().sum().backward()
        plain.square().sum().backward()
    torch.testing.assert_close(made.grad, expected.grad, rtol=1e-4, atol=1e-5)


def first_of_equals(choice, n_group, topk_group, k):
    """The indices (N, K), by stable sorts."""
    groups = choice.unflatten(-1, (n_group, -1))
    best = groups.topk(2, -1).values.sum(-1).sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
    kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, True)
    order = groups.masked_fill(~kept[..., None], -torch.inf).flatten(-2).sort(dim=-1, descending=True, stable=True)
    return order.indices[:, :k]


@pytest.mark.parametrize("sizes", [(64, 8, 4, 8), (32, 16, 5, 7), (128, 1, 1, 8), (16, 4, 4, 3)], ids=str)
@pytest.mark.parametrize("values", [1, 2, 4])
def test_router_of_equal_choices_takes_the_first(kernel, sizes, values):
    """Among experts and among groups: choices of one, two and four different values."""
    e, n_group, topk_group, k = sizes
    generator = torch.Generator().manual_seed(0)
    bias = torch.zeros(e, device=kernel)
    logits = torch.randint(0, values, (19, e), generator=generator).to(kernel, torch.float32)
    weights, indices, scores, load = router(
        logits, bias, n_group=n_group, topk_group=topk_group, k=k, scale=2.5, with_load=True, backend="triton"
    )
    assert torch.equal(indices, first_of_equals(scores, n_group, topk_group, k))
    assert torch.equal(load, torch.bincount(indices.flatten(), minlength=e))
    chosen = scores.gather(-1, indices)
    torch.testing.assert_close(weights, 2.5 * chosen / chosen.sum(-1, keepdim=True))


@pytest.mark.parametrize("vocabulary", [1, 7, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_cross_entropy(where, vocabulary, dtype):
    backend, device = where
    logits = tame(6, vocabulary, device, dtype=dtype)
    labels = torch.randint(0, vocabulary, (6,), generator=torch.Generator().manual_seed(0)).to(device)
    labels[2] = -100
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    expected.sum().backward()
    losses = cross_entropy_(logits, labels, backend=backend)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=1e-4 if dtype == torch.float32 else 4e-3, atol=1e-6)
    assert not logits[2].any()


def test_cross_entropy_of_impossible_words(where):
    """-inf logits have probability 0, and whole blocks of them do no harm."""
    backend, device = where
    logits = torch.full((2, 9000), -torch.inf, device=device)
    logits[:, 8999] = 3.0
    logits[1, 0] = 3.0
    losses = cross_entropy_(logits, torch.tensor([8999, 0], device=device), backend=backend)
    torch.testing.assert_close(losses.cpu(), torch.tensor([0.0, 0.6931472]))
    assert logits.isfinite().all() and logits[1, [0, 8999]].tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_linear_cross_entropy(where, dtype):
    backend, device = where
    hidden, weight = tame(10, 24, device, dtype=dtype) / 4, tame(50, 24, device, 1, dtype) / 4
    labels = torch.arange(10, device=device)
    labels[3] = -100
    made = [t.clone().requires_grad_() for t in (hidden, weight)]
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    loss = linear_cross_entropy(*made, labels, chunk=4, backend=backend)
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="sum")
    (2 * loss).backward()
    (2 * expected).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert error(loss, expected) < tolerance
    assert max(error(a.grad, b.grad) for a, b in zip(made, exact, strict=True)) < tolerance


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda: rms_norm(torch.zeros(2, 3), torch.ones(4)), ValueError, r"weight: got shape \(4,\), expected \(3,\)"),
        (lambda: rms_norm(torch.zeros(2, 3), torch.ones(3), 0.0), ValueError, "eps: got 0.0, expected a positive number"),
        (lambda: rms_norm(torch.zeros(3, 2).t(), torch.ones(3)), ValueError, r"strides \(1, 2\)"),
        (
            lambda: router(torch.zeros(2, 8), torch.zeros(8), n_group=3, topk_group=1, k=1, scale=1.0),
            ValueError, "n_group: got 3 for 8 experts",
        ),
        (
            lambda: router(torch.zeros(2, 8), torch.zeros(8), n_group=4, topk_group=1, k=3, scale=1.0),
            ValueError, "k: got 3, expected 1 to the 2 experts",
        ),
        (
            lambda: router(torch.zeros(2, 8), torch.zeros(8), n_group=4, topk_group=5, k=1, scale=1.0),
            ValueError, "topk_group: got 5, expected 1 to n_group = 4",
        ),
        (lambda: cross_entropy_(torch.zeros(2, 8), torch.zeros(3).long()), ValueError, r"labels: got shape \(3,\)"),
        (lambda: cross_entropy_(torch.zeros(2, 8), torch.zeros(2)), TypeError, "labels: got dtype torch.float32"),
        (
            lambda: linear_cross_entropy(torch.zeros(2, 8), torch.zeros(5, 8).bfloat16(), torch.zeros(2).long()),
            TypeError, "weight: got dtype torch.bfloat16, expected torch.float32",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, exception, message):
    with pytest.raises(exception, match=message):
        call()


def test_registered(kernel):
    x, weight = tame(4, 40, kernel).requires_grad_(), tame(1, 40, kernel)[0].requires_grad_()
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.minids.rms_norm.default, (x, weight, 1e-6), test_utils=checks)
    logits = logits_of(4, 16, kernel).requires_grad_()
    args = (logits, torch.zeros(16, device=kernel), 4, 2, 3, 2.5, True)
    torch.library.opcheck(torch.ops.minids.router.default, args, test_utils=checks)
    weights, indices, scores, _ = (t.detach() for t in torch.ops.minids.router(*args))
    for d_weights, d_scores in ((weights, scores), (None, scores), (weights, None)):
        args = (d_weights, d_scores, weights, indices, scores, 2.5)
        torch.library.opcheck(torch.ops.minids.router_backward.default, args, test_utils=checks[:2])
    labels = torch.arange(4, device=kernel)
    torch.library.opcheck(torch.ops.minids.cross_entropy_.default, (tame(4, 40, kernel), labels), test_utils=checks[:2])
