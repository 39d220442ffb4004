"""Load statistics against counting with loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minids import ModelConfig, Transformer
from minids.model.balancer import Balancer
from minids.model.load import LoadMeter, entropy, nodes_per_token
from minids.model.router import Routing, count_load


def config(k=2, keep=4, **changes):
    return ModelConfig.preset("toy", hidden_size=8, n_routed_experts=8, n_group=4, topk_group=keep, num_experts_per_tok=k,
                              vocab_size=64, num_hidden_layers=3, **changes)  # fmt: skip


def random_routing(n, k, drop=True):
    scores = torch.randn(n, 8).sigmoid()
    indices = scores.topk(k).indices
    served = torch.rand(n, k) > 0.3 if drop else None
    return Routing(scores.gather(1, indices), indices, scores, count_load(indices, 8), served=served)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), k=st.integers(1, 3), drop=st.booleans(), batches=st.integers(1, 3))
def test_equals_counting(seed, n, k, drop, batches):
    torch.manual_seed(seed)
    meter, layers = LoadMeter(config(k)), [[random_routing(n, k, drop) for _ in range(2)] for _ in range(batches)]
    for routings in layers:
        meter.add(routings)
    found = meter.read()
    for layer in range(2):
        total, worst, reached, dropped, uncertainty = [0] * 8, [], 0, 0, 0.0
        for routing in (routings[layer] for routings in layers):
            load = [0] * 8
            for token in range(n):
                ok = [True] * k if routing.served is None else routing.served[token].tolist()
                got = [e for e, served in zip(routing.indices[token].tolist(), ok, strict=True) if served]
                for e in got:
                    load[e] += 1
                reached += len({e // 2 for e in got})
                dropped += k - len(got)
                p = [float(x) / float(routing.scores[token].sum()) for x in routing.scores[token]]
                uncertainty -= sum(x * math.log(x) for x in p)
            worst.append(max(load) / (n * k / 8) - 1)
            total = [a + b for a, b in zip(total, load, strict=True)]
        assert found["load"][layer] == total
        # max / mean, at most 8, is rounded in FP32 before 1 is taken off: 0 may come out as 2^-21.
        violation = max(total) / (n * k * batches / 8) - 1
        assert found["max_violation_batch"][layer] == pytest.approx(sum(worst) / batches, rel=1e-5, abs=2**-21)
        assert found["max_violation_global"][layer] == pytest.approx(violation, rel=1e-5, abs=2**-21)
        assert found["nodes_per_token"][layer] == pytest.approx(reached / (n * batches))
        assert found["experts_per_token"][layer] == pytest.approx(sum(total) / (n * batches))
        assert found["dropped"][layer] == dropped
        assert found["dropped_share"][layer] == pytest.approx(dropped / (n * k * batches))
        assert found["token_entropy"][layer] == pytest.approx(uncertainty / (n * batches), rel=1e-5)


def test_entropy_is_zero_when_sure_and_ln_e_when_even():
    assert entropy(torch.eye(4)).tolist() == [0, 0, 0, 0]
    assert entropy(torch.full((8,), 1 / 8)).item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_group_limit_limits_nodes(keep):
    torch.manual_seed(0)
    model = Transformer(config(k=2, keep=keep))
    routing = model(torch.randint(0, 64, (2, 16))).routing[0]
    nodes = nodes_per_token(routing.indices, model.cfg)
    assert nodes.max() <= keep and nodes.min() >= 1


@pytest.mark.parametrize("texts", [("bias",), ("capacity:factor=0.5",), ("expert_choice",)])
def test_of_a_whole_model(texts):
    torch.manual_seed(0)
    model = Transformer(config())
    Balancer.install(model, texts)
    out = model(torch.randint(0, 64, (2, 32)))
    meter = LoadMeter(model.cfg)
    meter.add(out.routing)
    found = meter.read(model.routers())
    assert len(found["load"]) == 3 and len(found["bias"]) == 3 and found["bias"][0] == [0.0] * 8
    assert torch.equal(meter.load, torch.stack([routing.received() for routing in out.routing]))
    share = max(found["dropped_share"])
    assert (share > 0.1) is (texts == ("capacity:factor=0.5",))
    if texts == ("expert_choice",):
        assert max(found["max_violation_batch"]) == 0 and found["experts_per_token"][0] == 2


def test_of_a_model_without_experts_there_is_nothing():
    meter = LoadMeter(config())
    meter.add([])
    assert meter.read() == {} and meter.load.shape == (0, 8)
