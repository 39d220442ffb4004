"""The planner against the papers' numbers, a program written from the formula, and tensors that exist."""

import pytest
import torch

from minids import ModelConfig
from minids.parallel import planner
from minids.parallel.mesh import Layout
from minids.parallel.planner import (
    LayerWires,
    Parameters,
    Ratio,
    ServingUnit,
    decode_limit,
    layer_times,
    report,
    serving_report,
    training_memory,
)
from minids.pipeline.chunk import v3_times
from minids.pipeline.stages import model_on_meta

V3 = ModelConfig.preset("v3")
GB = 1e9


@pytest.mark.parametrize("preset", ["toy", "v3"])
def test_parameters_are_those_of_the_model(preset):
    cfg = ModelConfig.preset(preset)
    found = Parameters.of(cfg)
    sizes = {name: p.numel() for name, p in model_on_meta(cfg, torch.float32).named_parameters()}
    experts = sum(n for name, n in sizes.items() if ".experts." in name)
    low = sum(n for name, n in sizes.items() if name.endswith("_proj.weight") or "kv_a_proj" in name)
    low -= sum(n for name, n in sizes.items() if "eh_proj" in name)
    assert found.experts == experts and found.fp8 == low
    count = cfg.count()
    assert found.experts + found.dense == count["main"] + count["mtp"]  # with the balancing bias, which is no parameter


def test_v3_in_numbers():
    p = Parameters.of(V3)
    assert p.experts + p.dense == 671_026_419_200 + 11_610_068_224
    assert p.experts == 59 * 256 * 3 * 7168 * 2048


def test_memory_of_v3_by_hand_and_within_80_gb():
    p, memory = Parameters.of(V3), training_memory(V3, Layout.v3())
    here, dense = p.experts / 1024, p.dense / 16  # 16 stages, 64 ranks a group
    assert memory.expert_weights == 2 * here  # DualPipe's two copies, a byte each
    assert memory.dense_weights == 2 * (p.fp8 + 2 * p.others) / 16
    assert memory.gradients == 2 * 4 * (here + dense)
    assert memory.master == 4 * (here / 2 + dense / 128) and memory.moments == memory.master  # two BF16 are one FP32
    token = 2 * 14336 + 2 * (1536 + 576) + (1.5 * 16384 + 512) + (4096 + 128) + 8 * (4096 + 128 + 10) + 8 * 7392
    assert planner.activation_bytes(V3) == token
    assert memory.activations == 17 * 62 / 16 * 4096 * token  # PP + 1 micro-batches
    assert memory.total == pytest.approx(62.2 * GB, rel=1e-3) and memory.total < 80 * GB


def test_without_zero_or_expert_parallelism_it_would_not_fit():
    one = training_memory(V3, Layout(2048, ep=1, pp=16))
    assert one.expert_weights == 64 * training_memory(V3, Layout.v3()).expert_weights and one.total > 80 * GB
    alone = training_memory(V3, Layout(16, pp=16), copies=1)
    p = Parameters.of(V3)
    assert alone.master + alone.moments == 8 * (p.experts + p.dense) / 16  # one data rank: nothing to share


def test_memory_of_sliced_state_is_what_the_optimizer_holds():
    """Masters and moments of ZeRO-1 on threads, in bytes that exist."""
    from minids.parallel.experts import shard_experts
    from minids.parallel.mesh import run_on_threads
    from minids.parallel.zero import ZeroOptimizer
    from minids.pipeline.check import tiny_config
    from minids.train.optim import OptimConfig

    cfg, layout = tiny_config(3), Layout(4, 2)
    models = [model_on_meta(cfg, torch.float32).to_empty(device="cpu") for _ in range(4)]

    def work(mesh):
        model = shard_experts(models[mesh.rank], mesh)
        for p in model.parameters():
            p.data.zero_()
            p.grad = torch.zeros_like(p)
        optimizer = ZeroOptimizer(model, OptimConfig(moments="bf16"), mesh=mesh)
        optimizer.step(0.1)
        states = optimizer.adamw.state.values()
        return (sum(m.nbytes for m in optimizer.masters.values()),
                sum(state[key].nbytes for state in states for key in ("exp_avg", "exp_avg_sq")))  # fmt: skip

    memory, p = training_memory(cfg, layout), Parameters.of(cfg)
    assert memory.gradients == 4 * (p.experts / 2 + p.dense)  # no pipeline, no second copy
    bias = 3 * 8 / 4  # the planner counts the balancing bias as a parameter
    for master, moments in run_on_threads(layout, work):
        assert memory.master - 4 * bias <= master <= memory.master + 4 * 8  # filled up to the ranks
        assert memory.moments - 4 * bias <= moments <= memory.moments + 4 * 8


