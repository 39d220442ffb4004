"""A model whose experts are spread over ranks (threads) is the model of one process: losses, gradients, loads, steps. And
mistakes, planted on purpose, are seen."""

import copy
import functools

import pytest
import torch

from minids.fp8 import to_fp8
from minids.model.router import Gate, Routing
from minids.parallel import check, experts, zero
from minids.parallel import step as step_module
from minids.parallel.check import OneProcess, steps
from minids.parallel.dispatch import Wire
from minids.parallel.experts import ROADS, is_expert, shard_experts, tally_of
from minids.parallel.mesh import Layout, Mesh, run_on_threads
from minids.parallel.step import ExpertParallel
from minids.pipeline.check import batches, tiny_config
from minids.train.optim import OptimConfig
from minids.train.settings import TrainConfig

CFG = tiny_config(3)
FOUR = Layout(4, 4, gpus_per_node=2)
LAYOUTS = {"EP 4": Layout(4, 4, gpus_per_node=2), "EP 2, 2 replicas": Layout(4, 2, gpus_per_node=1),
           "EP 4 on one node, 2 replicas": Layout(8, 4, gpus_per_node=8), "DP 2": Layout(2, 1),
           "EP 8 on 4 nodes": Layout(8, 8, gpus_per_node=2)}  # fmt: skip


def train_config(**changes):
    values = {"device": "cpu", "precision": "fp32", "micro_batch": 1, "document_mask": True, "optim": OptimConfig(clip=0.1)}
    return TrainConfig(**values | changes)


def draw(dtype=torch.float64, cfg=CFG):
    return check.draw(cfg, "cpu", dtype)


def on_threads(layout=FOUR, model=None, dispatch="two_hop", wire=None, zero=False, dtype=torch.float64, config=None):
    """A step and another's gradient over the ranks of ``layout``, each a thread."""
    model = draw(dtype) if model is None else model
    cfg = model.cfg

    def work(mesh):
        mine = shard_experts(copy.deepcopy(model), mesh, dispatch, wire)
        engine = ExpertParallel(cfg, config or train_config(), mesh, zero=zero, dtype=dtype, model=mine)
        return steps(engine, batches(0, cfg.vocab_size))

    return run_on_threads(layout, work)[0]


def in_one(config=None, dtype=torch.float64, cfg=CFG):
    """The same by minids.train.step."""
    return steps(OneProcess(cfg, config or train_config(), dtype), batches(0, cfg.vocab_size))


@functools.cache
def reference():
    return in_one()


def largest(found, wanted):
    """The largest difference, relative to the largest number of a tensor."""
    assert found.keys() == wanted.keys()
    return max(check._relative(found[name], tensor) for name, tensor in wanted.items())


def agree(found, wanted, limit=1e-12, weights=1e-9):
    for which in ("first", "second"):
        a, b = found[which], wanted[which]
        pairs = [(a.loss, b.loss), (a.total, b.total), (a.balance_loss, b.balance_loss), *zip(a.mtp_losses, b.mtp_losses,
                                                                                          strict=True)]  # fmt: skip
        assert all(x == pytest.approx(y, abs=1e-6) for x, y in pairs)  # losses are summed in float32
        assert torch.equal(a.loads, b.loads)
    assert largest(found["gradients"], wanted["gradients"]) < limit
    assert found["norm"] == pytest.approx(wanted["norm"], rel=1e-6)
    assert max(float((found["state"][n] - w).abs().max()) for n, w in wanted["state"].items()) < weights


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dispatch", ROADS)
def test_a_step_of_many_ranks_is_the_step_of_one(layout, dispatch):
    agree(on_threads(layout, dispatch=dispatch), reference())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_with_sliced_optimizer_state_too(layout):
    agree(on_threads(layout, zero=True), reference())


def test_the_meter_of_all_ranks_reads_as_that_of_one():
    a, b = (found["first"].meter.read() for found in (on_threads(), reference()))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(torch.tensor(a[name]), torch.tensor(b[name]), rtol=1e-6, atol=1e-6)


def test_micro_batches_of_two_rows_and_recomputation():
    config = train_config(micro_batch=2, recompute=True)
    agree(on_threads(config=config), in_one(config))


