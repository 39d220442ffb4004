"""R1-Zero: reinforcement learning on a base model, with nothing but rules to say what is good [R1 2.2].

One step:

    rollout     Q questions, G answers each, by the policy as it is
    rewards     rules; group z-score: what is better than the group's mean is good
    updates     the rollout's answers in ``mini_batches`` parts, an optimizer step each (R1: 16, each answer used once)
    reference   what KL holds the policy to; replaced by the policy every ``reference_every`` steps (R1: 400)

With one mini-batch every ratio is 1 and the clip never acts; with more, the later ones are off-policy.

What the paper leaves open, made explicit. *The router's bias*: frozen by default, or stepped with the load of the answers
as in pre-training. *Routing replay*: the policy that answered sent each token to certain experts; after an update it may
choose others, and the ratio compares two different nets. With replay, all updates of a rollout use the experts of before.
*Dynamic sampling* (DAPO): questions whose answers all earn the same teach nothing; others are drawn in their place.

Shapes: Q questions, G answers, B = Q G, T tokens.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from minids.data.tokenizer import BytePairTokenizer
from minids.model.balance import update_bias
from minids.model.loss import IGNORE
from minids.model.transformer import Transformer
from minids.rl.answers import Batch, ask, replace_groups
from minids.rl.grpo import Denominators, GRPOConfig, group_advantages, grpo_loss, informative
from minids.rl.ranks import Ranks
from minids.rl.rewards import Total
from minids.rl.rollout import Rollout, score
from minids.rl.supervised import real_loads
from minids.rl.tasks import Curriculum, Problem, Task
from minids.train.optim import OptimConfig, Optimizer

MAX_REDRAWS = 4  # rollouts that dynamic sampling may add to a step


@dataclass(frozen=True)
class ZeroConfig:
    """Reinforcement learning; the paper's figures in brackets."""

    steps: int = 100
    """Rollouts (10,400)."""
    questions: int = 8
    """Questions in a rollout (32 a step)."""
    group: int = 16
    """Answers to each (16)."""
    max_new_tokens: int = 64
    """The longest answer (32,768, later 65,536)."""
    temperature: float = 1.0
    """Of the rollout, and of the scoring (1)."""
    lr: float = 7e-4
    """Constant (3e-6)."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    objective: GRPOConfig = field(default_factory=lambda: GRPOConfig(beta=0.0))
    """See minids.rl.grpo. The toy's base has nothing worth holding on to: no KL."""
    mini_batches: int = 1
    """Optimizer steps a rollout (16)."""
    micro_batch: int = 128
    """Answers in one forward pass."""
    reference_every: int = 400
    """Steps between two references, where the objective has one (400)."""
    gamma: float = 0.0
    """Step of the router's bias; 0 freezes it."""
    routing_replay: bool = False
    """Updates use the experts that the answering policy chose."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal."""
    curriculum: bool = False
    """Levels of the task one after the other."""
    seed: int = 0
    """Draws questions and answers."""

    def __post_init__(self) -> None:
        for name in ("steps", "questions", "mini_batches", "micro_batch", "max_new_tokens", "reference_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be at least 1")
        if self.group < 2:
            raise ValueError(f"group = {self.group!r}: must be at least 2, an answer is compared with its group")
        if self.mini_batches > self.questions * self.group:
            raise ValueError(f"mini_batches = {self.mini_batches!r}: must be at most the answers of a rollout, "
                             f"{self.questions * self.group}")  # fmt: skip
        for name in ("temperature", "lr"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be finite and above 0")


class Zero:
    """A policy, what it is asked, and how it learns. ``step()`` does one rollout and its updates."""

    def __init__(self, model: Transformer, tokenizer: BytePairTokenizer, task: Task, config: ZeroConfig,
                 prefix: str = "", ranks: Ranks | None = None):  # fmt: skip
        """``prefix``: text before every question, such as R1-Zero's template. ``ranks``: the processes that share the work;
        each must hold the same weights. Raises ValueError when the questions do not divide among them."""
        self.model, self.tokenizer, self.task, self.config, self.prefix = model, tokenizer, task, config, prefix
        self.ranks = ranks or Ranks()
        if config.questions % self.ranks.world:
            raise ValueError(f"questions = {config.questions}: must be a multiple of the {self.ranks.world} processes")
        if config.mini_batches > (mine := config.questions * config.group // self.ranks.world):
            raise ValueError(f"mini_batches = {config.mini_batches}: must be at most the answers of a process, {mine}")
        self.optimizer = Optimizer(model, OptimConfig(beta2=0.95, weight_decay=0.0, clip=config.clip_norm))
        self.total = Total(task.rewards())
        # All ranks draw the same questions and take their share; answers, and questions drawn anew, are each rank's own.
        self.random, self.own = Random(config.seed), Random(f"{config.seed} {self.ranks.rank}")
        self.generator = torch.Generator().manual_seed(config.seed * 1000 + self.ranks.rank)
        self.curriculum = Curriculum(task.levels) if config.curriculum else None
        self.reference = copy.deepcopy(model) if config.objective.beta else None
        self.steps = 0

    def step(self) -> dict:
        """One rollout and its updates; returns what to watch."""
        config = self.config
        if self.reference is not None and self.steps and self.steps % config.reference_every == 0:
            self.reference.load_state_dict(self.model.state_dict())
        started = time.perf_counter()
        batch = self.sample()
        record = batch.summary(config.max_new_tokens) | {"rollout_seconds": time.perf_counter() - started}
        advantages_B = group_advantages(batch.rewards_QG, config.objective.std).flatten().float()
        record |= self.update(batch.rollout, advantages_B.to(batch.rollout.logp_BT.device))
        record = self.ranks.mean({**record, "faults": sum(self.total.faults.values())})
        record["faults"] = round(record["faults"] * self.ranks.world)
        if self.curriculum is not None:
            record["levels"] = list(self.curriculum.current())
            self.curriculum.update(record["accuracy"])
        self.steps += 1
        return {"step": self.steps, **record}

    def sample(self) -> Batch:
        """The step's rollout. With dynamic sampling, groups that teach nothing are replaced while there are tries left."""
        batch = self.answer(self.ranks.share([self.draw(self.random) for _ in range(self.config.questions)]))
        for _ in range(MAX_REDRAWS if self.config.dynamic_sampling else 0):
            keep = informative(batch.rewards_QG)
            if keep.all():
                break
            fresh = self.answer([self.draw(self.own) for _ in range(int((~keep).sum()))])
            batch = replace_groups(batch, keep, fresh)
        return batch

    def draw(self, random: Random) -> Problem:
        """A training problem, of the levels that are open."""
        return self.task.draw(random, levels=self.curriculum.current() if self.curriculum else None)

    def answer(self, problems: list[Problem]) -> Batch:
        """The policy's answers to these problems, with their rewards."""
        config = self.config
        return ask(self.model, self.tokenizer, problems, self.total, group=config.group, temperature=config.temperature,
                   max_new_tokens=config.max_new_tokens, generator=self.generator, prefix=self.prefix)  # fmt: skip

    def update(self, found: Rollout, advantages_B: Tensor) -> dict:
        """The optimizer steps of a rollout; returns means over them."""
        config = self.config
        self.model.train()
        order = torch.randperm(len(advantages_B), generator=self.generator).to(advantages_B.device)
        replays = self.chosen_experts(found) if config.routing_replay else None
        ref_logp_BT = self.reference_scores(found)
        # Terms of the loss add up over micro-batches and ranks, means over ranks are taken later; the ratio has a maximum.
        sums, share = {"ratio_max": 0.0}, self.ranks.world / config.mini_batches
        for part in order.tensor_split(config.mini_batches):
            over = self.denominators(found.mask_BT[part])
            loads = 0
            for rows in part.split(config.micro_batch):
                with replayed(self.model, replays, rows):
                    logp_BT, routing = score(self.model, found.tokens_BT[rows], config.temperature)
                # With one mini-batch nothing has changed since the rollout: the ratio is 1 by definition.
                old_BT = logp_BT.detach() if config.mini_batches == 1 else found.logp_BT[rows]
                ref_BT = None if ref_logp_BT is None else ref_logp_BT[rows]
                loss, stats = grpo_loss(logp_BT, old_BT, advantages_B[rows], found.mask_BT[rows], ref_BT,
                                        config.objective, over)  # fmt: skip
                loss.backward()
                self.optimizer.accumulate()
                labels = found.tokens_BT[rows, 1:].masked_fill(~found.mask_BT[rows], IGNORE)
                loads = loads + real_loads(routing, found.tokens_BT[rows, :-1], labels)
                sums["ratio_max"] = max(sums["ratio_max"], float(stats.pop("ratio_max")))
                for name, value in stats.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * share
            self.ranks.sum([m.grad for m in self.optimizer.masters.values() if m.grad is not None])
            if self.optimizer.step(config.lr) and config.gamma:
                self.ranks.sum([loads])
                update_bias(self.model.routers(), loads, config.gamma)
            sums["grad_norm"] = sums.get("grad_norm", 0.0) + self.optimizer.grad_norm / config.mini_batches
        return sums

    def denominators(self, mask_BT: Tensor) -> Denominators:
        """Of an update, over all ranks."""
        counts = torch.tensor([len(mask_BT), int(mask_BT.sum())], device=mask_BT.device)
        self.ranks.sum([counts])
        return Denominators(*counts.tolist())

    @torch.no_grad()
    def reference_scores(self, found: Rollout) -> Tensor | None:
        """(B, T - 1) log-probabilities under the reference, where the objective asks for one."""
        if self.reference is None:
            return None
        self.reference.eval()
        return torch.cat([score(self.reference, rows, self.config.temperature)[0]
                          for rows in found.tokens_BT.split(self.config.micro_batch)])  # fmt: skip

    @torch.no_grad()
    def chosen_experts(self, found: Rollout) -> list[Tensor]:
        """For each MoE layer, (B, T - 1, K): the experts of the policy as it is now."""
        micro = found.tokens_BT.split(self.config.micro_batch)
        parts = [score(self.model, rows, self.config.temperature)[1] for rows in micro]
        shape = (-1, found.mask_BT.shape[1], self.model.cfg.num_experts_per_tok)
        return [torch.cat([part[layer].indices.view(shape) for part in parts]) for layer in range(len(parts[0]))]

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, JSON values): with the model's weights, all that a run needs to go on as if it had never stopped. Every
        rank must call it, since each has generators of its own; all get the same."""
        tensors, optimizer = self.optimizer.state()
        tensors = {f"optimizer/{name}": tensor for name, tensor in tensors.items()}
        if self.reference is not None:
            tensors |= {f"reference/{name}": tensor for name, tensor in self.reference.state_dict().items()}
        curriculum = None if self.curriculum is None else [self.curriculum.open, self.curriculum.average]
        own = {"random": self.own.getstate(), "torch": bytes(self.generator.get_state().tolist()).hex(),
               "faults": [[*key, count] for key, count in self.total.faults.items()]}  # fmt: skip
        ranks = [json.loads(part) for part in self.ranks.gather(json.dumps(own).encode())]
        return tensors, {"steps": self.steps, "optimizer": optimizer, "random": self.random.getstate(),
                         "curriculum": curriculum, "ranks": ranks}  # fmt: skip

    def load_state(self, tensors: dict[str, Tensor], values: dict) -> None:
        """Takes over what ``state`` returned; the model's weights are loaded elsewhere. Raises ValueError, before anything
        is changed, for a state of more or fewer ranks."""
        if len(values["ranks"]) != self.ranks.world:
            raise ValueError(f"the checkpoint was made by {len(values['ranks'])} processes, now there are "
                             f"{self.ranks.world}: must be as many, each goes on with its own generators")  # fmt: skip
        part = {kind: {name.removeprefix(f"{kind}/"): tensor for name, tensor in tensors.items()
                       if name.startswith(f"{kind}/")} for kind in ("optimizer", "reference")}  # fmt: skip
        own = values["ranks"][self.ranks.rank]
        self.optimizer.load_state(part["optimizer"], values["optimizer"])
        self.generator.set_state(torch.tensor(list(bytes.fromhex(own["torch"])), dtype=torch.uint8))
        if self.reference is not None:
            self.reference.load_state_dict(part["reference"])
        for random, (version, inner, gauss) in ((self.random, values["random"]), (self.own, own["random"])):
            random.setstate((version, tuple(inner), gauss))
        if self.curriculum is not None:
            self.curriculum.open, self.curriculum.average = values["curriculum"]
        self.total.faults.update({(term, kind): count for term, kind, count in own["faults"]})
        self.steps = values["steps"]

    def run(self, on_step: Callable[[dict], None] | None = None) -> list[dict]:
        """All steps; the records."""
        records = []
        while self.steps < self.config.steps:
            records.append(self.step())
            if on_step is not None:
                on_step(records[-1])
        return records


@contextmanager
def replayed(model: Transformer, replays: list[Tensor] | None, rows: Tensor) -> Iterator[None]:
    """Within, the gates choose the experts recorded for these rows; gate values are those of the present scores."""
    if replays is None:
        yield
        return
    gates = model.routers()
    try:
        for gate, chosen in zip(gates, replays, strict=False):  # gates of MTP modules, the last ones, do not run here
            indices = chosen[rows].flatten(0, 1)
            gate.assign = lambda _gate, _preference, indices=indices: (indices, None)
        yield
    finally:
        for gate in gates:
            gate.assign = None
