"""Does FP8 training follow BF16? One model, seed and order of rows, trained in several precisions [V3 3.3 and B.1].

    bf16          BF16 products (autocast), FP32 weights and gradients: what the others are compared with
    bf16_split    the same, gradients summed over twice as many micro-batches: other roundings, nothing else. Whatever it
                  differs by is what any change of the last bits grows to, and not a cost of FP8
    fp32          FP32 products
    v3, v3_ue8m0, tensor, no_promotion, mx      the recipes of minids/fp8/recipe.py

Every variant has BF16 moments. The figure is V3's: the relative difference of two loss curves, each an exponential moving
average over steps with coefficient 0.9,

    d_t = EMA_t(loss of the variant) / EMA_t(loss of bf16) - 1,     V3: |d_t| < 0.25% throughout, over a trillion tokens

of which the table gives the largest |d_t| and the mean of d_t, over the steps after the first tenth. (There the loss falls
so steeply that a shift of a fraction of a step is a percent.) `valid` is held-out text, in nats a token; with --evals
it is measured on the way too, on the same rows each time: a difference without the batch's own noise. `valid_bf16` is
what the FP8 variant's weights give when BF16 products read them.

|d_t| of bf16_split is the noise floor: two runs that compute the same differ by that much. A variant that stays inside
cannot be told from BF16 by this run; a floor above 0.25% would mean that the run says nothing about V3's claim.

A variant is a file, written when it is finished, and while it runs every 50 steps; started again, the command does what is
missing. Processes may share a folder, a variant each: `--variants v3 --device cuda:0`. `--minutes` ends a variant early:
its curve is compared as far as it goes, since schedule and rows do not depend on when it ends.

Simplifications: a small model and millions of tokens, not 16 billion and a trillion.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minids.data import DataConfig
from minids.experiments.balance import rounded, write_atomic
from minids.fp8.recipe import RECIPES
from minids.train.optim import OptimConfig
from minids.train.settings import RecipeConfig, TrainConfig
from minids.train.step import validation_loss
from minids.train.trainer import Trainer, new_model

BASE = "bf16"
VARIANTS = (BASE, "bf16_split", "fp32", *RECIPES)
EMA = 0.9  # V3 appendix B.1
CLAIM = 0.0025  # V3 section 3.3
SETTLED = 0.1  # share of the steps before which curves are not compared


@dataclass
class Fp8Config:
    """Train one model in BF16, in V3's FP8 and in other FP8s, and compare their losses."""

    out: Path = Path("runs/fp8")
    """Folder for VARIANT.json, fp8.json and the figures; those of the course are in figures/fp8."""
    variants: tuple[str, ...] = VARIANTS
    """Which to train: bf16, bf16_split, fp32, v3, v3_ue8m0, tensor, no_promotion, mx."""
    preset: str = "toy"
    """toy, small, or the path of a config.json."""
    model: tuple[str, ...] = ()
    """Model fields to change, as FIELD=JSON."""
    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig = field(default_factory=lambda: RecipeConfig(tokens=300_000, batch=16))
    """The schedule; --recipe.tokens is the budget of each variant."""
    seed: int = 0
    """Of the weights."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    micro_batch: int = 16
    """Sequences in one forward pass."""
    evals: int = 0
    """Held-out losses at so many equally spaced points of the run, the last one at its end; 0: at its end alone."""
    minutes: float = 0.0
    """End a variant after so many minutes of training; 0: never."""
    draw_only: bool = False
    """Train nothing: read the variants in the folder, print the table, draw the figures."""

    def __post_init__(self) -> None:
        unknown = [v for v in self.variants if v not in VARIANTS]
        if unknown or not self.variants:
            raise ValueError(f"variants = {self.variants!r}: must be some of {', '.join(VARIANTS)}")
        for name in ("evals", "minutes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be at least 0")
        if "bf16_split" in self.variants and self.micro_batch < 2:
            raise ValueError(f"micro_batch = {self.micro_batch!r} with bf16_split: must be at least 2")
        with tempfile.TemporaryDirectory() as folder:
            train_config(self, BASE, Path(folder))  # checks all other settings


def train_config(config: Fp8Config, variant: str, folder: Path) -> TrainConfig:
    """The run's configuration: the same for all but precision, and the split of `bf16_split`."""
    return TrainConfig(
        out=folder / variant, preset=config.preset, model=config.model, data=config.data, recipe=config.recipe,
        optim=OptimConfig(moments="bf16"), seed=config.seed, device=config.device,
        precision="fp32" if variant == "fp32" else "bf16-autocast", fp8=variant if variant in RECIPES else "none",
        micro_batch=config.micro_batch // 2 if variant == "bf16_split" else config.micro_batch, eval_rows=256,
    )  # fmt: skip


