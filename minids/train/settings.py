"""The settings of a training run: a tree of dataclasses that tyro turns into the command line (docstrings = --help).

Everything is checked here, before any data is read: the error names the field, the value and what is allowed. The
defaults are the main job, `python -m minids train`: the toy preset on the sources of Python's standard library, under
two minutes of training on two CPU cores. The budget is counted in tokens, never in minutes: a run that stops by the
clock could not be repeated.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from minids.config import ModelConfig
from minids.data import DataConfig
from minids.fp8.recipe import RECIPES
from minids.model.balancer import parse_all
from minids.pipeline.schedules import NAMES
from minids.train.optim import OptimConfig
from minids.train.recipe import Recipe

# A resumed run may change these: they leave the sequence of weights and losses as it is (a pipeline or many ranks: but for
# the order of sums, and for what rows lose on expert_wire).
FREE_ON_RESUME = {"resume", "overwrite", "out", "name", "keep", "save_every", "prompts", "sample_tokens", "pipeline",
                  "pipeline_layers", "pipeline_chunks", "pipeline_ranks", "cuda_graph", "expert_parallel",
                  "expert_dispatch", "expert_wire"}
@dataclass
class RecipeConfig:
    """V3's schedule on a budget of `tokens`; see minids.train.recipe."""

    tokens: int = 500_000
    """Token budget of the run; every phase keeps V3's share of it."""
    sequence_length: int = 128
    """Tokens in a row (V3: 4096)."""
    batch: int = 8
    """Sequences in a global batch after the ramp (V3: 15360)."""
    batch_start: int | None = None
    """Sequences in the first batch; default a fifth of batch, as in V3 (with --pipeline: batch, no ramp)."""
    lr: float = 2e-3
    """Peak learning rate (V3: 2.2e-4; small models need more, and twice this is worse already)."""
    warmup_steps: int = 20
    """Steps of linear warm-up (V3: 2000)."""
    gamma: float = 1e-3
    """Step of the balancing bias; 0 switches balancing off (V3: 0.001)."""
    mtp_lambda: float = 0.3
    """Weight of the MTP loss; a third of it after two thirds of the tokens, as in V3 (0.3, then 0.1)."""

    def build(self) -> Recipe:
        """The schedule, validated."""
        return Recipe.scaled(self.tokens, sequence_length=self.sequence_length, batch=self.batch,
                             batch_start=self.batch_start, peak_lr=self.lr, warmup_steps=self.warmup_steps,
                             gamma=self.gamma, lambda_early=self.mtp_lambda, lambda_late=self.mtp_lambda / 3)


