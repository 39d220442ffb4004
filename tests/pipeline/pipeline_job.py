"""Run by test_runtime.py in a fresh process (which may be forked): every schedule, then variants, then broken ones, all on
one set of 4 gloo processes. Writes a JSON list of {case, ...the fields of check.Comparison}."""

import json
import sys
from dataclasses import asdict

import torch

from minids.bench.pipeline import all_stage_times
from minids.bench.pipeline_record import gather_rows, record
from minids.pipeline import messages, runtime
from minids.pipeline.check import LENGTH, batches, compare, tiny_config, train_config
from minids.pipeline.launch import start_local
from minids.pipeline.runtime import Pipeline, Placement
from minids.pipeline.schedules import NAMES
from minids.pipeline.stages import MicroBatch
from minids.pipeline.torch_engine import forward_then_backward

LAYERS = {"interleaved_1f1b": 8, "zbv": 8, "dualpipe_v": 8}
CPU = torch.device("cpu")
pairs: list[int] = []
hosted: list[int] = []


def counted_pair(action, context) -> None:
    pairs.append(action.sub_actions[0].microbatch_index)
    forward_then_backward(action, context)


def counted_host(tensor, group) -> bool:
    """As if gloo had to carry a GPU's tensor."""
    hosted.append(tensor.numel())
    return True


def variants() -> list[tuple[str, str, dict, dict]]:
    """(case, schedule, changes of the model, options of compare)"""
    found = [(name, name, {}, {}) for name in NAMES]
    found += [(f"float64 {name}", name, {}, {"dtype": torch.float64}) for name in ("dualpipe", "zbv")]
    found += [
        ("two MTP modules", "dualpipe", {"num_nextn_predict_layers": 2}, {}),
        ("no MTP", "zb1p", {"num_nextn_predict_layers": 0}, {}),
        ("tied head", "zb1p", {"tie_word_embeddings": True}, {}),
        ("MTP before the norm", "1f1b", {"mtp_hidden_norm": False}, {}),
        ("uneven layers", "dualpipe", {"num_hidden_layers": 7}, {"pipeline_layers": (1, 3, 2, 1)}),
        ("empty ends", "1f1b", {"num_hidden_layers": 5}, {"pipeline_layers": (0, 3, 2, 0)}),
        ("recompute", "dualpipe", {}, {"recompute": True}),
        ("own pair", "dualpipe", {}, {"overlap": counted_pair}),
        ("FP8 dualpipe", "dualpipe", {}, {"fp8": "v3"}),
        ("FP8 zb1p, an end without layers", "zb1p", {"num_hidden_layers": 6},
         {"fp8": "v3", "pipeline_layers": (0, 3, 2, 1)}),
        ("V2 router", "dualpipe", {"topk_method": "greedy", "scoring_func": "softmax"}, {}),
    ]
    return found


def broken() -> list[tuple[str, str, object, str, object]]:
    """(case, schedule, object, attribute, what it is replaced with): mistakes that the comparison must see."""
    real = MicroBatch.__init__

    def unweighted(self, tokens, labels, ids, label_share, row_share):
        real(self, tokens, labels, ids, torch.tensor(row_share), row_share)

    def one_direction(self, mtp_lambda, micro_batches, collect=Pipeline._collect):
        for (direction, _), stage in self.stages.items():
            if direction and stage.meter.sums:
                stage.meter.sums["load"] *= 0
        return collect(self, mtp_lambda, micro_batches)

    def not_converted(model, recipe):
        return model

    return [
        ("stages not in FP8", "dualpipe", runtime, "to_fp8", not_converted),
        ("micro-batches weighed alike", "gpipe", MicroBatch, "__init__", unweighted),
        ("mirror ranks not summed", "dualpipe", Pipeline, "_sum_shared", lambda self: None),
        ("MTP embedding not summed", "1f1b", Pipeline, "_sum_shared", lambda self: None),
        ("loads of one direction", "dualpipe", Pipeline, "_collect", one_direction),
        ("norm of one rank", "zbv", runtime.PipelineOptimizer, "total_norm", runtime.Optimizer.total_norm),
    ]


def stages_alone(name: str) -> dict:
    """Times each stage's F, B, I and W outside of a schedule, as the benchmark does; in the order, I then W, of ZB1P."""
    config = train_config(name, CPU)
    torch.manual_seed(0)
    pipeline = Pipeline(Placement.plan(config, tiny_config(LAYERS.get(name, 4)), 4), config, CPU)
    pipeline.compute_gradients(*batches(0, 97)[0], 0.3, 8)
    engine = pipeline.engine(8, 1, LENGTH)
    kept = sum(len(stage.kept_graphs) for stage in engine._stages)
    times = all_stage_times(pipeline, engine, 1)
    return {"case": f"stages of {name} alone", "times": times,
            "kept": kept + sum(len(stage.kept_graphs) for stage in engine._stages)}  # fmt: skip


def recorded(name: str) -> dict:
    """One step, action by action, as the benchmark records it."""
    config = train_config(name, CPU)
    torch.manual_seed(0)
    pipeline = Pipeline(Placement.plan(config, tiny_config(LAYERS.get(name, 4)), 4), config, CPU)
    engine, rows = pipeline.engine(8, 1, LENGTH), []
    run = engine.run
    engine.run = lambda: rows.extend(record(engine, run, CPU))
    pipeline.compute_gradients(*batches(0, 97)[0], 0.3, 8)
    return {"case": f"{name} recorded", "rows": gather_rows(rows, CPU)}


def work(rank: int, out: str) -> None:
    results = []

    def run(case, schedule, changes, options):
        changes = {"num_hidden_layers": LAYERS.get(schedule, 4)} | changes
        cfg = tiny_config(changes.pop("num_hidden_layers"), **changes)
        result = compare(schedule, cfg, CPU, **options)
        if result is not None:
            results.append({"case": case, "pairs": len(pairs), "hosted": len(hosted)} | asdict(result))

    for case in variants():
        run(*case)
    for case, schedule, target, name, value in broken():
        kept = getattr(target, name)
        setattr(target, name, value)
        run(case, schedule, {}, {"fp8": "v3"} if name == "to_fp8" else {})
        setattr(target, name, kept)
    kept, messages.through_host = messages.through_host, counted_host
    for name in ("dualpipe", "zbv"):
        run(f"{name} through the host", name, {}, {})
    messages.through_host = kept
    results.extend(stages_alone(name) for name in ("zb1p", "dualpipe_v"))
    results.extend(recorded(name) for name in ("zb1p", "dualpipe"))
    if rank == 0:
        with open(out, "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    start_local(work, 4, sys.argv[1])
