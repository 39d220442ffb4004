"""Which way of balancing costs the least loss? Every strategy, over a sweep of its coefficient, at equal compute.

Each run trains the same small model (3 MoE layers of 32 experts, top-4, sigmoid scores) on the same rows of code, prose
and tables (minids/experiments/domains.py) for the same number of steps; only the strategy differs, and the seed of the
weights and of the order of rows. What comes out of a run:

    valid           nats a token on held-out rows of each kind, with the plain top-K of inference, whatever was trained
    valid_as_trained   the same rows with the strategy at work: drops, and the future that expert choice has read
    maxvio_train    MaxVio of a training batch, mean of the last quarter of steps and of layers: what a step waits for
    maxvio_batch, maxvio_global   the same of validation batches, and of all of them together
    load            tokens each expert received from each kind of text: its specialisation (V3's figure 9)

The groups of runs: `sweep`, every strategy and coefficient (among them the gamma sweep of 2408.15664 and V3's Table 5);
`nodes`, the bias under a limit of 1 to 3 of 4 groups a token.

Results are lines of runs.jsonl in the output folder, one a finished run, written as it finishes: started again, the
command does only what is missing. When all are there it writes balance.json, and the figures where matplotlib is there.

Simplifications: 2 million parameters, a million tokens, one learning rate for all; no MTP.

Needs nothing but torch, tokenizers, safetensors and numpy: `python -m minids.experiments.balance --help`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from minids.experiments.domains import KINDS, build_domains
from minids.experiments.plan import LENGTH, VOCAB, BalanceConfig, Job, Settings, jobs_of, model_config, settings_of
from minids.model.balance import max_violation
from minids.model.balancer import Balancer, parse_all
from minids.model.load import LoadMeter
from minids.model.transformer import Transformer
from minids.train.optim import OptimConfig, Optimizer
from minids.train.recipe import Recipe

# ---- one run ----------------------------------------------------------------------------------------------------------


def autocast(device: str):
    """BF16 products on CUDA; the CPU computes in FP32."""
    return torch.autocast("cuda", torch.bfloat16, enabled=torch.device(device).type == "cuda")


@torch.no_grad()
def validate(model: Transformer, rows: torch.Tensor, batch: int, device: str) -> tuple[float, LoadMeter]:
    """Mean loss (nats a token) of rows (n, T + 1), and how they were routed."""
    meter, total = LoadMeter(model.cfg), 0.0
    for part in rows.split(batch):
        with autocast(device):
            out = model(part[:, :-1], labels=part[:, 1:])
        meter.add(out.routing)
        total += float(out.loss) * len(part)
    return total / len(rows), meter


def measure(model: Transformer, valid: dict[str, torch.Tensor], batch: int, device: str) -> dict:
    """What the module docstring lists of a trained model."""
    by_kind, load = {}, {}
    for kind, rows in valid.items():
        by_kind[kind], meter = validate(model.eval(), rows, batch, device)
        load[kind] = meter.load.tolist()
    # All kinds in one batch, as in training: MaxVio is a property of the mixture.
    mixed = torch.stack(list(valid.values()), 1).flatten(0, 1)
    _, meter = validate(model, mixed, batch, device)
    as_trained, _ = validate(model.train(), mixed, batch, device)
    found = {name: statistics.mean(value) for name, value in meter.read().items() if name not in ("load", "dropped")}
    return {"valid": by_kind, "valid_mean": statistics.mean(by_kind.values()), "valid_as_trained": as_trained,
            "maxvio_batch": found["max_violation_batch"], "maxvio_global": found["max_violation_global"], "load": load,
            **{name: found[name] for name in ("token_entropy", "load_entropy", "nodes_per_token")}}  # fmt: skip


def one_run(job: Job, settings: Settings, data: dict[str, np.ndarray], device: str) -> dict:
    """Train, and return everything that is kept of a run."""
    started = time.perf_counter()
    torch.manual_seed(job.seed)
    with torch.device(device):
        model = Transformer(model_config(settings, job.topk_group))
    balancer = Balancer.install(model, job.balance)
    optimizer = Optimizer(model, OptimConfig(), model.cfg.num_hidden_layers)
    tokens_a_step = settings.rows * LENGTH
    recipe = Recipe.scaled(settings.steps * tokens_a_step, sequence_length=LENGTH, batch=settings.rows,
                           batch_start=settings.rows, peak_lr=settings.lr, gamma=job.gamma,
                           warmup_steps=min(20, settings.steps // 5))
    train = torch.from_numpy(np.concatenate([data[f"train_{kind}"] for kind in KINDS])).to(device)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(job.seed)).to(device)
    tail, losses, violations = LoadMeter(model.cfg), [], []
    model.train()
    for step in range(settings.steps):
        index = torch.arange(step * settings.rows, (step + 1) * settings.rows, device=device) % len(train)
        rows = train[order[index]]
        with autocast(device):
            out = model(rows[:, :-1], labels=rows[:, 1:])
        (out.loss + balancer.loss(out.routing, len(rows))).backward()
        optimizer.accumulate()
        if not optimizer.step(recipe.lr((step + 1) * tokens_a_step)):
            raise RuntimeError(f"{job.key}: the gradient of step {step + 1} is not finite")
        loads = torch.stack([routing.received() for routing in out.routing])
        balancer.update(loads, recipe.gamma(step * tokens_a_step))
        losses.append(out.loss.detach())
        balanced = rows[:, 1:].numel() * model.cfg.num_experts_per_tok / model.cfg.n_routed_experts
        violations.append(max_violation(loads, balanced).mean())
        if step >= settings.steps * 3 // 4:
            tail.add(out.routing)
    found = tail.read()
    valid = {kind: torch.from_numpy(data[f"valid_{kind}"]).to(device) for kind in KINDS}
    every = max(1, settings.steps // 32)
    return {
        **dataclasses.asdict(job), "key": job.key, **measure(model, valid, settings.rows, device),
        "maxvio_train": statistics.mean(found["max_violation_batch"]),
        "dropped_share": statistics.mean(found["dropped_share"]),
        "experts_per_token": statistics.mean(found["experts_per_token"]),
        "bias_spread": max(float(gate.e_score_correction_bias.max() - gate.e_score_correction_bias.min())
                           for gate in model.routers()),
        "losses": torch.stack(losses).tolist()[every - 1 :: every],
        "violations": torch.stack(violations).tolist()[every - 1 :: every], "every": every,
        "seconds": time.perf_counter() - started,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
    }  # fmt: skip


_shared: dict = {}  # of a worker process: the data, read once


def start_worker(path: Path, settings: Settings, device: str) -> None:
    torch.set_num_threads(1)
    _shared.update(data=load_file(path), settings=settings, device=device)


def work(job: Job) -> dict:
    """A run, or what went wrong with it: one failed run must not lose the others."""
    try:
        return one_run(job, _shared["settings"], _shared["data"], _shared["device"])
    except Exception as error:  # whatever it is: reported at the end, with the exit status
        return {"key": job.key, "error": f"{type(error).__name__}: {error}"}


# ---- all runs ---------------------------------------------------------------------------------------------------------


def read_lines(path: Path, header: dict) -> list[dict]:
    """Finished runs of an earlier start. A torn last line is cut off. Raises ValueError if it was another experiment."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        os.truncate(path, len(whole.encode()))
    lines = [json.loads(line) for line in whole.splitlines()]
    if lines and lines[0] != header:
        raise ValueError(f"{path} holds runs of other settings ({lines[0]}, now {header}): give another --out or delete it")
    return lines[1:]