def test_recomputation_where_a_rank_has_no_rows():
    """Two of four ranks; and no shared expert, whose products behind the all-to-alls would keep all ranks in step."""
    config, cfg = train_config(micro_batch=2, recompute=True), tiny_config(3, n_shared_experts=0)
    one = OneProcess(cfg, config, torch.float64)
    for gate in one.model.routers():
        gate.e_score_correction_bias[:2] += 5  # the two of rank 0
    found = on_threads(model=copy.deepcopy(one.model), config=config)
    agree(found, steps(one, batches(0, cfg.vocab_size)))
    assert found["first"].loads[:, 4:].sum() == 0


def test_fp8_rows_are_one_process_that_quantises_its_rows():
    wire = Wire("fp8", "exact")
    wanted = on_threads(Layout(1), wire=wire)
    agree(on_threads(wire=wire), wanted)
    assert largest(wanted["gradients"], reference()["gradients"]) > 1e-3, "FP8 is no identity"


def test_bf16_on_the_way_back_rounds_parts_of_a_sum():
    apart = largest(on_threads(wire=Wire("exact", "bf16"))["gradients"], reference()["gradients"])
    assert 1e-4 < apart < 0.1


def test_fp8_experts_read_the_numbers_that_were_sent():
    """Quantised before they travel or when they arrive, the products read the same; FP32 around them."""
    model, config = to_fp8(draw(torch.float32), "v3"), train_config(fp8="v3", micro_batch=8)
    plain, sent = (on_threads(model=model, dispatch="once", wire=wire, dtype=torch.float32, config=config)
                   for wire in (Wire(), Wire("fp8", "exact")))  # fmt: skip
    assert sent["first"].loss == pytest.approx(plain["first"].loss, abs=1e-6)
    assert largest(sent["gradients"], plain["gradients"]) < 1e-5
    alone = on_threads(Layout(1), model, "once", dtype=torch.float32, config=config)
    assert plain["first"].loss == pytest.approx(alone["first"].loss, abs=1e-4)
    assert plain["first"].loss != pytest.approx(reference()["first"].loss, abs=1e-4), "FP8 is no identity"


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("bf16-autocast", torch.float32)])
def test_bf16_weights_and_autocast(precision, dtype):
    """Every token visits all experts, so that no rounding can turn a choice."""
    config, cfg = train_config(precision=precision), tiny_config(3, num_experts_per_tok=8, n_group=1, topk_group=1)
    found = on_threads(model=draw(dtype, cfg), dtype=dtype, config=config, zero=True)
    wanted = in_one(config, dtype, cfg)
    assert found["first"].loss == pytest.approx(wanted["first"].loss, abs=2e-3)
    a, b = (torch.cat([g.flatten().float() for g in run["gradients"].values()]) for run in (found, wanted))
    assert (a - b).norm() / b.norm() < 0.02  # BF16 sums, in another order
    assert found["state"]["lm_head.weight"].dtype == dtype


def everyone_wants_two(self, x_ND, real=Gate.forward):
    """Experts 0 and 1, which are the first rank's."""
    found = real(self, x_ND)
    indices = torch.arange(2).expand_as(found.indices).contiguous()
    weights = found.scores.gather(1, indices)
    return Routing(weights, indices, found.scores, torch.bincount(indices.flatten(), minlength=len(found.load)))


def test_ranks_without_a_token_take_part_and_get_zero_gradients(monkeypatch):
    monkeypatch.setattr(Gate, "forward", everyone_wants_two)
    found = on_threads()
    agree(found, in_one())
    spread = [g for name, g in found["gradients"].items() if is_expert(name)]
    assert all((g[2:] == 0).all() and (g[:2] != 0).any() for g in spread)


def test_inference_without_gradients_and_more_tokens_on_one_rank():
    model = draw().eval()
    tokens = [torch.randint(0, 97, (n, 11), generator=torch.Generator().manual_seed(n)) for n in (1, 2, 3, 5)]

    def work(mesh):
        with torch.no_grad():
            return shard_experts(copy.deepcopy(model), mesh)(tokens[mesh.rank]).logits

    with torch.no_grad():
        for found, t in zip(run_on_threads(FOUR, work), tokens, strict=True):
            torch.testing.assert_close(found, model(t).logits, rtol=1e-10, atol=1e-10)