@dataclass
class TrainConfig:
    """Train a miniature DeepSeek-V3 on real text."""

    name: str = "toy"
    """Name of the run."""
    out: Path | None = None
    """Run folder; default runs/NAME."""
    preset: str = "toy"
    """toy, small, v2_lite, v3, or the path of a config.json."""
    model: tuple[str, ...] = ()
    """Model fields to change, as FIELD=JSON: --model hidden_size=256 num_nextn_predict_layers=0."""
    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    balance: tuple[str, ...] | None = None
    """Balancing strategies, each NAME or NAME:FIELD=VALUE,...; see minids.model.balancer. Default: V3's, bias and
    sequence (a router without a bias: sequence alone); none at all: --balance with nothing behind it."""
    seed: int = 0
    """Seeds the weights; the data has its own."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16-autocast", "bf16", "fp16"] = "auto"
    """fp32; bf16-autocast (FP32 weights, BF16 products); bf16 or fp16 weights with FP32 masters, fp16 with loss
    scaling. auto: fp32 on the CPU, bf16-autocast on CUDA."""
    fp8: Literal["none", "v3", "v3_ue8m0", "tensor", "no_promotion", "mx"] = "none"
    """Linears in FP8 by this recipe of minids.fp8.recipe (V3's: v3), with FP32 weights and gradients; the rest follows
    `precision`. Simulated where the device has no FP8 tensor cores."""
    micro_batch: int = 16
    """Sequences in one forward pass; a larger global batch is accumulated."""
    document_mask: bool = False
    """Keep attention, positions and labels inside a document (V3 pre-trains without)."""
    recompute: bool = False
    """Recompute each block's activations in the backward pass: less memory, a third more compute."""
    cuda_graph: bool = False
    """Record a micro-batch's work on the device once and replay it (minids.train.graph): for small models and FP8, where
    the host is the slower one. CUDA only."""
    pipeline: str | None = None
    """Train over the processes of torchrun in this schedule: gpipe, 1f1b, interleaved_1f1b, zb1p, zbv, dualpipe,
    dualpipe_v. micro_batch is then the most sequences in a micro-batch; see minids.pipeline.train."""
    pipeline_layers: tuple[int, ...] = ()
    """Layers of each pipeline stage, where they do not divide equally: --pipeline-layers 4 5 5 3."""
    pipeline_chunks: int | None = None
    """Stages a rank, for interleaved_1f1b alone (default 2)."""
    pipeline_ranks: int | None = None
    """Ranks of one pipeline, where --expert-parallel lays several side by side (default: processes / EP, which leaves one
    replica of the experts); see minids.parallel.expert_pipeline."""
    expert_parallel: int | None = None
    """Train over the processes of torchrun as data ranks, each layer's experts spread over groups of so many, optimizer
    state over all; see minids.parallel.train. micro_batch is then a rank's. With --pipeline data ranks are pipelines."""
    expert_dispatch: Literal["two_hop", "once", "flat"] = "two_hop"
    """A token's rows: one a node and then one a GPU, one a GPU, or one a choice; see minids.parallel.dispatch."""
    expert_wire: Literal["exact", "v3"] = "exact"
    """Rows on their way: as they are, or V3's FP8 there and BF16 back."""
    eval_every: int = 50
    """Steps between validation losses; 0 for none."""
    eval_rows: int = 32
    """Validation rows."""
    save_every: int = 100
    """Steps between checkpoints; one is always made at the end."""
    keep: int = 2
    """Checkpoints to keep."""
    max_skips: int = 10
    """Steps in a row that may be skipped for a loss or gradient that is not finite."""
    prompts: tuple[str, ...] = ()
    """What the sample at the end continues; default: three beginnings of Python code. The run writes sample.txt."""
    sample_tokens: int = 80
    """Tokens to generate for each prompt; 0 for no sample."""
    resume: bool = False
    """Continue the run in the folder, bit for bit."""
    overwrite: bool = False
    """Delete the run in the folder first."""

    def __post_init__(self) -> None:
        allowed = ("auto", "fp32", "bf16-autocast", "bf16", "fp16")
        if self.precision not in allowed:
            raise ValueError(f"precision = {self.precision!r}: must be one of {', '.join(allowed)}")
        if self.fp8 not in ("none", *RECIPES):
            raise ValueError(f"fp8 = {self.fp8!r}: must be none or one of {', '.join(RECIPES)}")
        if self.fp8 != "none" and self.precision in ("bf16", "fp16"):
            raise ValueError(f"precision = {self.precision!r} with fp8 = {self.fp8!r}: must be auto, fp32 or "
                             "bf16-autocast, since FP8 training updates FP32 weights")
        lows = {"micro_batch": 1, "eval_rows": 1, "save_every": 1, "keep": 1, "max_skips": 1, "eval_every": 0,
                "sample_tokens": 0, "seed": 0}
        for name, low in lows.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be at least {low}")
        if not self.name or "/" in self.name:
            raise ValueError(f"name = {self.name!r}: must be a folder name without '/'")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: the one continues the run, the other deletes it")
        self._check_device()
        if self.cuda_graph:
            self._check_graph()
        if self.pipeline is None and (self.pipeline_layers or self.pipeline_chunks):
            raise ValueError("pipeline_layers and pipeline_chunks need --pipeline NAME")
        if self.pipeline is not None and self.pipeline not in NAMES:
            raise ValueError(f"pipeline = {self.pipeline!r}: must be one of {', '.join(NAMES)}")
        if self.pipeline_ranks is not None and (self.pipeline is None or self.expert_parallel is None):
            raise ValueError(f"pipeline_ranks = {self.pipeline_ranks} needs --pipeline NAME and --expert-parallel EP (1: "
                             "replicas alone); without EP all processes are one pipeline")
        if self.pipeline_ranks is not None and self.pipeline_ranks < 2:
            raise ValueError(f"pipeline_ranks = {self.pipeline_ranks}: must be at least 2")
        if self.expert_parallel is not None or (self.expert_dispatch, self.expert_wire) != ("two_hop", "exact"):
            self._check_experts()
        self.recipe.build()
        parse_all(self.balance, self.model_config())

    def _check_device(self) -> None:
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device = {self.device!r}: must be cpu, cuda or cuda:N ({error})") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device = {self.device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device = {self.device!r}: must be cpu, cuda or cuda:N")

    def _check_experts(self) -> None:
        if self.expert_parallel is None:
            raise ValueError("expert_dispatch and expert_wire need --expert-parallel EP")
        if self.expert_parallel < 1:
            raise ValueError(f"expert_parallel = {self.expert_parallel}: must be at least 1")
        for name, allowed in (("expert_dispatch", ("two_hop", "once", "flat")), ("expert_wire", ("exact", "v3"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        if self.cuda_graph:
            raise ValueError(f"expert_parallel = {self.expert_parallel} with cuda_graph = True: must be one of the two")

    def _check_graph(self) -> None:
        if torch.device(self.device).type != "cuda":
            raise ValueError(f"cuda_graph = True with device = {self.device!r}: device must be cuda or cuda:N")
        others = {"recompute": (self.recompute, "recomputing saves the state of random numbers on the host"),
                  "precision": (self.precision == "fp16", "the loss scale of fp16 changes"),
                  "pipeline": (self.pipeline is not None, "stages wait for each other")}  # fmt: skip
        for name, (given, reason) in others.items():
            if given:
                raise ValueError(f"cuda_graph = True with {name} = {getattr(self, name)!r}: cannot be recorded, {reason}")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out) if self.out is not None else Path("runs") / self.name

    @property
    def resolved_precision(self) -> str:
        """`precision` with auto decided."""
        if self.precision != "auto":
            return self.precision
        return "bf16-autocast" if torch.device(self.device).type == "cuda" else "fp32"

    def model_config(self, vocab_size: int | None = None, bos: int | None = None,
                     eos: int | None = None) -> ModelConfig:
        """The preset (or file) with the overrides of `model` and the tokenizer's vocabulary, where it is known."""
        known = {"vocab_size": vocab_size, "bos_token_id": bos, "eos_token_id": eos}
        changes = {k: v for k, v in known.items() if v is not None} | dict(map(_assignment, self.model))
        base = (ModelConfig.from_json(self.preset) if self.preset.endswith(".json")
                else ModelConfig.preset(self.preset))
        config = base.replace(**changes)
        if self.recipe.sequence_length > config.max_position_embeddings:
            raise ValueError(f"recipe.sequence_length = {self.recipe.sequence_length}: must be at most the model's "
                             f"max_position_embeddings = {config.max_position_embeddings}")
        if vocab_size is not None and config.vocab_size < vocab_size:
            raise ValueError(f"model vocab_size = {config.vocab_size}: must be at least the tokenizer's {vocab_size}")
        return config

    def to_dict(self) -> dict:
        """Nested settings for run.json, paths as text."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def _assignment(text: str) -> tuple[str, object]:
    """FIELD=JSON -> (field, value); a bare word is a string."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"model = {text!r}: must be FIELD=VALUE, as in hidden_size=256")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