# ---- one variant ------------------------------------------------------------------------------------------------------


def one_variant(config: Fp8Config, variant: str, folder: Path, path: Path, origin: dict) -> dict:
    """Train it; `path` holds the curve so far."""
    trainer = Trainer.start(train_config(config, variant, folder))
    recipe, losses, curve, begin = trainer.config.recipe.build(), [], [], time.perf_counter()

    def write(**rest) -> dict:
        found = {**origin, "variant": variant, "finished": False, **rest, "valid_curve": curve, "losses": losses}
        write_atomic(path, json.dumps(rounded(found, 7)) + "\n")
        return found

    while recipe.next_batch(trainer.progress.tokens):
        losses.append(trainer.step()["loss"])
        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"{variant}: the loss of step {len(losses)} is {losses[-1]}")
        share = trainer.progress.tokens / recipe.total_tokens
        if len(curve) + 1 < config.evals and share * config.evals >= len(curve) + 1:
            curve.append([len(losses), held_out(trainer)])
        seconds = time.perf_counter() - begin
        if len(losses) in (1, 10) or len(losses) % 50 == 0:
            speed = len(losses) / seconds
            print(f"{variant}  step {len(losses)}  loss {losses[-1]:.4f}  {speed:.3f} steps/s", flush=True)
            write()
        if 0 < config.minutes * 60 < seconds:
            break
    trainer.log.close()
    curve.append([len(losses), held_out(trainer)])
    return write(finished=True, tokens=trainer.progress.tokens, seconds=seconds, steps_per_second=len(losses) / seconds,
                 skipped=trainer.progress.skipped, valid=curve[-1][1], peak_gib=peak_gib(config.device),
                 **({"valid_bf16": held_out_in_bf16(trainer)} if variant in RECIPES else {}))  # fmt: skip


def held_out(trainer: Trainer) -> float:
    """Loss of the first 256 held-out rows, in the variant's own precision."""
    return validation_loss(trainer.model, trainer.data.valid, trainer.config)


@torch.no_grad()
def held_out_in_bf16(trainer: Trainer) -> float:
    """The same weights' loss of the same rows with BF16 products: what FP8 did to the weights, without what its rounding
    does to a forward pass."""
    config = dataclasses.replace(trainer.config, fp8="none")
    twin = new_model(config, trainer.data)
    twin.load_state_dict(trainer.model.state_dict())
    return validation_loss(twin, trainer.data.valid, config)