def append_line(path: Path, values: dict) -> None:
    """One write of one line, on the disk when it returns."""
    with open(path, "ab", buffering=0) as file:
        file.write((json.dumps(values) + "\n").encode())
        os.fsync(file.fileno())


def rounded(value, digits: int = 5):
    """Floats cut to what means anything, through lists and dicts."""
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v, digits) for v in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def sweep(config: BalanceConfig, settings: Settings, todo: list[Job], path: Path, tokens: Path) -> list[dict]:
    """Do the runs, write each as it finishes; returns those that failed."""
    failed, started = [], time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(config.workers, len(todo)), start_worker, (tokens, settings, config.device)) as pool:
        for count, found in enumerate(pool.imap_unordered(work, todo), start=1):
            if "error" in found:
                failed.append(found)
            else:
                append_line(path, rounded(found))
            outcome = found.get("error") or f"valid {found['valid_mean']:.4f}  MaxVio {found['maxvio_train']:.3f}"
            seconds = time.perf_counter() - started
            print(f"{count}/{len(todo)}  {seconds:.0f} s  {found['key']}  {outcome}", flush=True)
            if 0 < config.minutes * 60 < seconds:
                print(f"{config.minutes:g} minutes are over, {len(todo) - count} runs are left for later", flush=True)
                break
    return failed