def test_names_shapes_and_bytes_of_a_rank():
    whole = draw()

    def work(mesh):
        model = shard_experts(copy.deepcopy(whole), mesh)
        return {name: tuple(p.shape) for name, p in model.named_parameters()}, tally_of(model).total("dispatch")

    for shapes, sent in run_on_threads(FOUR, work):
        for name, p in whole.named_parameters():
            assert shapes[name] == ((2, *p.shape[1:]) if is_expert(name) else tuple(p.shape))
        assert shapes.keys() == dict(whole.named_parameters()).keys() and sent == (0, 0)


# ---- mistakes: what must differ, and by how much at least -----------------------------------------------------------


def averaged_over_all(named, mesh, real=experts.sum_gradients):
    """The classic: experts' gradients summed over replicas and divided as if they were the ranks'."""
    named = list(named)
    real(named, mesh)
    for name, tensor in named:
        if is_expert(name):
            tensor.grad /= mesh.layout.ep


def local_loads(self, meter):
    return meter


def norm_of_one_rank(self):
    return torch.nn.utils.get_total_norm([m.grad for m in self.masters.values()])


def test_a_lost_factor_of_the_expert_group_is_seen(monkeypatch):
    monkeypatch.setattr(zero, "sum_gradients", averaged_over_all)
    found = on_threads()
    assert abs(found["norm"] / reference()["norm"] - 1) > 0.01


def test_loads_that_are_not_summed_are_seen(monkeypatch):
    monkeypatch.setattr(ExpertParallel, "_whole", local_loads)
    found = on_threads()
    assert not torch.equal(found["first"].loads, reference()["first"].loads)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert not torch.equal(found["state"][name], reference()["state"][name])


def test_the_norm_of_one_rank_is_seen(monkeypatch):
    monkeypatch.setattr(zero.RankOptimizer, "total_norm", norm_of_one_rank)
    found = on_threads()
    assert abs(found["norm"] / reference()["norm"] - 1) > 0.01


def test_a_mean_of_means_over_ranks_is_seen(monkeypatch):
    """Labels are spread unevenly: each rank's own count is not the batch's divided by the ranks."""
    real = step_module.micro_batch

    def own_count(model, balancer, optimizer, config, inputs, labels, ids, counted, *rest):
        return real(model, balancer, optimizer, config, inputs, labels, ids, 4 * (labels != -100).sum(), *rest)

    monkeypatch.setattr(step_module, "micro_batch", own_count)
    config = train_config(micro_batch=2)
    found = on_threads(config=config)
    assert largest(found["gradients"], reference()["gradients"]) > 0.01


def test_gradients_of_replicas_that_are_not_summed_are_seen(monkeypatch):
    monkeypatch.setattr(experts, "is_expert", lambda name: False)  # then they are summed over strangers
    found = on_threads(Layout(4, 2, gpus_per_node=1))
    assert abs(found["norm"] / reference()["norm"] - 1) > 0.01


def shard(layout):
    model = draw()  # not on the threads: torch's default dtype is the process's
    run_on_threads(layout, lambda mesh: shard_experts(copy.deepcopy(model), mesh))


def bad_batch():
    engine = ExpertParallel(CFG, train_config(), Mesh.alone())
    engine.data = type("Three", (), {"size": 3, "rank": 0})()
    engine.compute_gradients(*batches(0, 97)[0], 0.3)


@pytest.mark.parametrize("call, message", [
    (lambda: shard_experts(shard_experts(draw(), Mesh.alone()), Mesh.alone()), "experts are ShardedExperts: allowed are"),
    (lambda: shard(Layout(4, 2, pp=2)), "pp=2: allowed is 1"),
    (lambda: shard(Layout(16, 16, gpus_per_node=4)), "ep=16: allowed are divisors of n_experts=8"),
    (lambda: shard_experts(draw(), Mesh.alone(), "tree"), "dispatch='tree': allowed are flat, once, two_hop"),
    (lambda: ExpertParallel(CFG, train_config(balance=("noisy",)), Mesh.alone()), "balance: noisy"),
    (bad_batch, "a global batch of 8 sequences on 3 data ranks: allowed are multiples of 3"),
])  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
