"""Every balancing strategy: losses and gradients against loops over the formula in FP64, and their invariants."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids import ModelConfig
from minids.model import assignment, auxiliary, balance
from minids.model.balancer import STRATEGIES, Balancer, parse, parse_all
from minids.model.router import Gate, Noise, Routing, count_load
from minids.model.transformer import Transformer

cases = st.fixed_dictionaries(dict(seed=st.integers(0, 10**6), batch=st.integers(1, 3), t=st.integers(1, 5),
                                   k=st.integers(1, 3), softmax=st.booleans()))  # fmt: skip


def config(k=2, experts=8, groups=4, keep=4, softmax=False, method="noaux_tc", **changes):
    return ModelConfig.preset("toy", hidden_size=8, n_routed_experts=experts, n_group=groups, topk_group=keep,
                              num_experts_per_tok=k, scoring_func="softmax" if softmax else "sigmoid",
                              topk_method=method, **changes)  # fmt: skip


def random_case(seed, batch, t, k, softmax):
    """(cfg, leaves, routing) in FP64: routing built here, top-K of noisy logits; leaves are what gradients are for."""
    torch.manual_seed(seed)
    cfg = config(k, softmax=softmax)
    clean = torch.randn(batch * t, 8, dtype=torch.float64, requires_grad=True)
    raw = torch.randn(batch * t, 8, dtype=torch.float64, requires_grad=True)
    deviation = raw.exp()
    logits = clean + torch.randn(batch * t, 8, dtype=torch.float64) * deviation
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    indices = scores.topk(k).indices
    chosen = scores.gather(-1, indices)
    weights = chosen / chosen.sum(-1, keepdim=True) * cfg.routed_scaling_factor
    load = count_load(indices, 8)
    return cfg, (clean, raw), Routing(weights, indices, scores, load, logits, Noise(clean, deviation))


# ---- the formulas, with loops ---------------------------------------------------------------------------------------


def plain_variation(values):
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def plain_importance(r, batch, cfg):
    values = [0.0] * cfg.n_routed_experts
    for row, gates in zip(r.indices.tolist(), r.weights, strict=True):
        for i, g in zip(row, gates, strict=True):
            values[i] = values[i] + g
    return plain_variation(values)


def plain_load(r, batch, cfg):
    values = [0.0] * cfg.n_routed_experts
    for clean, noisy, deviation in zip(r.noise.clean, r.logits, r.noise.deviation, strict=True):
        for i in range(cfg.n_routed_experts):
            others = sorted((noisy[j] for j in range(cfg.n_routed_experts) if j != i), key=lambda x: -x.item())
            z = (clean[i] - others[cfg.num_experts_per_tok - 1]) / deviation[i]
            values[i] = values[i] + 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    return plain_variation(values)


def plain_shares(rows):
    return [[row[i] / row.sum() for i in range(len(row))] for row in rows]


def plain_first(r, batch, cfg, factor):
    """factor * sum over experts of (share of tokens that like it best) * (mean share of its scores)."""
    first, share, n = r.scores.argmax(-1).tolist(), plain_shares(r.scores), len(r.scores)
    return factor * sum(first.count(i) / n * sum(row[i] for row in share) / n for i in range(cfg.n_routed_experts))


def plain_z(r, batch, cfg):
    return sum(torch.log(sum(torch.exp(x) for x in row)) ** 2 for row in r.logits) / len(r.logits)


def plain_sequences(r, batch, cfg, one):
    """Mean over sequences of ``one(chosen lists, shares)``."""
    t = len(r.scores) // batch
    parts = [slice(b * t, (b + 1) * t) for b in range(batch)]
    return sum(one(r.indices[p].tolist(), plain_shares(r.scores[p])) for p in parts) / batch


def plain_experts(chosen, share, cfg):
    t, e, k = len(chosen), cfg.n_routed_experts, cfg.num_experts_per_tok
    f = [e / (k * t) * sum(i in row for row in chosen) for i in range(e)]
    return f, [sum(row[i] for row in share) / t for i in range(e)]


def plain_frequency(r, batch, cfg):
    def one(chosen, share):
        return sum(f * p for f, p in zip(*plain_experts(chosen, share, cfg), strict=True))

    return plain_sequences(r, batch, cfg, one)


def plain_devices(r, batch, cfg):
    def one(chosen, share):
        f, p = plain_experts(chosen, share, cfg)
        size = cfg.n_routed_experts // cfg.n_group
        devices = [range(g * size, (g + 1) * size) for g in range(cfg.n_group)]
        return sum(sum(f[i] for i in d) / size * sum(p[i] for i in d) for d in devices)

    return plain_sequences(r, batch, cfg, one)


def plain_communication(r, batch, cfg):
    def one(chosen, share):
        _, p = plain_experts(chosen, share, cfg)
        size, total = cfg.n_routed_experts // cfg.n_group, 0.0
        for g in range(cfg.n_group):
            sent = sum(any(i // size == g for i in row) for row in chosen)
            total = total + cfg.n_group / (cfg.topk_group * len(chosen)) * sent * sum(p[g * size : (g + 1) * size])
        return total

    return plain_sequences(r, batch, cfg, one)


LOSSES = {
    "importance": plain_importance,
    "load": plain_load,
    "gshard": lambda r, b, c: plain_first(r, b, c, 1 / c.n_routed_experts),
    "switch": lambda r, b, c: plain_first(r, b, c, c.n_routed_experts),
    "z": plain_z,
    "sequence": plain_frequency,
    "expert_level": plain_frequency,
    "batch": lambda r, b, c: plain_frequency(r, 1, c),
    "device_level": plain_devices,
    "communication": plain_communication,
}


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=25)
@given(case=cases)
def test_loss_and_gradient_equal_the_formula(name, case):
    cfg, leaves, routing = random_case(**case)
    ours = parse(f"{name}:alpha=0.7").loss(routing, case["batch"], cfg)
    plain = 0.7 * LOSSES[name](routing, case["batch"], cfg)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
    grads = [torch.autograd.grad(x, leaves, retain_graph=True, allow_unused=True) for x in (ours, plain)]
    assert any(g is not None for g in grads[1])
    for got, expected, leaf in zip(*grads, leaves, strict=True):
        got, expected = (torch.zeros_like(leaf) if g is None else g for g in (got, expected))
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-10)


def balanced_case(seed, k, first=False):
    """Any scores, but choices dealt out in turn: every expert is chosen alike often (and alike often first)."""
    torch.manual_seed(seed)
    logits = torch.randn(16, 8, dtype=torch.float64, requires_grad=True)
    indices = (torch.arange(16).unsqueeze(1) + torch.arange(k)) % 8
    scores = logits.softmax(-1)
    weights = torch.tensor([2.0] + [1.0] * (k - 1), dtype=torch.float64).expand(16, k).clone()
    return logits, Routing(weights, indices, scores, count_load(indices, 8), logits)


@pytest.mark.parametrize("name", ["sequence", "expert_level", "batch", "device_level", "communication", "switch", "gshard",
                                  "importance"])  # fmt: skip
@given(seed=st.integers(0, 10**6), k=st.integers(1, 3))
def test_equal_loads_are_stationary(name, seed, k):
    """At balance a loss has the same value whatever the scores: its gradient is that of a constant, 0."""
    cfg = config(k, softmax=True)
    logits, routing = balanced_case(seed, k)
    devices = sum(len(set(row)) for row in (routing.indices // 2).tolist()) / 16  # that a token is sent to; M = 4
    value = {"gshard": 1 / 64, "importance": 0, "communication": devices / 4}.get(name, 1)
    loss = parse(f"{name}:alpha=0.5").loss(routing, 2, cfg)
    assert loss.item() == pytest.approx(0.5 * value, rel=1e-9, abs=1e-12)
    if loss.requires_grad:
        assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-9


@pytest.mark.parametrize("name, least", [("sequence", 1), ("expert_level", 1), ("batch", 1), ("switch", 1),
                                         ("gshard", 1 / 64), ("importance", 0)])  # fmt: skip
@given(seed=st.integers(0, 10**6), k=st.integers(1, 3))
def test_no_loss_is_below_that_of_balance(name, least, seed, k):
    """Every token alike, the loads follow the scores: the extreme of imbalance costs more than balance."""
    torch.manual_seed(seed)
    scores = (3 * torch.randn(1, 8, dtype=torch.float64)).softmax(-1).expand(6, 8)
    best = scores.topk(k)
    routing = Routing(best.values, best.indices, scores, count_load(best.indices, 8), scores.log())
    assert parse(f"{name}:alpha=1").loss(routing, 1, config(k, softmax=True)).item() > least + 1e-3


@given(seed=st.integers(0, 10**6), rise=st.floats(0.1, 3))
def test_pushing_a_crowded_expert_up_raises_every_frequency_loss(seed, rise):
    torch.manual_seed(seed)
    logits = torch.randn(12, 8, dtype=torch.float64)
    for name in ("sequence", "batch", "switch", "gshard", "device_level", "communication"):
        values = []
        for add in (0.0, rise):  # expert 0 is chosen by all: more score for it, same choices
            moved = logits + torch.nn.functional.one_hot(torch.zeros(12, dtype=torch.long), 8) * (9 + add)
            scores, indices = moved.softmax(-1), torch.tensor([[0, 1]]).expand(12, 2)
            routing = Routing(torch.tensor([[2.0, 1.0]]).expand(12, 2), indices, scores, count_load(indices, 8), moved)
            values.append(parse(name).loss(routing, 2, config(2, softmax=True)))
        assert values[1] > values[0]


@given(case=cases)
def test_relations_between_the_losses(case):
    cfg, _, routing = random_case(**case)
    batch = case["batch"]
    switch = auxiliary.SwitchLoss(0.3).loss(routing, batch, cfg)
    torch.testing.assert_close(switch, auxiliary.GShardLoss(0.3).loss(routing, batch, cfg) * 64)
    if case["k"] == 1:
        torch.testing.assert_close(switch, auxiliary.BatchWise(0.3).loss(routing, batch, cfg))
    if batch == 1:
        one, other = auxiliary.BatchWise(0.3), balance.SequenceWise(0.3)
        torch.testing.assert_close(one.loss(routing, 1, cfg), other.loss(routing, 1, cfg))


# ---- biases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bias", "proportional_bias"])
@given(loads=st.lists(st.integers(0, 500), min_size=8, max_size=8), gamma=st.sampled_from([1e-3, 0.1]))
def test_bias_moves_towards_the_mean_load(name, loads, gamma):
    gate, load = Gate(config()), torch.tensor([loads])
    parse(name).update([gate], load, gamma)
    mean = sum(loads) / 8
    step = {"bias": lambda x: (mean > x) - (mean < x),
            "proportional_bias": lambda x: (mean - x) / max(mean, 1)}[name]  # fmt: skip
    assert gate.e_score_correction_bias.tolist() == pytest.approx([gamma * step(x) for x in loads], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", ["bias", "proportional_bias"])
@pytest.mark.parametrize("each", [0, 1, 77])
def test_balanced_loads_leave_the_bias_alone(name, each):
    gate = Gate(config())
    parse(name).update([gate], torch.full((1, 8), each), 0.1)
    assert gate.e_score_correction_bias.eq(0).all()


# ---- who gets in ------------------------------------------------------------------------------------------------------


def skewed_gate(seed, text, k=2, n=24, **changes):
    torch.manual_seed(seed)
    cfg = config(k, **changes)
    gate = Gate(cfg)
    gate.weight.data.normal_()
    if gate.e_score_correction_bias is not None:
        gate.e_score_correction_bias.normal_()
    parse_all((text,), cfg)[0].install(gate)
    return gate, torch.randn(n, 8) + 0.7  # a common direction: some experts are wanted by most


def place_limit(n, k, factor):
    return max(1, math.ceil(factor * n * k / 8 - 1e-9))


@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), k=st.integers(1, 3), factor=st.sampled_from([0.5, 1.0, 1.25, 2.0]),
       priority=st.sampled_from(["position", "score"]))
def test_capacity_keeps_the_first_or_the_best(seed, n, k, factor, priority):
    gate, x = skewed_gate(seed, f"capacity:factor={factor},priority={priority}", k, n)
    routing, limit = gate(x), place_limit(n, k, factor)
    gate.eval()
    free = gate(x)
    assert torch.equal(routing.indices.sort().values, free.indices.sort().values)  # the choice itself is untouched
    assert routing.received().max() <= limit
    assert routing.weights[~routing.served].eq(0).all()
    liking = gate.preference(routing.scores).tolist()
    for e in range(8):  # loops: each expert's line, and who of it got in
        line = [(i, liking[i][e]) for i in range(n) if e in routing.indices[i]]
        if priority == "score":
            line.sort(key=lambda pair: -pair[1])
        got = {i for i in range(n) for c in range(k) if routing.indices[i, c] == e and routing.served[i, c]}
        assert got == {i for i, _ in line[:limit]}


@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), k=st.integers(1, 3), factor=st.sampled_from([1.0, 1.25, 2.0]),
       keep=st.sampled_from([2, 4]))
def test_buffer_equals_tokens_choosing_one_after_the_other(seed, n, k, factor, keep):
    gate, x = skewed_gate(seed, f"buffer:factor={factor}", k, n, keep=keep)
    routing, limit = gate(x), place_limit(n, k, factor)
    preference, left = gate.preference(routing.scores), [limit] * 8
    for i in range(n):
        open_experts = [e for e in range(8) if left[e] and preference[i, e] > -math.inf]
        expected = sorted(open_experts, key=lambda e: -preference[i, e])[:k]
        got = [int(e) for e, ok in zip(routing.indices[i], routing.served[i], strict=True) if ok]
        assert sorted(got) == sorted(expected)
        for e in expected:
            left[e] -= 1
    assert routing.received().max() <= limit


@given(seed=st.integers(0, 10**6))
def test_buffer_moves_tokens_where_capacity_drops_them(seed):
    received = {}
    for text in ("capacity:factor=1", "buffer:factor=1"):
        gate, x = skewed_gate(seed, text, n=64)
        received[text] = int(gate(x).received().sum())
    # 128 choices and as many places. Only the last tokens can lose: those that find but one expert open. When K - 1 = 1
    # expert is left open at the end, no more than its 16 places stay empty.
    assert received["buffer:factor=1"] >= max(received["capacity:factor=1"], 128 - 16)


@given(seed=st.integers(0, 10**6), n=st.integers(4, 40), k=st.integers(1, 3), norm=st.booleans(), softmax=st.booleans())
def test_expert_choice_loads_are_exactly_equal(seed, n, k, norm, softmax):
    gate, x = skewed_gate(seed, "expert_choice", k, n, softmax=softmax, norm_topk_prob=norm)
    routing, limit = gate(x), max(1, n * k // 8)
    liking = gate.preference(routing.scores).tolist()
    assert routing.received().tolist() == [limit] * 8
    for e in range(8):
        best = sorted(range(n), key=lambda i: -liking[i][e])[:limit]
        got = [i for i in range(n) if ((routing.indices[i] == e) & routing.served[i]).any()]
        assert got == sorted(best)
    served = routing.weights.sum(-1)[routing.served.any(-1)]
    if norm:
        torch.testing.assert_close(served, torch.full_like(served, 2.5))
    assert routing.weights[~routing.served].eq(0).all()


def earlier_outputs_change(text, seed=0):
    """Whether the MoE output of any earlier token changes when only the last of 16 tokens is another one."""
    torch.manual_seed(seed)
    model = Transformer(config(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, vocab_size=32))
    Balancer.install(model, (text,) if text else ())
    layer, changed = model.model.layers[0].mlp, False
    layer.gate.weight.data.normal_()
    for _ in range(20):
        x = torch.randn(1, 16, 8) + 0.7
        other = x.clone()
        other[:, -1] += 3 * torch.randn(8)
        one, two = (layer(y)[0][:, :-1] for y in (x, other))
        changed |= bool((one - two).abs().max() > 0.01 * one.abs().max())  # products of other sizes round differently
    return changed


@pytest.mark.parametrize("text, leaks", [("", False), ("bias", False), ("capacity:factor=1,priority=position", False),
                                         ("buffer:factor=1", False), ("capacity:factor=1,priority=score", True),
                                         ("expert_choice", True)])  # fmt: skip
def test_who_lets_the_future_leak(text, leaks):
    """A later token changes an earlier one's output under expert choice and priority by score, and under nothing else."""
    assert earlier_outputs_change(text) is leaks


