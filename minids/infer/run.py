"""`python -m minids generate`: a checkpoint and a prompt in, text on the terminal.

One prompt streams, whole characters as they come (text.py); several are written as one batch and printed at the end. What
it cost, and what speculation gained, goes to stderr.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TextIO

import torch
from tyro.constructors import PrimitiveConstructorSpec

from minids.checkpoint import is_checkpoint, load
from minids.data.tokenizer import BytePairTokenizer
from minids.folder import restore_interrupted
from minids.infer.generate import generate
from minids.infer.sampling import check_sampling, check_seed
from minids.infer.speculate import SpeculationStats, check_speculate
from minids.infer.text import TextStream, check_stop
from minids.model.check import check_device
from minids.train.state import latest_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# --speculate alone: all drafts that the model can make; --speculate N: N.
DraftCount = Annotated[int | bool, PrimitiveConstructorSpec(
    nargs="*", metavar="[N]", instance_from_str=lambda words: read_draft_count(words),
    is_instance=lambda value: isinstance(value, int), str_from_instance=lambda value: [str(int(value))],
)]  # fmt: skip


@dataclass(frozen=True)
class GenerateConfig:
    """Write text with a trained model."""

    checkpoint: Path
    """Folder of a checkpoint (config.json, safetensors, tokenizer.json) or of a training run (its latest checkpoint)."""
    prompt: tuple[str, ...] = ()
    """Text to continue; several prompts run as one batch."""
    prompt_file: Path | None = None
    """A UTF-8 text file whose whole content is one more prompt."""
    max_new_tokens: int = 200
    """How many tokens to write at most."""
    temperature: float = 0.8
    """0 always takes the most probable token; 1 samples from the model's own distribution."""
    top_p: float = 0.95
    """Sample from the smallest set of most probable tokens with at least this mass; 1 keeps all."""
    seed: int = 0
    """Seed of the first prompt; prompt r uses seed + r."""
    stop: tuple[str, ...] = ()
    """End a text before the first of these strings."""
    speculate: DraftCount = 0
    """Draft N tokens a step with the MTP modules, and let the model check them; without N as many as it has modules."""
    device: str = "cpu"
    """Where to run: cpu, cuda, cuda:1, ..."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of weights and arithmetic; auto keeps the checkpoint's."""


def run_generate(config: GenerateConfig, out: TextIO | None = None) -> list[str]:
    """Load, generate and print to `out` (default stdout): one prompt streams, several are printed at the end.

    Speed goes to stderr. Returns the new text of each prompt. Raises ValueError or FileNotFoundError before loading for
    bad input.
    """
    out = out or sys.stdout
    if config.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {config.max_new_tokens}")
    check_sampling(config.temperature, config.top_p)
    check_seed(config.seed)
    check_stop(config.stop)
    device = check_device(config.device)
    texts = read_prompts(config)
    folder = resolve_checkpoint(config.checkpoint)
    tokenizer = BytePairTokenizer.load(find_tokenizer(folder))
    model = load(folder, dtype=DTYPES.get(config.dtype), device=device)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]

    n_drafts = check_speculate(config.speculate, model)
    streams = [TextStream(tokenizer, config.stop) for _ in prompts]
    written, streaming, stats = [""] * len(prompts), len(prompts) == 1, SpeculationStats()

    def take(row: int, piece: str) -> None:
        written[row] += piece
        if streaming:
            print(piece, end="", flush=True, file=out)

    def show(row: int, token: int) -> bool:
        if token != tokenizer.eos_id:
            take(row, streams[row].push(token))
        return streams[row].stopped

    if streaming:
        print(texts[0], end="", flush=True, file=out)
    start = time.perf_counter()
    new_tokens = generate(
        model, prompts, config.max_new_tokens, temperature=config.temperature, top_p=config.top_p, seed=config.seed,
        eos_token_id=tokenizer.eos_id, on_token=show, speculate=n_drafts, stats=stats,
    )  # fmt: skip
    seconds = time.perf_counter() - start

    for row, stream in enumerate(streams):
        take(row, stream.flush())
    if streaming:
        print(file=out, flush=True)
    else:
        print_all(texts, written, out)
    count = sum(len(row) for row in new_tokens)
    print(f"{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tokens/s (prefill included)", file=sys.stderr)
    if n_drafts:
        print(f"speculation with {n_drafts} draft{'s' * (n_drafts > 1)} a step: {stats}", file=sys.stderr)
    return written


def read_draft_count(words: list[str]) -> int | bool:
    """The words after --speculate: none is True, else one number."""
    if len(words) > 1:
        raise ValueError(f"--speculate takes one number at most, got {' '.join(words)}")
    return int(words[0]) if words else True


def print_all(texts: list[str], written: list[str], out: TextIO) -> None:
    """Several prompts and their continuations, each under a numbered rule."""
    for row, (text, new) in enumerate(zip(texts, written, strict=True)):
        print(f"--- prompt {row + 1} of {len(texts)} ---\n{text}{new}\n", file=out)


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts of the command line, then the file's. Raises ValueError if there is none."""
    texts = list(config.prompt)
    if config.prompt_file is not None:
        if not config.prompt_file.is_file():
            raise FileNotFoundError(f"prompt_file={str(config.prompt_file)!r}: no such file")
        texts.append(config.prompt_file.read_text(encoding="utf-8"))
    if not texts:
        raise ValueError("no prompt given: pass --prompt TEXT (one or several) or --prompt-file FILE")
    return texts


def resolve_checkpoint(folder: Path) -> Path:
    """The folder given, or the newest checkpoint of a training run's folder. Raises FileNotFoundError."""
    restore_interrupted(folder)
    found = folder if is_checkpoint(folder) else latest_checkpoint(folder)
    if found is None:
        raise FileNotFoundError(
            f"checkpoint={str(folder)!r} holds neither a checkpoint (config.json, safetensors) nor a training run (latest)"
        )
    return found


def find_tokenizer(folder: Path) -> Path:
    """tokenizer.json in the checkpoint's folder, or beside it as in a run. Raises FileNotFoundError."""
    places = [folder / "tokenizer.json", folder.parent / "tokenizer.json"]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"no tokenizer.json: looked at {places[0]} and {places[1]}")