def peak_gib(device: str) -> float | None:
    """The most memory a CUDA device has held; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if torch.device(device).type == "cuda" else None


def origin_of(config: Fp8Config) -> dict:
    """What must agree between variants of a folder, and where they were trained."""
    settings = {name: getattr(config, name) for name in ("preset", "model", "seed", "micro_batch")}
    settings |= {name: dataclasses.asdict(getattr(config, name)) for name in ("data", "recipe")}
    settings["data"].pop("cache_dir")
    cuda = torch.device(config.device).type == "cuda"
    return {"settings": json.loads(json.dumps(settings)), "torch": torch.__version__.split("+")[0],
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(config.device) if cuda else f"CPU, {platform.machine()}"}  # fmt: skip


# ---- all variants -----------------------------------------------------------------------------------------------------


def read_variants(out: Path) -> dict[str, dict]:
    """Those in the folder, finished or not, in the order of the table. Raises ValueError if they are of two experiments."""
    paths = {v: out / f"{v}.json" for v in VARIANTS}
    found = {v: json.loads(path.read_text(encoding="utf-8")) for v, path in paths.items() if path.exists()}
    kinds = {json.dumps(run["settings"], sort_keys=True) for run in found.values()}
    if len(kinds) > 1:
        raise ValueError(f"{out} holds variants of different settings ({', '.join(found)}): give another --out or "
                         "delete them")  # fmt: skip
    return found


def run(config: Fp8Config) -> dict:
    """The experiment, or what is left of it; returns what fp8.json holds."""
    config.out.mkdir(parents=True, exist_ok=True)
    if not config.draw_only:
        there, origin = read_variants(config.out), origin_of(config)
        for run in there.values():
            if run["settings"] != origin["settings"]:
                raise ValueError(f"{config.out} holds variants of other settings ({run['settings']}, now "
                                 f"{origin['settings']}): give another --out or delete them")  # fmt: skip
        todo = [v for v in config.variants if not there.get(v, {}).get("finished")]
        with tempfile.TemporaryDirectory() as folder:
            for variant in todo:
                found = one_variant(config, variant, Path(folder), config.out / f"{variant}.json", origin)
                print(f"{variant}  {len(found['losses'])} steps in {found['seconds']:.0f} s, "
                      f"{found['steps_per_second']:.3f} steps/s, valid {found['valid']:.4f}", flush=True)
    return show(read_variants(config.out), config.out)


def show(variants: dict[str, dict], out: Path) -> dict:
    """Compare with bf16, as far as both go; print the table, write fp8.json, draw the figures."""
    result = {"ema": EMA, "claim": CLAIM, "settled": SETTLED, "variants": variants}
    if BASE in variants:
        base = variants[BASE]["losses"]
        result["differences"] = {v: compare(base, run["losses"]) | {"valid": compare_valid(variants[BASE], run)}
                                 for v, run in variants.items() if v != BASE}  # fmt: skip
        print(table(result))
        write_atomic(out / "fp8.json", json.dumps(rounded(result, 7)) + "\n")
        draw(result, out)
    return result


def smooth(losses: list[float], coefficient: float = EMA) -> list[float]:
    """The exponential moving average, started at the first loss."""
    found = []
    for loss in losses:
        found.append(loss if not found else coefficient * found[-1] + (1 - coefficient) * loss)
    return found


def compare(base: list[float], losses: list[float]) -> dict:
    """d_t of the module docstring, as far as both curves go, and what the table says of it."""
    curve = [ours / theirs - 1 for ours, theirs in zip(smooth(losses), smooth(base), strict=False)]
    start = min(int(SETTLED * len(base)), len(curve) - 1)
    settled = curve[start:]
    return {"curve": curve, "start": start, "largest": max(map(abs, settled)), "mean": sum(settled) / len(settled),
            "last": curve[-1]}  # fmt: skip


def compare_valid(base: dict, run: dict) -> list[list[float]]:
    """[step, relative difference of the held-out loss] where both were measured after the same step."""
    theirs = dict(base.get("valid_curve", []))
    return [[step, ours / theirs[step] - 1] for step, ours in run.get("valid_curve", []) if step in theirs]


def table(result: dict) -> str:
    """Markdown: differences in percent of the loss of bf16."""
    lines = ["| variant | steps | steps/s | valid | valid, % | largest \\|d\\|, % | mean d, % | last d, % | < 0.25% |",
             "|---|--:|--:|--:|--:|--:|--:|--:|---|"]  # fmt: skip
    for name, run in result["variants"].items():
        found = result["differences"].get(name)
        cells = [name, str(len(run["losses"])), f"{run['steps_per_second']:.3f}" if run["finished"] else "unfinished",
                 f"{run['valid']:.4f}" if run["finished"] else "-"]  # fmt: skip
        if found:
            base = result["variants"][BASE]
            both = run["finished"] and base["finished"] and len(run["losses"]) == len(base["losses"])
            cells += [f"{100 * (run['valid'] / base['valid'] - 1):+.3f}" if both else "-", f"{100 * found['largest']:.3f}",
                      f"{100 * found['mean']:+.3f}", f"{100 * found['last']:+.3f}",
                      "yes" if found["largest"] < CLAIM else "no"]  # fmt: skip
        lines.append("| " + " | ".join(cells + ["-"] * (9 - len(cells))) + " |")
    return "\n".join(lines)


def draw(result: dict, out: Path) -> None:
    """The figure, where matplotlib is installed."""
    try:
        from minids.plots.fp8_training import loss_differences
    except ImportError as error:
        print(f"no figure: {error}; with matplotlib, --draw-only draws it")
        return
    temporary = out / "loss_differences.png.tmp"
    loss_differences(result).savefig(temporary, format="png")
    os.replace(temporary, out / "loss_differences.png")