def test_wires_of_v3():
    """[V3 3.2.2] at most 4 nodes a token; 3.2 experts a node for 160 GB/s beside 50."""
    wires = LayerWires.of(V3, Layout.v3())
    assert (wires.nodes, wires.gpus, wires.dispatch, wires.combine) == (3.5, 7.0, 7168 + 56 * 4, 2 * 7168)
    assert wires.ib_bytes == 3.5 * 21728 and wires.nvlink_bytes == 7 * 21728
    times = layer_times(V3, Layout.v3())
    assert times == v3_times() and times.dispatch_f == pytest.approx(4096 * 3.5 * 7392 / 50e9)
    assert times.dispatch_f + times.combine_f == pytest.approx(4096 * wires.ib_bytes / 50e9)
    assert wires.ib_bytes / 50e9 > wires.nvlink_bytes / 160e9  # InfiniBand is the slower one
    ratio = Ratio.of(times)
    assert 0.8 < ratio.forward < 1.2 and 0.5 < ratio.both < 1  # V3: about 1:1


def test_serving_units():
    """[V3 3.4.1, 3.4.2]"""
    prefill, decode = ServingUnit.prefill(), ServingUnit.decode()
    assert (prefill.gpus, prefill.tp, prefill.dp, prefill.slots, prefill.experts_per_gpu) == (32, 4, 8, 288, 9)
    assert (decode.gpus, decode.tp, decode.dp, decode.experts_per_gpu, decode.other_gpus) == (320, 4, 80, 1, 64)
    expert = 58 * 3 * 7168 * 2048  # bytes of one expert of all layers in FP8
    assert prefill.weight_bytes(V3) - decode.weight_bytes(V3) == 8 * expert
    assert prefill.weight_bytes(V3) < 80 * GB


def test_the_end_of_decoding_speed():
    """[2505.09343 2.3.2]"""
    once, each, speed = decode_limit()
    assert round(once * 1e6, 2) == 120.96
    assert round(each * 1e3, 2) == 14.76
    assert int(speed) == 67
    once, each, speed = decode_limit(bandwidth=900e9)  # GB200 NVL72
    assert round(once * 1e6, 2) == 6.72 and round(each * 1e3, 2) == 0.82 and 1190 < speed < 1225


def test_the_command_prints_the_plan(capsys):
    planner.main([])
    text = capsys.readouterr().out
    assert text == report(V3, Layout.v3()) + "\n\n" + serving_report(V3) + "\n"
    for part in ("2048 GPUs = PP 16 x DP 128; EP 64 over 8 nodes, 2 replicas, 4 experts a layer and GPU", "120.96 us",
                 "14.76 ms", "at most 67 tokens", "9 experts a GPU", "64 for redundant", "62.21"):  # fmt: skip
        assert part in text, part


def test_the_command_refuses_what_does_not_divide(capsys):
    with pytest.raises(SystemExit) as stopped:
        planner.main(["--pp", "3"])
    assert stopped.value.code == 2 and "pp=3: allowed are divisors of world=2048" in capsys.readouterr().err


@pytest.mark.parametrize("call, message", [
    (lambda: training_memory(V3, Layout.v3(), tokens=0), "tokens=0: allowed is an integer of at least 1"),
    (lambda: training_memory(V3, Layout(24, 24)), "ep=24: allowed are divisors of n_experts=256"),
    (lambda: ServingUnit(gpus=30, tp=4, redundant=0), "tp=4: allowed are divisors of gpus=30"),
    (lambda: ServingUnit(gpus=32, tp=4, redundant=31), "redundant=31: allowed are numbers from 0 up"),
    (lambda: decode_limit(bandwidth=0), "bandwidth=0: allowed are numbers above 0"),
])  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
