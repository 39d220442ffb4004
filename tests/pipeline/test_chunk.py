"""Inside a chunk: the two queues by hand, when all communication is hidden, and V3's times from FLOPs and bytes."""

import random
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest

from minids import ModelConfig
from minids.pipeline import build_schedule
from minids.pipeline.chunk import (
    NETWORK,
    ChunkTimes,
    Machine,
    backward_jobs,
    exposed,
    forward_jobs,
    pair_jobs,
    run_queues,
    span,
    stage_times,
    v3_times,
)

NAMES = [field.name for field in fields(ChunkTimes)]
EVEN = ChunkTimes(**{name: 2 if "_" in name and name[0] in "dc" else 3 for name in NAMES})


def drawn(generator, low=1, high=9):
    return ChunkTimes(*(generator.randint(low, high) for _ in NAMES))


def test_one_layer_alone_is_the_sum():
    """A forward hides nothing; a backward can hide its dispatch behind the MLP's weight gradient."""
    assert span(run_queues(forward_jobs(1), EVEN)) == 3 + 2 + 3 + 2
    assert span(run_queues(forward_jobs(3), EVEN)) == 30
    assert span(run_queues(backward_jobs(1, weights=False), EVEN)) == 2 + 3 + 2 + 3
    assert span(run_queues(backward_jobs(1), EVEN)) == 2 + 3 + 3 + 3 + 3  # the dispatch ran beside the W
    assert exposed(run_queues(backward_jobs(1), EVEN)) == 2


def test_a_pair_by_hand():
    """One layer: combine(B) under ATTN(F), dispatch(F) under MLP(B, W), dispatch(B) under MLP(F), combine(F) under ATTN."""
    entries = {(e.name, e.part): (e.start, e.end) for e in run_queues(pair_jobs(1), EVEN)}
    assert entries["attention", "F"] == (0, 3) and entries["combine", "B"] == (0, 2)
    assert entries["mlp", "B"] == (3, 6) and entries["mlp", "W"] == (6, 9) and entries["dispatch", "F"] == (3, 5)
    assert entries["mlp", "F"] == (9, 12) and entries["dispatch", "B"] == (6, 8)
    assert entries["attention", "B"] == (12, 15) and entries["attention", "W"] == (15, 18)
    assert entries["combine", "F"] == (12, 14)
    assert span(run_queues(pair_jobs(1), EVEN)) == 18 == EVEN.computation


def test_jobs_hold_everything_once_and_in_an_order_that_data_allow():
    for layers in (1, 2, 5):
        jobs = pair_jobs(layers)
        keys = [(name, part, layer) for _, name, part, layer, _ in jobs]
        assert len(set(keys)) == len(keys) == 10 * layers
        both = {(n, p, k): need for _, n, p, k, need in forward_jobs(layers) + backward_jobs(layers)}
        for _, name, part, layer, need in jobs:
            assert need == both[name, part, layer] or part == "W"  # the same data as when each runs alone


def test_fitting_slots_hide_everything_and_less_computation_than_communication_cannot():
    generator = random.Random(0)
    fit = hidden = 0
    for _ in range(3000):
        times = drawn(generator)
        still = exposed(run_queues(pair_jobs(4), times))
        fit += times.fits()
        hidden += still == 0
        if times.fits():
            assert still == 0
        if times.communication > times.computation:
            assert still > 0
        assert span(run_queues(pair_jobs(4), times)) >= 4 * max(times.computation, times.communication)
    assert 100 < fit < hidden < 2900  # fitting is enough, not necessary


@pytest.mark.parametrize("name,slot", [("combine_b", "attention_f"), ("dispatch_f", "mlp_b"), ("dispatch_b", "mlp_f"),
                                       ("combine_f", "attention_b")])  # fmt: skip
