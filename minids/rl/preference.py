"""A reward model: what people prefer, learned from pairs [R1 2.3.4, supplement on reward models].

The problem: no rule says which of two answers is the more helpful. A reward model reads question and answer and gives one
number, so that the better of a labelled pair gets the larger one (Bradley and Terry):

    loss = - log sigmoid(r(question, better) - r(question, worse))

It is the policy's own kind of network, started from the base model's weights, with one output instead of a vocabulary, read
at the last token. RL with it is short and comes last (in R1 the last 400 of 1,700 steps): what is learned can be cheated.

Shapes: B pairs, T tokens, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids.data.tokenizer import BytePairTokenizer
from minids.model.transformer import Transformer
from minids.rl.rewards import MAX_CHARACTERS
from minids.rl.tasks import Problem


class RewardModel(nn.Module):
    """``model`` is copied. ``view`` is what it is shown of a response: the summary, or everything."""

    def __init__(self, model: Transformer, tokenizer: BytePairTokenizer, view: Callable[[str], str] = str):
        super().__init__()
        self.model, self.tokenizer, self.view = copy.deepcopy(model), tokenizer, view
        self.model.lm_head.requires_grad_(False)  # not used
        self.value = nn.Linear(model.cfg.hidden_size, 1)
        nn.init.zeros_(self.value.weight)
        self.value.to(model.lm_head.weight)

    def scores(self, pairs: list[tuple[str, str]]) -> Tensor:
        """r (B,) of (question, what is shown of the response)."""
        rows = [[self.tokenizer.bos_id, *self.tokenizer.encode(q + a), self.tokenizer.eos_id] for q, a in pairs]
        limit = self.model.cfg.max_position_embeddings
        rows = [row[:limit] for row in rows]
        width, device = max(map(len, rows)), self.value.weight.device
        tokens_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        last_B = torch.tensor([len(row) - 1 for row in rows], device=device)
        hidden_BTD = self.model(tokens_BT, mtp=False).hidden
        return self.value(hidden_BTD[torch.arange(len(rows), device=device), last_B]).squeeze(-1)

    @torch.no_grad()
    def __call__(self, problem: Problem, text: str) -> float:
        """The reward of a response, in (0, 1); 0 for one of which there is nothing to show, which no pair was like."""
        self.eval()
        shown = self.view(text[:MAX_CHARACTERS])
        if not shown:
            return 0.0
        return float(self.scores([(problem.prompt, shown)]).sigmoid())

    def fit(self, pairs: list[tuple[str, str, str]], steps: int = 120, batch: int = 32, lr: float = 1e-3,
            seed: int = 0) -> list[float]:  # fmt: skip
        """Learns from (prompt, better, worse), shown as they are; returns the losses. Raises ValueError without pairs."""
        if not pairs:
            raise ValueError("pairs = []: must be at least one preference")
        random, losses = Random(seed), []
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.95))
        self.train()
        for _ in range(steps):
            chosen = random.choices(pairs, k=batch)
            scores_2B = self.scores([(q, better) for q, better, _ in chosen] + [(q, worse) for q, _, worse in chosen])
            better_B, worse_B = scores_2B.chunk(2)
            loss = -F.logsigmoid(better_B - worse_B).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    @torch.no_grad()
    def agreement(self, pairs: list[tuple[str, str, str]]) -> float:
        """The share of pairs whose better answer gets the larger reward."""
        self.eval()
        better = self.scores([(q, better) for q, better, _ in pairs])
        worse = self.scores([(q, worse) for q, _, worse in pairs])
        return float((better > worse).float().mean())
