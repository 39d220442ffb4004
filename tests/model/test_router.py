"""The router against a scalar program written from the formula, and its invariants."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids import ModelConfig
from minids.model.router import Gate, count_load


def make(seed, groups=4, keep=2, per_group=4, k=3, **changes):
    torch.manual_seed(seed)
    cfg = ModelConfig.preset("toy", hidden_size=8, n_routed_experts=groups * per_group, n_group=groups, topk_group=keep,
                             num_experts_per_tok=k, **changes)
    gate = Gate(cfg)
    gate.weight.data.normal_()
    if gate.e_score_correction_bias is not None:
        gate.e_score_correction_bias.uniform_(-3, 1)  # strongly negative: a group masked with 0 would win
    return cfg, gate


def scalar_route(cfg, gate, x):
    """One token, in Python floats, straight from [V3 eq. 12-16]."""
    logits = (gate.weight.double() @ x.double()).tolist()
    scores = (torch.tensor(logits, dtype=torch.float64).sigmoid() if cfg.scoring_func == "sigmoid"
              else torch.tensor(logits, dtype=torch.float64).softmax(0)).tolist()
    bias = gate.e_score_correction_bias
    choice = [s + (float(bias[i]) if bias is not None else 0.0) for i, s in enumerate(scores)]
    allowed = range(cfg.n_routed_experts)
    if cfg.topk_method != "greedy":
        size = cfg.n_routed_experts // cfg.n_group
        groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(cfg.n_group)]
        value = [sum(g[:2]) if cfg.topk_method == "noaux_tc" else g[0] for g in groups]
        best = sorted(range(cfg.n_group), key=lambda g: -value[g])[: cfg.topk_group]
        allowed = [i for i in allowed if i // size in best]
    chosen = sorted(allowed, key=lambda i: -choice[i])[: cfg.num_experts_per_tok]
    total = sum(scores[i] for i in chosen) if cfg.norm_topk_prob else 1.0
    return {i: scores[i] / total * cfg.routed_scaling_factor for i in chosen}


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), groups=st.sampled_from([1, 2, 4]), k=st.integers(1, 4),
       scoring=st.sampled_from(["sigmoid", "softmax"]), norm=st.booleans(),
       method=st.sampled_from(["noaux_tc", "greedy", "group_limited_greedy"]))
def test_equals_the_formula(seed, groups, k, scoring, norm, method):
    cfg, gate = make(seed, groups=groups, keep=(groups + 1) // 2, k=k, scoring_func=scoring, norm_topk_prob=norm,
                     topk_method=method)
    x = torch.randn(5, 8)
    routing = gate(x)
    for n in range(5):
        expected = scalar_route(cfg, gate, x[n])
        got = dict(zip(routing.indices[n].tolist(), routing.weights[n].tolist(), strict=True))
        assert got.keys() == expected.keys()
        assert got == pytest.approx(expected, rel=1e-5)


def test_bias_alters_the_choice_never_the_gate_value():
    cfg, gate = make(0, groups=1, keep=1, per_group=16)
    x = torch.randn(64, 8)
    gate.e_score_correction_bias.zero_()
    before = gate(x)
    gate.e_score_correction_bias[5] = 100.0
    after = gate(x)
    assert (after.indices == 5).any(-1).all() and not (before.indices == 5).any(-1).all()
    torch.testing.assert_close(after.scores, before.scores)
    chosen = after.scores.gather(-1, after.indices)
    torch.testing.assert_close(after.weights, 2.5 * chosen / chosen.sum(-1, keepdim=True))


@given(st.integers(0, 10**6))
def test_gates_sum_to_the_scaling_factor_and_groups_are_limited(seed):
    cfg, gate = make(seed)
    routing = gate(torch.randn(16, 8))
    torch.testing.assert_close(routing.weights.sum(-1), torch.full((16,), cfg.routed_scaling_factor))
    for row in routing.indices:
        assert len(set(row.tolist())) == cfg.num_experts_per_tok
        assert len({i // 4 for i in row.tolist()}) <= cfg.topk_group
    assert routing.load.sum() == 16 * cfg.num_experts_per_tok
    assert torch.equal(routing.load, torch.bincount(routing.indices.flatten(), minlength=16))


def test_no_gradient_through_the_choice_and_the_bias_is_no_parameter():
    _, gate = make(1)
    assert [name for name, _ in gate.named_parameters()] == ["weight"]
    gate(torch.randn(4, 8)).weights.square().sum().backward()
    assert gate.weight.grad.abs().sum() > 0 and not gate.e_score_correction_bias.requires_grad


def test_scores_and_bias_stay_float32_in_a_bf16_model():
    _, gate = make(2)
    bias = gate.e_score_correction_bias.clone()
    gate.to(torch.bfloat16)
    assert gate.weight.dtype == torch.bfloat16 and gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(gate.e_score_correction_bias, bias)  # not rounded on the way
    with torch.autocast("cpu", torch.bfloat16):
        assert gate(torch.randn(4, 8, dtype=torch.bfloat16)).scores.dtype == torch.float32


def test_count_load_counts_empty_experts():
    assert count_load(torch.tensor([[0, 3], [3, 3]]), 5).tolist() == [1, 0, 0, 3, 0]