@pytest.mark.parametrize("text", ["noisy", "capacity:factor=0.5", "buffer", "expert_choice"])
def test_inference_is_plain_top_k(text):
    gate, x = skewed_gate(5, text)
    plain = Gate(gate.cfg)
    plain.weight, plain.e_score_correction_bias = gate.weight, gate.e_score_correction_bias
    gate.eval()
    routing, expected = gate(x), plain(x)
    assert routing.served is None and routing.noise is None
    assert torch.equal(routing.weights, expected.weights) and torch.equal(routing.indices, expected.indices)


@pytest.mark.parametrize("name", [None, "bias", "noisy", "capacity", "buffer", "expert_choice"])
def test_bias_is_never_in_the_gate_value(name):
    """Under every strategy: gate values are those of the raw scores, over the served choices."""
    gate, x = skewed_gate(7, name or "z")
    routing = gate(x)
    chosen = gate.activate(routing.logits).gather(-1, routing.indices)
    served = torch.ones_like(chosen) if routing.served is None else routing.served.float()
    over = chosen * served if name == "expert_choice" else chosen
    expected = 2.5 * chosen / over.sum(-1, keepdim=True).clamp_min(1e-20) * served
    assert gate.e_score_correction_bias.abs().max() > 0.5
    torch.testing.assert_close(routing.weights, expected)