def describe(config: BalanceConfig) -> dict:
    """How the data came about: command, versions, device."""
    device = torch.cuda.get_device_name() if torch.device(config.device).type == "cuda" else f"CPU, {platform.machine()}"
    flags = ["--quick"] if config.quick else [f"--seeds {config.seeds} --steps {config.steps} --rows {config.rows}"]
    flags += [f"--only '{config.only}'"] if config.only else []
    command = " ".join(["python -m minids experiment balance", *flags, f"--device {torch.device(config.device).type}"])
    return {"command": command, "python": platform.python_version(), "torch": torch.__version__, "device": device}


def run(config: BalanceConfig) -> dict:
    """The whole experiment, or what is left of it; returns what balance.json holds. Raises ValueError for settings that
    cannot work, RuntimeError if runs failed (the others are kept)."""
    if config.draw_only:
        return show(json.loads((config.out / "balance.json").read_text(encoding="utf-8")), config.out)
    settings, jobs = settings_of(config), jobs_of(config)
    for job in jobs:
        parse_all(job.balance, model_config(settings, job.topk_group))
    config.out.mkdir(parents=True, exist_ok=True)
    path, tokens, failed = config.out / "runs.jsonl", config.out / "tokens.safetensors", []
    header = json.loads(json.dumps({"settings": dataclasses.asdict(settings)}))
    finished = read_lines(path, header)
    done = {line["key"] for line in finished}
    todo = [job for job in jobs if job.key not in done]
    if todo:
        domains = build_domains(LENGTH, VOCAB, settings.characters)
        parts = {"train": domains.train, "valid": domains.valid}
        save_file({f"{part}_{kind}": rows[kind] for part, rows in parts.items() for kind in KINDS}, tokens)
        if not path.exists() or not path.stat().st_size:
            append_line(path, header)
        write_atomic(config.out / "origin.json", json.dumps({**describe(config), "text": domains.counts}) + "\n")
        print(f"{len(todo)} runs to do of {len(jobs)}; text: {domains.counts}", flush=True)
        failed = sweep(config, settings, todo, path, tokens)
        tokens.unlink()
        finished = read_lines(path, header)
    order = {job.key: place for place, job in enumerate(jobs)}
    runs = sorted((line for line in finished if line["key"] in order), key=lambda line: order[line["key"]])
    origin = json.loads((config.out / "origin.json").read_text(encoding="utf-8"))
    result = {**origin, **header, "runs": runs}
    write_atomic(config.out / "balance.json", json.dumps(result) + "\n")
    show(result, config.out)
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed, the others are in {path}; the first: {failed[0]}")
    return result


def show(result: dict, out: Path) -> dict:
    """Print the table, draw the figures into ``out``."""
    print(table(result["runs"]))
    draw(result, out)
    return result


def table(runs: list[dict]) -> str:
    """Mean and standard deviation over seeds of each strategy and coefficient, as Markdown."""
    groups: dict[tuple, list[dict]] = {}
    for line in runs:
        groups.setdefault((line["group"], line["name"], line["coefficient"], line["topk_group"]), []).append(line)
    lines = ["| strategy | coefficient | groups | valid | as trained | MaxVio train | MaxVio global | dropped |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (_, name, coefficient, limit), found in groups.items():
        cells = [name, "-" if coefficient is None else f"{coefficient:g}", f"{limit} of 4"]
        for field in ("valid_mean", "valid_as_trained", "maxvio_train", "maxvio_global", "dropped_share"):
            values = [line[field] for line in found if line[field] is not None]
            if not values:
                cells.append("-")
                continue
            spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(result: dict, out: Path) -> None:
    """The figures, where matplotlib is installed."""
    try:
        from minids.plots import balance as plots
    except ImportError as error:
        print(f"no figures: {error}; with matplotlib, the same command draws them from {out / 'balance.json'}")
        return
    for name in ("pareto", "loss_by_kind", "gamma_sweep", "specialisation", "node_limit"):
        try:
            figure = getattr(plots, name)(result)
        except plots.NothingToDraw as missing:  # an unfinished experiment
            print(f"no {name}.png: {missing}")
            continue
        temporary = out / f"{name}.png.tmp"
        figure.savefig(temporary, format="png")
        os.replace(temporary, out / f"{name}.png")


def main() -> None:
    """The same as `python -m minids experiment balance`, without tyro."""
    parser = argparse.ArgumentParser(prog="python -m minids.experiments.balance", description=BalanceConfig.__doc__)
    for field in dataclasses.fields(BalanceConfig):
        flag = "--" + field.name.replace("_", "-")
        if field.default is False:
            parser.add_argument(flag, action="store_true")
        else:
            kind = Path if field.name == "out" else type(field.default)
            parser.add_argument(flag, type=kind, default=field.default, help=f"default {field.default}")
    try:
        run(BalanceConfig(**vars(parser.parse_args())))
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
