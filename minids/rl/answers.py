"""Asking: a policy's answers to problems, as text, with what the rewards say of each.

Shapes: Q problems, G answers each, B = Q G in the order problem by problem, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.data.tokenizer import BytePairTokenizer
from minids.model.transformer import Transformer
from minids.rl.grpo import informative
from minids.rl.rewards import Total
from minids.rl.rollout import Rollout, rollout
from minids.rl.tasks import Problem


@dataclass
class Batch:
    """A scored rollout."""

    problems: list[Problem]
    rollout: Rollout
    rewards_QG: Tensor  # float64
    terms: dict[str, list[float]]  # each reward before its weight, one an answer
    texts: list[str]  # the answers, without a final eos
    eos_id: int  # what ends an answer that was not cut off

    def summary(self, max_new_tokens: int) -> dict[str, float]:
        """What to watch: mean reward and terms, length in tokens, entropy (nats a token), the share of groups whose rewards
        are all equal, and of answers that were cut off."""
        lengths = [len(answer) for answer in self.rollout.answers]
        cut_off = [len(a) == max_new_tokens and a[-1] != self.eos_id for a in self.rollout.answers]
        means = {name: sum(values) / len(values) for name, values in self.terms.items()}
        return {"reward": float(self.rewards_QG.mean()), **means, "length": sum(lengths) / len(lengths),
                "entropy": self.rollout.entropy, "no_variance": 1 - float(informative(self.rewards_QG).double().mean()),
                "cut_off": sum(cut_off) / len(cut_off)}  # fmt: skip


def ask(model: Transformer, tokenizer: BytePairTokenizer, problems: list[Problem], total: Total, *, group: int = 1,
        temperature: float = 1.0, max_new_tokens: int = 64, generator: torch.Generator | None = None,
        prefix: str = "") -> Batch:  # fmt: skip
    """``group`` answers to each of the problems, scored. ``prefix``: text before every prompt."""
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prefix + problem.prompt)] for problem in problems]
    found = rollout(model, prompts, group, max_new_tokens, eos_id=tokenizer.eos_id, temperature=temperature,
                    generator=generator)  # fmt: skip
    texts = [response(tokenizer, tokens) for tokens in found.answers]
    asked = [problem for problem in problems for _ in range(group)]
    scored = [total(problem, text) for problem, text in zip(asked, texts, strict=True)]
    rewards_QG = torch.tensor([reward for reward, _ in scored], dtype=torch.float64).view(-1, group)
    terms = {name: [each[name] for _, each in scored] for name in total.terms}
    return Batch(list(problems), found, rewards_QG, terms, texts, tokenizer.eos_id)


def response(tokenizer: BytePairTokenizer, tokens: list[int]) -> str:
    """The text of an answer, without a final eos."""
    return tokenizer.decode(tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_id else tokens)


def replace_groups(batch: Batch, keep_Q: Tensor, fresh: Batch) -> Batch:
    """``batch`` with the groups outside ``keep`` replaced by those of ``fresh``, in their order."""
    group, places = batch.rewards_QG.shape[1], (~keep_Q).nonzero().flatten().tolist()
    width = max(batch.rollout.tokens_BT.shape[1], fresh.rollout.tokens_BT.shape[1])
    old, new = widened(batch.rollout, width), widened(fresh.rollout, width)
    problems, texts, rewards_QG = list(batch.problems), list(batch.texts), batch.rewards_QG.clone()
    terms = {name: list(values) for name, values in batch.terms.items()}
    for source, place in enumerate(places):
        to, of = slice(place * group, (place + 1) * group), slice(source * group, (source + 1) * group)
        for name in ("tokens_BT", "mask_BT", "logp_BT"):
            getattr(old, name)[to] = getattr(new, name)[of]
        old.answers[to], texts[to] = new.answers[of], fresh.texts[of]
        problems[place], rewards_QG[place] = fresh.problems[source], fresh.rewards_QG[source]
        for name, values in terms.items():
            values[to] = fresh.terms[name][of]
    return Batch(problems, old, rewards_QG, terms, texts, batch.eos_id)


def widened(found: Rollout, width: int) -> Rollout:
    """A copy of the rollout, padded to ``width`` tokens."""
    more = (0, width - found.tokens_BT.shape[1])
    tokens_BT, mask_BT, logp_BT = (F.pad(x, more).clone() for x in (found.tokens_BT, found.mask_BT, found.logp_BT))
    return Rollout(tokens_BT, mask_BT, logp_BT, list(found.answers), found.entropy)