# ---- noise ------------------------------------------------------------------------------------------------------------


def test_noise_acts_in_training_only_and_learns():
    gate, x = skewed_gate(1, "noisy")
    assert not torch.equal(gate(x).logits, gate(x).logits)
    gate.noise_weight.data.normal_()
    routing = gate(x)
    deviation = torch.nn.functional.softplus(x @ gate.noise_weight.T) + 0.01
    torch.testing.assert_close(routing.noise.deviation, deviation)
    torch.testing.assert_close(routing.noise.clean, x @ gate.weight.T)
    parse_all(("noisy", "load"), gate.cfg)[1].loss(routing, 1, gate.cfg).backward()
    assert gate.noise_weight.grad.abs().sum() > 0 and gate.weight.grad.abs().sum() > 0


def test_noise_has_the_deviation_it_says():
    gate, _ = skewed_gate(1, "noisy")
    x = torch.randn(1, 8).expand(20_000, 8)
    logits = gate(x).logits
    torch.testing.assert_close(logits.std(0), torch.full((8,), math.log(2) + 0.01), rtol=0.03, atol=0)


def test_load_loss_is_the_probability_of_being_chosen():
    """P_i against the frequency with which i is chosen when its noise alone is drawn again, 20,000 times."""
    torch.manual_seed(0)
    clean, deviation = torch.randn(1, 8, dtype=torch.float64), torch.rand(1, 8, dtype=torch.float64) + 0.3
    noisy = clean + torch.randn(1, 8) * deviation
    values = []
    for i in range(8):
        drawn = noisy.repeat(20_000, 1)
        drawn[:, i] = clean[0, i] + torch.randn(20_000) * deviation[0, i]
        values.append((drawn.topk(2).indices == i).any(-1).double().mean())
    indices = noisy.topk(2).indices
    weights, load = noisy.gather(1, indices), count_load(indices, 8)
    routing = Routing(weights, indices, noisy.softmax(-1), load, noisy, Noise(clean, deviation))
    loss = auxiliary.LoadLoss(1.0).loss(routing, 1, config(2))
    assert loss.item() == pytest.approx(float(plain_variation(values)), rel=0.05)


