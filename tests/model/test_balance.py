"""Balancing: the sequence-wise loss against its plain formula, gradient included; the bias step is +-gamma or 0."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minids import ModelConfig, Transformer
from minids.model.balance import max_violation, sequence_balance_loss, update_bias
from minids.model.router import Gate, Routing, count_load


def routing_from(logits, k):
    scores = logits.sigmoid()
    indices = scores.topk(k).indices
    return Routing(scores.gather(-1, indices), indices, scores, count_load(indices, logits.shape[-1]))


def plain_loss(scores, indices, batch, cfg):
    """[V3 eq. 17-20] with loops over sequences, experts and tokens."""
    e, k = cfg.n_routed_experts, cfg.num_experts_per_tok
    t = len(scores) // batch
    total = 0.0
    for b in range(batch):
        rows, chosen = scores[b * t : (b + 1) * t], indices[b * t : (b + 1) * t].tolist()
        for i in range(e):
            f = e / (k * t) * sum(i in row for row in chosen)
            p = sum(row[i] / row.sum() for row in rows) / t
            total = total + f * p
    return cfg.aux_loss_alpha * total / batch


@given(seed=st.integers(0, 10**6), batch=st.integers(1, 3), t=st.integers(1, 6), k=st.integers(1, 3))
def test_sequence_loss_equals_the_formula(seed, batch, t, k):
    torch.manual_seed(seed)
    cfg = ModelConfig.preset("toy", n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=k, aux_loss_alpha=0.3)
    logits = torch.randn(batch * t, 4, dtype=torch.float64, requires_grad=True)
    routing = routing_from(logits, k)
    ours, plain = sequence_balance_loss(routing, batch, cfg), plain_loss(routing.scores, routing.indices, batch, cfg)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, plain)))


def test_sequence_loss_is_alpha_when_balanced_and_larger_when_not():
    cfg = ModelConfig.preset("toy", n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2)
    even = torch.tensor([[0, 1], [2, 3]])
    equal = Routing(torch.ones(2, 2), even, torch.full((2, 4), 0.5), count_load(even, 4))
    assert sequence_balance_loss(equal, 1, cfg).item() == pytest.approx(1e-4)
    skewed = routing_from(torch.tensor([[3.0, 3.0, -3.0, -3.0]] * 8), 2)
    assert sequence_balance_loss(skewed, 1, cfg) > 1.8e-4


@given(loads=st.lists(st.integers(0, 50), min_size=4, max_size=4), gamma=st.sampled_from([0.0, 1e-3, 0.1]))
def test_bias_step_is_gamma_zero_or_minus_gamma(loads, gamma):
    cfg = ModelConfig.preset("toy", n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2)
    gate = Gate(cfg)
    update_bias([gate], torch.tensor([loads]), gamma)
    mean = sum(loads) / 4
    expected = [gamma * ((mean > x) - (mean < x)) for x in loads]
    assert gate.e_score_correction_bias.tolist() == pytest.approx(expected)


def test_bias_update_balances_a_router_left_alone():
    """Random skewed affinities, no training: only the bias moves, and MaxVio falls."""
    torch.manual_seed(0)
    cfg = ModelConfig.preset("toy", hidden_size=8)
    gate = Gate(cfg)
    gate.weight.data.normal_()
    x = torch.randn(512, 8) + 1.0
    before = max_violation(gate(x).load)
    for _ in range(400):
        update_bias([gate], gate(x).load.unsqueeze(0), 0.005)
    assert before > 1.0 and max_violation(gate(x).load) < 0.15


def test_bias_update_wants_a_row_for_each_router():
    model = Transformer(ModelConfig.preset("toy"))
    with pytest.raises(ValueError, match="2 rows.*4 routers"):
        update_bias(model.routers(), torch.zeros(2, 16), 1e-3)


def test_max_violation():
    assert max_violation(torch.tensor([4, 4, 4, 4])).item() == 0
    torch.testing.assert_close(max_violation(torch.tensor([[8, 0, 4, 4], [16, 0, 0, 0]])), torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(max_violation(torch.tensor([[4, 0, 2, 2]]), 8.0), torch.tensor([-0.5]))  # half was dropped