def test_each_slot_is_the_limit_of_its_entry(name, slot):
    """All network entries 0 but one: it is hidden up to its slot and exposed by what is beyond, once a layer."""
    quiet = replace(EVEN, dispatch_f=0, combine_f=0, dispatch_b=0, combine_b=0)
    room = quiet.slots()[name][1]
    if name == "dispatch_b":
        room += quiet.mlp_w  # it may start when MLP(B) ends if the network has nothing else
    if name == "combine_b":
        assert exposed(run_queues(pair_jobs(1), replace(quiet, combine_b=room + 1))) == 1
        return  # in later layers it may start before its slot, beside ATTN(W)
    assert exposed(run_queues(pair_jobs(3), replace(quiet, **{name: room}))) == 0
    assert exposed(run_queues(pair_jobs(3), replace(quiet, **{name: room + 1}))) == (2 if name == "combine_f" else 3) + (
        name == "combine_f"
    )


def test_sms_are_paid_in_computation_and_give_bandwidth():
    times = EVEN.with_sms(20)
    assert times.mlp_f == pytest.approx(3 * 132 / 112) and times.dispatch_f == 2
    assert EVEN.with_sms(10).dispatch_f == 4 and EVEN.with_sms(40).combine_b == 2
    for sms in (0, 132):
        with pytest.raises(ValueError, match="sms must be 1 to 131"):
            EVEN.with_sms(sms)
    with pytest.raises(ValueError, match="mlp_b must be a time of at least 0, got -1"):
        replace(EVEN, mlp_b=-1)


def test_v3_by_hand():
    """4,096 tokens, the 671B config: the bytes and FLOPs written out."""
    times = v3_times()
    copies, t = 4 * 7 / 8, 4096
    assert times.dispatch_f == times.combine_b == pytest.approx(t * copies * (7168 + 56 * 4) / 50e9)
    assert times.combine_f == times.dispatch_b == pytest.approx(t * copies * 7168 * 2 / 50e9)
    mla = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    core = 2 * 128 * 320 * t * t / 2
    assert times.attention_f == pytest.approx(2 * t * mla / 800e12 + core / 500e12)
    assert times.mlp_f == pytest.approx(2 * t * 9 * 3 * 7168 * 2048 / 800e12) == times.mlp_b == times.mlp_w
    assert times.attention_b - times.attention_w == pytest.approx(2.5 * core / 500e12)
    forward = (times.attention_f + times.mlp_f) / (times.dispatch_f + times.combine_f)
    assert 1.1 < forward < 1.25  # V3: "approximately 1:1"


def test_nvlink_counts_when_it_is_the_slower():
    flat = v3_times(machine=Machine(nvlink=10e9))
    assert flat.dispatch_f == pytest.approx(4096 * 8 * 7 / 8 * (7168 + 224) / 10e9)
    wide = v3_times(config=ModelConfig.preset("v3").replace(topk_group=8))
    assert wide.dispatch_f == pytest.approx(2 * v3_times().dispatch_f)


def test_at_20_sms_v3_hides_everything_and_at_4_it_does_not():
    full = v3_times().with_sms(20)
    assert full.fits() and exposed(run_queues(pair_jobs(4), full)) == pytest.approx(0, abs=1e-12)
    assert exposed(run_queues(pair_jobs(4), v3_times().with_sms(4))) > 0.1


def test_a_stage_on_the_clock():
    """stage_times feeds simulate: pairs cost less than their parts, and DualPipe wins where communication is dear."""
    times = v3_times().with_sms(20)
    stage = stage_times(times, 4)
    assert set(stage) == {"f", "b", "w", "fb", "i"} and stage["i"] > stage["b"] - stage["w"]
    assert stage["fb"] < 0.85 * (stage["f"] + stage["b"])
    spans = {name: build_schedule(name, ranks=8, micro_batches=40).simulate(**stage).makespan
             for name in ("1f1b", "zb1p", "dualpipe")}  # fmt: skip
    assert spans["dualpipe"] < 0.85 * spans["zb1p"] < spans["1f1b"]
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        stage_times(times, 0)


def test_network_entries_never_overlap_and_neither_do_computations():
    entries = run_queues(pair_jobs(3), drawn(random.Random(3)))
    for queue in (NETWORK, "compute"):
        ordered = [SimpleNamespace(start=e.start, end=e.end) for e in entries if e.queue == queue]
        assert all(a.end <= b.start for a, b in zip(ordered, ordered[1:], strict=False))