# ---- names, refusals, the whole model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("texts, changes, reason", [
    (("bias",), dict(method="greedy"), "topk_method='greedy' has no e_score_correction_bias"),
    (("device_level",), dict(groups=1, keep=1), "n_group=1 is a single device"),
    (("communication",), dict(groups=1, keep=1), "n_group=1 is a single device"),
    (("load",), {}, "add 'noisy'"),
    (("noisy", "load"), dict(keep=2), "topk_group=2 of n_group=4"),
    (("noisy", "load"), dict(k=8), "chooses all"),
    (("expert_choice",), dict(keep=2), "topk_group=2 of n_group=4"),
    (("expert_choice", "capacity"), {}, "Capacity"),
    (("expert_choice", "sequence"), {}, "SequenceWise nothing to do"),
    (("capacity", "buffer"), {}, "so does Buffer"),
    (("bias", "proportional_bias"), {}, "same bias"),
    (("switch", "switch:alpha=1"), {}, "given twice"),
    (("swich",), {}, "'swich': allowed are bias"),
    (("switch:beta=1",), {}, "'beta=1' is not understood, allowed for switch is alpha="),
    (("switch:alpha=big",), {}, "alpha='big', allowed is a number"),
    (("switch:alpha=-1",), {}, "SwitchLoss.alpha=-1.0"),
    (("switch:alpha=nan",), {}, "SwitchLoss.alpha=nan"),
    (("capacity:factor=0",), {}, "Capacity.factor=0.0"),
    (("capacity:priority=luck",), {}, "'luck': allowed are position, score"),
    (("buffer:factor=0.9",), {}, "too few places"),
])  # fmt: skip
def test_refused_with_a_reason(texts, changes, reason):
    with pytest.raises(ValueError) as error:
        parse_all(texts, config(**changes))
    assert reason in str(error.value)


