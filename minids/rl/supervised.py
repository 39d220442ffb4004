"""Learning from examples: (what is given, what follows) pairs, the loss on what follows alone [R1 2.3.1, 2.3.3, 2.4].

    loss = - mean over the tokens of all responses of log pi(token | given, response so far)

The base model's pre-training, the cold start, SFT on rejection samples and distillation are this one function with other
documents. A document is [bos] given response [eos]; eos is learned, bos and the given are not.

Documents of like length share a batch, or half of each batch would be padding: a pool of documents is sorted by length, cut
into batches of about as many response tokens, and the batches are shuffled.

Shapes: B documents, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from minids.data.tokenizer import BytePairTokenizer
from minids.model.balance import update_bias
from minids.model.loss import IGNORE
from minids.model.transformer import Transformer
from minids.train.optim import OptimConfig, Optimizer

Document = Callable[[Random], tuple[str, str]]
POOL = 16  # batches whose documents are sorted together


@dataclass(frozen=True)
class SupervisedConfig:
    """How long and how fast."""

    steps: int = 1000
    """Optimizer steps."""
    tokens: int = 1024
    """Response tokens in a batch, about."""
    lr: float = 3e-3
    """Peak learning rate: warm-up over a twentieth of the steps, constant to the middle, then linear to a twentieth."""
    weight_decay: float = 0.01
    gamma: float = 1e-3
    """Step of the balancing bias."""
    seed: int = 0
    """Draws the documents and shuffles them."""

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("tokens", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be at least {low}")
        for name in ("lr", "weight_decay", "gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be at least 0")

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        warm, half = max(1, self.steps // 20), self.steps / 2
        return self.lr * min(1.0, (step + 1) / warm, max(0.05, (self.steps - step) / half))


def encode(pairs: list[tuple[str, str]], tokenizer: BytePairTokenizer) -> list[tuple[list[int], list[int]]]:
    """Pairs of token lists, bos before what is given and eos after what follows."""
    return [([tokenizer.bos_id, *tokenizer.encode(given)], [*tokenizer.encode(follows), tokenizer.eos_id])
            for given, follows in pairs]  # fmt: skip


def collate(pairs: list[tuple[list[int], list[int]]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and labels, (B, T - 1) int64 each; labels are -100 on what is given and on the padding to the right, which a
    causal model never looks at."""
    width = max(len(given) + len(follows) for given, follows in pairs)
    tokens = torch.full((len(pairs), width), pad)
    labels = torch.full((len(pairs), width), IGNORE)
    for row, (given, follows) in enumerate(pairs):
        end = len(given) + len(follows)
        tokens[row, :end] = torch.tensor(given + follows)
        labels[row, len(given) : end] = tokens[row, len(given) : end]
    return tokens[:, :-1].contiguous(), labels[:, 1:].contiguous()


def batches(document: Document, tokenizer: BytePairTokenizer, tokens: int,
            random: Random) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Endless batches of about ``tokens`` response tokens."""
    while True:
        pool, count = [], 0
        while count < POOL * tokens:
            pool += encode([document(random)], tokenizer)
            count += len(pool[-1][1])
        pool.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        cut, size = [[]], 0
        for pair in pool:
            if size >= tokens:
                cut, size = [*cut, []], 0
            cut[-1].append(pair)
            size += len(pair[1])
        random.shuffle(cut)
        yield from map(collate, cut)


def fit(model: Transformer, tokenizer: BytePairTokenizer, document: Document, config: SupervisedConfig,
        on_step: Callable[[int, float], None] | None = None) -> list[float]:  # fmt: skip
    """Trains ``model`` in place; returns each step's loss, nats a token. Raises FloatingPointError if one is not finite.

    ``document(random)`` draws a pair; ``on_step(step, loss)`` is called after each step.
    """
    optimizer = Optimizer(model, OptimConfig(weight_decay=config.weight_decay))
    device, losses = model.lm_head.weight.device, []
    stream = batches(document, tokenizer, config.tokens, Random(config.seed))
    model.train()
    for step in range(config.steps):
        tokens_BT, labels_BT = (x.to(device) for x in next(stream))
        out = model(tokens_BT, labels=labels_BT)
        out.loss.backward()
        optimizer.accumulate()
        if not optimizer.step(config.rate(step)):
            raise FloatingPointError(f"loss {float(out.loss.detach())} or its gradient is not finite at step {step}")
        update_bias(model.routers(), real_loads(out.routing, tokens_BT, labels_BT), config.gamma)
        losses.append(float(out.loss.detach()))
        if on_step is not None:
            on_step(step, losses[-1])
    return losses


def real_loads(routing: list, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """(MoE layers, E) int64: loads without the padding, whose tokens go wherever token 0 goes. A row ends with its last
    label."""
    t = labels_BT.shape[1]
    last_B = torch.where(labels_BT != IGNORE, torch.arange(t, device=labels_BT.device), -1).amax(dim=1, keepdim=True)
    real_N = (torch.arange(t, device=labels_BT.device) <= last_B).flatten()
    return torch.stack([torch.bincount(r.indices[real_N].flatten(), minlength=len(r.load)) for r in routing])
