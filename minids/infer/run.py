"""`python -m minids generate`: a checkpoint and a prompt in, text on the terminal.

The problem that is more than plumbing: tokens of a byte-level BPE are bytes, and a character may span several of them
(an emoji has four bytes). `TextStream` therefore prints a token's text only as far as its characters are complete.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

import torch

from minids.checkpoint import is_checkpoint, load
from minids.data.tokenizer import BytePairTokenizer
from minids.folder import restore_interrupted
from minids.infer.generate import generate
from minids.infer.sampling import check_sampling, check_seed
from minids.train.state import latest_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPLACEMENT = "\ufffd"  # what decoding puts in place of bytes that are no (complete) character


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
    device: str = "cpu"
    """Where to run: cpu, cuda, cuda:1, ..."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of weights and arithmetic; auto keeps the checkpoint's."""


class TextStream:
    """Turns a stream of tokens into pieces of text whose concatenation is the text of all tokens.

    A byte sequence that is still incomplete decodes to one U+FFFD at the end; it is held back until the next tokens
    complete it, or until `flush`. All earlier text is final: bytes that follow cannot change characters before the last
    one. (`tokenizers.decoders.DecodeStream` has no flush, and loses or refuses bytes that never become a character.)
    """

    def __init__(self, tokenizer: BytePairTokenizer):
        self.tokenizer = tokenizer
        self.pending: list[int] = []  # tokens since the last point where the text was complete
        self.printed = 0  # characters of their text that were handed out already

    def push(self, token: int) -> str:
        """Add one token; returns the text that became final, possibly none."""
        self.pending.append(token)
        text = self.tokenizer.decode(self.pending)
        final = text.removesuffix(REPLACEMENT)
        piece = final[self.printed :]
        self.printed = len(final)
        if final == text:
            self.pending, self.printed = [], 0
        return piece

    def flush(self) -> str:
        """The text held back, with U+FFFD for what never became a character."""
        piece = self.tokenizer.decode(self.pending)[self.printed :] if self.pending else ""
        self.pending, self.printed = [], 0
        return piece


def run_generate(config: GenerateConfig, out: TextIO | None = None) -> list[str]:
    """Load, generate and print to `out` (default stdout): one prompt streams, several are printed at the end.

    Speed goes to stderr. Returns the new text of each prompt. Raises ValueError or FileNotFoundError before loading for
    bad input.
    """
    out = out or sys.stdout
    check_sampling(config.temperature, config.top_p)
    check_seed(config.seed)
    device = check_device(config.device)
    texts = read_prompts(config)
    folder = resolve_checkpoint(config.checkpoint)
    tokenizer = BytePairTokenizer.load(find_tokenizer(folder))
    model = load(folder, dtype=DTYPES.get(config.dtype), device=device)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]

    stream = TextStream(tokenizer)
    streaming = len(prompts) == 1

    def show(row: int, token: int) -> None:
        if streaming and token != tokenizer.eos_id:
            print(stream.push(token), end="", flush=True, file=out)

    if streaming:
        print(texts[0], end="", flush=True, file=out)
    start = time.perf_counter()
    new_tokens = generate(
        model, prompts, config.max_new_tokens, temperature=config.temperature, top_p=config.top_p, seed=config.seed,
        eos_token_id=tokenizer.eos_id, on_token=show,
    )  # fmt: skip
    seconds = time.perf_counter() - start

    written = [tokenizer.decode([token for token in row if token != tokenizer.eos_id]) for row in new_tokens]
    if streaming:
        print(stream.flush(), file=out, flush=True)
    else:
        print_all(texts, written, out)
    count = sum(len(row) for row in new_tokens)
    print(f"{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tokens/s (prefill included)", file=sys.stderr)
    return written


def check_device(name: str) -> torch.device:
    """The device of that name. Raises ValueError if there is none, or if it cannot be used here."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def print_all(texts: list[str], written: list[str], out: TextIO) -> None:
    """Several prompts and their continuations, each under a numbered rule."""
    for row, (text, new) in enumerate(zip(texts, written, strict=True)):
        print(f"--- prompt {row + 1} of {len(texts)} ---\n{text}{new}\n", file=out)


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts of the command line, then the file's. Raises ValueError if there is none."""
    texts = list(config.prompt)
    if config.prompt_file is not None:
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
