"""Context extension on a toy: train at length L, then read 8 L [V3 section 4.3; YaRN: arXiv 2309.00071].

The problem: V3 is trained on rows of 4096 tokens and serves 163,840. What breaks beyond the trained length, and what
does each way of slowing the rotation repair? The toy text is made of phrases of four tokens, in equal parts

    rhythm   a b f(a) f(b)           the last two follow from the token two places back: exact short distances
    ledger   [k=v] [m=w] k? v        two notes, then a question about any key noted so far: its *latest* value
                                     counts, which needs order over long distances

f is a fixed permutation of the words. Every key has its own popularity in each row, so the note that answers lies
anywhere from one token to the whole row back. Only tokens that can be known are scored: the end of a rhythm, and the
answer to a question.

Simplifications: one stage of extension instead of V3's two, dense layers instead of MoE, no MTP; 47 thousand parameters.
The committed figures are made by `python -m minids.train.context_extension` (five seeds, about five minutes).
Shapes: B rows, T tokens, R rope dims (R/2 pairs).
"""

import argparse
import copy
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from minids.config import ModelConfig
from minids.model.block import Context
from minids.model.rope import rope_frequencies, yarn_mscale
from minids.model.transformer import Transformer
from minids.plots import loss_by_position, needle_maps

LENGTH, FACTOR = 64, 8
STEPS, BATCH, LR = 300, 64, 5e-3  # pre-training: 1.2M tokens
TUNE_STEPS, TUNE_LR = 20, 1e-3  # extension: as many tokens a step, in rows 8 times as long, as V3 keeps 63M a step
NEEDLE_LENGTHS, NEEDLE_DEPTHS = (64, 128, 256, 512), tuple(i / 8 for i in range(9))
WORDS, KEYS, VALUES = 16, 16, 8
NOTE, ASK, ANSWER = WORDS, WORDS + KEYS * VALUES, WORDS + KEYS * VALUES + KEYS  # first token of each kind
VOCABULARY = ANSWER + VALUES
RHYTHM, LEDGER = 1, 2  # what a scored token needs
IGNORE = -100
YARN = {"type": "yarn", "factor": FACTOR, "original_max_position_embeddings": LENGTH, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip


@dataclass
class Rows:
    """Text of the toy. All (B, T) int64."""

    tokens: Tensor
    scored: Tensor  # RHYTHM or LEDGER where the token can be known from those before it, else 0
    distance: Tensor  # of an answer: tokens from the note it repeats to its question; else 0

    def labels(self) -> Tensor:
        """(B, T - 1): the next token where it is scored, IGNORE elsewhere."""
        return torch.where(self.scored > 0, self.tokens, IGNORE)[:, 1:]


def toy_config(**changes) -> ModelConfig:
    """Two dense layers with MLA. rope_theta = 200 puts the 8 pairs where V3 has its 32: half of them turn at least once
    within L, and the slowest needs 10 L for a turn (V3: 11.5 L)."""
    values = dict(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, first_k_dense_replace=2, intermediate_size=64,
        moe_intermediate_size=64, num_attention_heads=4, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16,
        qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=0, n_shared_experts=0, num_experts_per_tok=0, n_group=1,
        topk_group=1, num_nextn_predict_layers=0, rope_theta=200.0, max_position_embeddings=LENGTH * FACTOR,
        initializer_range=0.05,
    )  # fmt: skip
    return ModelConfig(**{**values, **changes})


def follow(word: np.ndarray) -> np.ndarray:
    """f of the rhythm, a permutation of the words."""
    return (5 * word + 3) % WORDS


def spell(token: int) -> str:
    """How the notebook writes a token: ``a`` a word, ``C=5`` a note, ``C?`` a question, ``5`` an answer."""
    if token < NOTE:
        return chr(ord("a") + token)
    if token < ASK:
        return f"{chr(ord('A') + (token - NOTE) // VALUES)}={(token - NOTE) % VALUES}"
    return f"{chr(ord('A') + token - ASK)}?" if token < ANSWER else str(token - ANSWER)


def make_rows(rows: int, length: int, seed: int) -> Rows:
    """``rows`` texts of ``length`` tokens, a multiple of 4. Deterministic in ``seed``."""
    if length < 4 or length % 4:
        raise ValueError(f"length={length}: allowed is a positive multiple of 4, the tokens of a phrase")
    draw = np.random.default_rng(seed)
    popularity = np.cumsum(1 / np.arange(1, KEYS + 1)) / np.sum(1 / np.arange(1, KEYS + 1))
    order = np.argsort(draw.random((rows, KEYS)), 1)  # which key is the popular one, row by row
    value, where = np.full((rows, KEYS), -1), np.zeros((rows, KEYS), int)
    tokens, scored, distance = np.zeros((3, rows, length), int)
    for start in range(0, length, 4):
        words = draw.integers(0, WORDS, (rows, 2))
        tokens[:, start : start + 4] = np.concatenate([words, follow(words)], 1)
        scored[:, start + 2 : start + 4] = RHYTHM
        r = np.flatnonzero(draw.random(rows) < 0.5)
        for slot in (start, start + 1):
            key = order[r, np.searchsorted(popularity, draw.random(len(r)))]
            value[r, key], where[r, key] = draw.integers(0, VALUES, len(r)), slot
            tokens[r, slot] = NOTE + key * VALUES + value[r, key]
        key = np.where(value[r] >= 0, draw.random((len(r), KEYS)), -1).argmax(1)
        tokens[r, start + 2], tokens[r, start + 3] = ASK + key, ANSWER + value[r, key]
        scored[r, start + 2], scored[r, start + 3] = 0, LEDGER
        distance[r, start + 3] = start + 2 - where[r, key]
    return Rows(*(torch.from_numpy(x) for x in (tokens, scored, distance)))


def make_needles(rows: int, length: int, depth: float, seed: int) -> tuple[Tensor, Tensor]:
    """Texts that end in a question, and its answers: (B, T) and (B,) int64.

    The one note of the key lies at ``depth`` (0 the start, 1 just before the question); notes and questions about it
    elsewhere in the text are given to a neighbouring key.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth}: allowed is 0 (the start) to 1 (the end)")
    draw = np.random.default_rng([seed, length, round(1000 * depth)])
    tokens = make_rows(rows, length, int(draw.integers(2**31))).tokens.numpy()
    key, value = draw.integers(0, KEYS, rows), draw.integers(0, VALUES, rows)
    other = np.where(key == 0, 1, -1)[:, None]
    notes = (tokens >= NOTE) & (tokens < ASK) & ((tokens - NOTE) // VALUES == key[:, None])
    tokens += notes * other * VALUES + (tokens == ASK + key[:, None]) * other
    tokens[:, round(depth * (length - 2))] = NOTE + key * VALUES + value
    tokens[:, -1] = ASK + key
    return torch.from_numpy(tokens), torch.from_numpy(ANSWER + value)


class Extended(nn.Module):
    """A copy of ``model`` under other frequencies (R/2,) and a softmax scale times mscale^2. No weight changes."""

    def __init__(self, model: Transformer, frequencies: Tensor, mscale: float = 1.0):
        super().__init__()
        self.model, self.frequencies = copy.deepcopy(model), frequencies
        for layer in self.model.main_layers:
            layer.self_attn.scale *= mscale**2

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        angles = torch.arange(tokens.shape[1])[None, :, None] * self.frequencies
        context = Context(torch.polar(torch.ones_like(angles), angles))
        x = self.model.model.embed_tokens(tokens)
        for layer in self.model.main_layers:
            x, _ = layer(x, context)
        return self.model.lm_head(self.model.model.norm(x))


def extensions(model: Transformer, yarn: dict | None = None) -> dict[str, Extended]:
    """The same weights read three ways: as trained, with every position divided by the factor, with YaRN."""
    yarn = yarn or YARN
    plain = rope_frequencies(model.cfg)
    stretched = rope_frequencies(model.cfg.replace(rope_scaling=yarn))
    return {
        "plain RoPE": Extended(model, plain),
        "interpolation": Extended(model, plain / yarn["factor"]),
        "YaRN": Extended(model, stretched, yarn_mscale(yarn["factor"], yarn["mscale_all_dim"])),
    }


def fit(model: nn.Module, rows: Rows, batch: int, lr: float, warmup: int = 20, final: float = 0.1,
        progress: bool = False) -> list[float]:  # fmt: skip
    """One pass over ``rows``: AdamW, linear warm-up, cosine to ``final`` times ``lr``. Returns the loss of each step."""
    labels, steps, losses = rows.labels(), len(rows.tokens) // batch, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    for step in trange(steps, disable=not progress, desc="training"):
        cosine = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / warmup) * cosine
        part = slice(step * batch, (step + 1) * batch)
        out = model(rows.tokens[part, :-1])
        logits = out if isinstance(out, Tensor) else out.logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels[part].flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def token_losses(model: nn.Module, rows: Rows, batch: int = 16) -> Tensor:
    """(B, T) nats for each token; the first of a row, which nothing predicts, is nan."""
    found = [F.cross_entropy(model(part[:, :-1]).transpose(1, 2), part[:, 1:], reduction="none")
             for part in rows.tokens.split(batch)]  # fmt: skip
    return F.pad(torch.cat(found), (1, 0), value=math.nan)


def by_position(losses: Tensor, rows: Rows, kind: int, bins: int = 16) -> list[float]:
    """Mean loss of the tokens scored as ``kind``, in ``bins`` equal parts of the row."""
    parts = zip(losses.chunk(bins, 1), rows.scored.chunk(bins, 1), strict=True)
    return [loss[scored == kind].mean().item() for loss, scored in parts]


def by_distance(losses: Tensor, rows: Rows, edges: tuple[int, ...] = (1, 16, 32, 64, 128, 256, 512)) -> list[float]:
    """Mean loss of answers whose note lies ``edges[i] <= distance < edges[i + 1]`` tokens before the question."""
    spans = zip(edges[:-1], edges[1:], strict=True)
    return [losses[(rows.scored == LEDGER) & (rows.distance >= a) & (rows.distance < b)].mean().item() for a, b in spans]


@torch.no_grad()
def older_values(model: nn.Module, rows: Rows, start: int = 0) -> tuple[float, float]:
    """Of the wrong answers from position ``start`` on: the share that is an older value of the right key, and what it
    would be if wrong values were drawn blindly. nan without wrong answers."""
    answers = model(rows.tokens[:, :-1]).argmax(-1) - ANSWER
    found = []
    for row, i in (rows.scored == LEDGER).nonzero().tolist():
        text, answer = rows.tokens[row].tolist(), answers[row, i - 1].item()
        right, first = text[i] - ANSWER, NOTE + (text[i - 1] - ASK) * VALUES
        older = {token - first for token in text[:i] if 0 <= token - first < VALUES} - {right}
        if i >= start and answer != right:
            found.append((answer in older, len(older) / (VALUES - 1)))
    share, luck = np.mean(found, axis=0) if found else (math.nan, math.nan)
    return float(share), float(luck)


@torch.no_grad()
def needle_grid(model: nn.Module, rows: int = 32, seed: int = 7) -> list[list[float]]:
    """Share of right answers, one list a length of NEEDLE_LENGTHS, in it one figure a depth of NEEDLE_DEPTHS."""
    def accuracy(length, depth):
        tokens, answers = make_needles(rows, length, depth, seed)
        return (model(tokens)[:, -1].argmax(-1) == answers).float().mean().item()

    return [[accuracy(length, depth) for depth in NEEDLE_DEPTHS] for length in NEEDLE_LENGTHS]


def measure(model: nn.Module, short: Rows, long: Rows, needles: int = 32) -> dict:
    """Everything the figures show of one model; ``needles`` texts a length and depth."""
    losses = token_losses(model, long)
    at_short = token_losses(model, short)
    return {
        "rhythm": by_position(losses, long, RHYTHM), "ledger": by_position(losses, long, LEDGER),
        "distance": by_distance(losses, long), "needle": needle_grid(model, needles),
        "short": {name: at_short[short.scored == kind].mean().item() for name, kind in (("rhythm", 1), ("ledger", 2))},
    }  # fmt: skip


def pretrain(seed: int, steps: int = STEPS, progress: bool = False) -> tuple[Transformer, list[float]]:
    """A model trained at LENGTH, and its loss at each step."""
    torch.manual_seed(seed)
    model = Transformer(toy_config())
    return model, fit(model, make_rows(steps * BATCH, LENGTH, 1000 + seed), BATCH, LR, progress=progress)


def tune(model: Extended, seed: int, steps: int = TUNE_STEPS, progress: bool = False) -> Extended:
    """A copy trained a little at FACTOR * LENGTH."""
    model, batch = copy.deepcopy(model), BATCH // FACTOR
    fit(model, make_rows(steps * batch, FACTOR * LENGTH, 2000 + seed), batch, TUNE_LR, warmup=2, progress=progress)
    return model


def experiment(seed: int) -> dict:
    """One seed of the committed figures: name -> ``measure``, before and after the short training at 8 L."""
    model, losses = pretrain(seed)
    short, long = make_rows(256, LENGTH, 3000 + seed), make_rows(64, FACTOR * LENGTH, 4000 + seed)
    found = {"training": losses}
    for name, extended in extensions(model).items():
        found[name] = measure(extended, short, long)
        found[f"{name}, tuned"] = measure(tune(extended, seed), short, long)
    return found


def main() -> None:
    """Runs the experiment for some seeds and writes its figures' data and the figures."""
    parser = argparse.ArgumentParser(prog="python -m minids.train.context_extension", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("figures/context_extension.json"), help="the file to write")
    parser.add_argument("--seeds", type=int, default=5, help="how many runs (default 5)")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    if not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: the folder {options.out.parent} does not exist")
    torch.set_num_threads(1)
    runs = [experiment(seed) for seed in trange(options.seeds, desc="seeds", disable=bool(os.environ.get("CI")))]
    runs = json.loads(json.dumps(runs), parse_float=lambda text: round(float(text), 3))
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(json.dumps({"length": LENGTH, "factor": FACTOR, "runs": runs}) + "\n", encoding="utf-8")
    os.replace(temporary, options.out)
    loss_by_position(runs, LENGTH, LENGTH * FACTOR).savefig(options.out.with_name(f"{options.out.stem}_loss.png"))
    needle_maps(runs, NEEDLE_LENGTHS, LENGTH).savefig(options.out.with_name(f"{options.out.stem}_needle.png"))
    print(f"{options.seeds} runs written to {options.out}, two figures beside it")


if __name__ == "__main__":
    main()