def test_v2s_three_losses_go_together_with_the_groups_of_v2():
    cfg = config(k=3, keep=2, softmax=True, method="group_limited_greedy")
    found = parse_all(("expert_level", "device_level", "communication", "z"), cfg)
    assert [s.alpha for s in found] == [0.003, 0.05, 0.02, 1e-3]


COMBINATIONS = [(), ("bias", "sequence"), ("proportional_bias",), ("noisy", "importance", "load"), ("gshard",),
                ("switch", "capacity:priority=score"), ("batch", "z"), ("expert_level", "device_level", "communication"),
                ("bias", "buffer"), ("capacity",), ("expert_choice",)]  # fmt: skip


def test_the_combinations_cover_every_strategy():
    assert {text.split(":")[0] for texts in COMBINATIONS for text in texts} == set(STRATEGIES)


@pytest.mark.parametrize("texts", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("recompute", [False, True])
def test_trains_in_the_whole_model(texts, recompute):
    """Losses and gradients are finite, every gate gets one, and recomputation repeats the same routing."""
    torch.manual_seed(0)
    model = Transformer(config(vocab_size=64, num_hidden_layers=3))
    balancer = Balancer.install(model, texts)
    tokens = torch.randint(0, 64, (2, 17))
    torch.manual_seed(1)
    out = model(tokens[:, :-1], labels=tokens[:, 1:], recompute=recompute)
    loss = balancer.loss(out.routing, 2)
    (out.loss + out.mtp_loss + loss).backward()
    if recompute:
        plain = Transformer(model.cfg)
        Balancer.install(plain, texts)
        plain.load_state_dict(model.state_dict())
        torch.manual_seed(1)
        again = plain(tokens[:, :-1], labels=tokens[:, 1:])
        (again.loss + again.mtp_loss + balancer.loss(again.routing, 2)).backward()
        for (name, one), two in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-8, msg=name)
    has_loss = any(text.split(":")[0] not in ("bias", "proportional_bias", "noisy", "capacity", "buffer", "expert_choice")
                   for text in texts)  # fmt: skip
    assert (float(torch.as_tensor(loss).detach()) > 0) is has_loss
    for gate in model.routers():
        assert torch.isfinite(gate.weight.grad).all() and gate.weight.grad.abs().sum() > 0
        assert hasattr(gate, "noise_weight") is ("noisy" in texts)


def test_state_is_what_a_checkpoint_does_not_hold():
    model, other = (Transformer(config(vocab_size=64)) for _ in range(2))
    noisy = Balancer.install(model, ("noisy",))
    for gate in model.routers():
        gate.noise_weight.data.normal_()
    found = noisy.state()
    assert len(found) == 4 and Balancer.install(other, ("bias",)).state() == {}
    fresh = Transformer(config(vocab_size=64))
    Balancer.install(fresh, ("noisy",)).load_state(found)
    for one, two in zip(model.routers(), fresh.routers(), strict=True):
        assert torch.equal(one.noise_weight, two.noise_weight)
    with pytest.raises(ValueError, match="does not fit the strategies"):
        Balancer.install(Transformer(config(vocab_size=64)), ()).load_state(found)


def test_assignment_is_exported_under_every_name_once():
    assert len(set(STRATEGIES.values())) == len(STRATEGIES)
    assert all(issubclass(kind, balance.Strategy) and kind.__doc__ for kind in STRATEGIES.values())
    assert assignment.Capacity is STRATEGIES["capacity"]
