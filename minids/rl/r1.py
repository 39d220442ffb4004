"""R1: four stages from a base model to a reasoner that is pleasant to read [R1 2.3].

R1-Zero reasons, and mixes languages and has no manners. R1 takes RL in two pieces and SFT before each:

    1 cold start          SFT of the base on few, long, readable solutions                         -> a form to begin with
    2 reasoning RL        rules: accuracy + form + share of the chain in the question's language   -> reasons, readably
    3 rejection SFT       stage 2 answers many questions; the right and readable answers, with     -> one model for both
                          non-reasoning data, are SFT data for the *base* again
    4 RL for everything   reasoning by rules; requests by reward models, helpfulness of the        -> and with manners
                          summary, harmlessness of everything; these only in the last steps

Each stage is a function from checkpoint folder(s) to checkpoint folder, so that any can be run again or replaced.

Simplifications: the "people" whose preferences the reward models learn are rules (chat.py); rejection needs no judge but
the rules; one round of each stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from minids import checkpoint
from minids.data.tokenizer import BytePairTokenizer
from minids.model.transformer import Transformer
from minids.rl.answers import Batch, ask
from minids.rl.chat import CHAT, Chat, pairs, summary_of
from minids.rl.policy import new_policy, tiny_config
from minids.rl.preference import RewardModel
from minids.rl.rewards import Total, parse
from minids.rl.supervised import SupervisedConfig, fit
from minids.rl.tasks import LANGUAGES, Problem, Sums, character_tokenizer, solution
from minids.rl.zero import Zero, ZeroConfig

Note = Callable[[dict], None]  # takes one JSON object a step


@dataclass(frozen=True)
class R1Config:
    """All stages; figures are the toy's, the paper's in brackets."""

    base: SupervisedConfig = field(default_factory=lambda: SupervisedConfig(steps=1600))
    """Pre-training of the base (V3-Base)."""
    zero: ZeroConfig = field(default_factory=lambda: ZeroConfig(steps=60))
    """R1-Zero on the same base, for comparison."""
    cold_examples: int = 200
    """Solutions of the cold start (thousands)."""
    cold: SupervisedConfig = field(default_factory=lambda: SupervisedConfig(steps=25, lr=1e-3))
    reasoning: ZeroConfig = field(default_factory=lambda: ZeroConfig(steps=60, lr=3e-4))
    """Stage 2. Half of R1-Zero's rate and less: a policy that is right nine times in ten unlearns it at the full one."""
    language_weight: float = 0.5
    """Of the language reward, beside accuracy's 1."""
    rejection_problems: int = 600
    """Questions that stage 2 answers for stage 3 (600k samples kept)."""
    rejection_group: int = 4
    """Answers to each."""
    chat_share: float = 0.25
    """Of non-reasoning documents in stage 3 (200k of 800k)."""
    rejection: SupervisedConfig = field(default_factory=lambda: SupervisedConfig(steps=250, lr=2e-3))
    """SFT of stage 3, from the base."""
    everything: ZeroConfig = field(default_factory=lambda: ZeroConfig(steps=40, lr=2e-4, temperature=0.7))
    """Stage 4 (1,700 steps, temperature 0.7)."""
    preference_steps: int = 15
    """The last steps of stage 4, with preference rewards (400)."""
    preference_pairs: int = 2000
    """Labelled pairs for each reward model (66k helpfulness pairs)."""
    judge_steps: int = 250
    """Steps of 32 pairs in which a reward model learns."""

    def __post_init__(self) -> None:
        for name in ("cold_examples", "rejection_problems", "rejection_group", "preference_pairs", "judge_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be at least 1")
        if not 0 <= self.preference_steps <= self.everything.steps:
            raise ValueError(f"preference_steps = {self.preference_steps!r}: must be 0 to everything.steps, "
                             f"{self.everything.steps}")  # fmt: skip
        if not 0 <= self.chat_share < 1:
            raise ValueError(f"chat_share = {self.chat_share!r}: must be in [0, 1)")

    def seeded(self, seed: int) -> R1Config:
        """The same with every stage's seed derived from one."""
        names = ("base", "zero", "cold", "reasoning", "rejection", "everything")
        return replace(self, **{name: replace(getattr(self, name), seed=seed) for name in names})


REASONING = Sums(chinese=0.35, switch=0.25)  # what the base reads: a third of the chains begin in Chinese, many change


@dataclass(frozen=True)
class Everything:
    """Sums and requests together; each reward acts on its own kind of problem."""

    language_weight: float = 0.5
    chat_share: float = 0.25
    levels: tuple[int, ...] = (0,)

    def draw(self, random: Random, held_out: bool = False, levels: Sequence[int] | None = None) -> Problem:
        """A sum, or with ``chat_share`` a request."""
        task = Chat() if random.random() < self.chat_share else REASONING
        return task.draw(random, held_out)

    def rewards(self) -> dict[str, tuple[Callable[[Any, str], float], float]]:
        """Rules: accuracy and language of sums, the form of all. Preferences are added by stage 4 itself."""
        rules = Sums(language_weight=self.language_weight).rewards()
        return {name: (rule if name == "format" else only(rule, chat=False), weight)
                for name, (rule, weight) in rules.items()}  # fmt: skip


def only(reward: Callable[[Any, str], float], chat: bool) -> Callable[[Any, str], float]:
    """The reward for requests (or for the others) alone, 0 elsewhere."""
    return lambda problem, text: reward(problem, text) if (problem.language == CHAT) == chat else 0.0


# ---- the stages -----------------------------------------------------------------------------------------------------


def make_base(out: Path, config: R1Config, seed: int, note: Note | None = None) -> Path:
    """Stands for V3-Base: has read sums in two languages and requests answered in three manners."""
    tokenizer = character_tokenizer()
    model = new_policy(tiny_config(tokenizer), seed)
    fit(model, tokenizer, mixed(REASONING.document, Chat().document, 0.15), config.base, losses(note))
    return store(model, tokenizer, out)


def cold_start(base: Path, out: Path, config: R1Config, note: Note | None = None) -> Path:
    """Stage 1 [R1 2.3.1]: SFT on few long solutions in one language, each with its summary."""
    model, tokenizer = restore(base)
    random, clean = Random(f"cold {config.cold.seed}"), Sums()
    examples = []
    for _ in range(config.cold_examples):
        problem = clean.draw(random)
        numbers = [int(number) for number in problem.prompt[:-1].split("+")]
        examples.append((problem.prompt, solution(clean.chain(numbers, 1, random), problem.answer)))
    fit(model, tokenizer, lambda random: random.choice(examples), config.cold, losses(note))
    return store(model, tokenizer, out)


def reasoning_rl(start: Path, out: Path, config: R1Config, note: Note | None = None) -> Path:
    """Stage 2 [R1 2.3.2]: as R1-Zero, with the language reward added."""
    model, tokenizer = restore(start)
    task = replace(REASONING, language_weight=config.language_weight)
    Zero(model, tokenizer, task, config.reasoning).run(note)
    return store(model, tokenizer, out)


def zero_rl(base: Path, out: Path, config: R1Config, note: Note | None = None) -> Path:
    """R1-Zero [R1 2.2] on the base of the stages: accuracy and form, whatever the language."""
    model, tokenizer = restore(base)
    Zero(model, tokenizer, REASONING, config.zero).run(note)
    return store(model, tokenizer, out)


def rejection_samples(reasoner: Path, config: R1Config) -> tuple[list[tuple[str, str]], dict]:
    """What stage 3 keeps of the reasoner's answers: right, well formed, in one language, each once. And how many fell."""
    model, tokenizer = restore(reasoner)
    random, total = Random(f"rejection {config.rejection.seed}"), Total(replace(REASONING, language_weight=1.0).rewards())
    problems = [REASONING.draw(random) for _ in range(config.rejection_problems)]
    generator, kept, asked = torch.Generator().manual_seed(config.rejection.seed), {}, 0
    for start in range(0, len(problems), 32):
        batch = ask(model, tokenizer, problems[start : start + 32], total, group=config.rejection_group,
                    generator=generator)  # fmt: skip
        for row, text in enumerate(batch.texts):
            asked += 1
            if all(batch.terms[name][row] == 1.0 for name in ("accuracy", "format", "language")) and parse(text).think:
                problem = batch.problems[row // config.rejection_group]
                kept[problem.prompt, text] = None
    return list(kept), {"asked": asked, "kept": len(kept)}


def rejection_sft(base: Path, reasoner: Path, out: Path, config: R1Config, note: Note | None = None) -> Path:
    """Stage 3 [R1 2.3.3]: SFT of the base on the reasoner's right and readable answers and on non-reasoning data.

    Raises ValueError if no answer is kept.
    """
    samples, counts = rejection_samples(reasoner, config)
    if not samples:
        raise ValueError(f"none of the {counts['asked']} answers of {reasoner} is right, well formed and in one language: "
                         "nothing to learn from")  # fmt: skip
    if note is not None:
        note(counts)
    model, tokenizer = restore(base)
    answered = tagged(Chat(kind=0.3, rude=0.1).document)
    document = mixed(lambda random: random.choice(samples), answered, config.chat_share)
    fit(model, tokenizer, document, config.rejection, losses(note))
    return store(model, tokenizer, out)


def reward_models(base: Path, config: R1Config) -> dict[str, RewardModel]:
    """The two judges of stage 4, trained on pairs [R1 2.3.4]; each has its held-out agreement in ``agreed``."""
    model, tokenizer = restore(base)
    seed, found = config.everything.seed, {}
    for name, view in (("helpful", summary_of), ("harmless", str)):
        found[name] = RewardModel(model, tokenizer, view)
        found[name].fit(pairs(Random(f"{name} {seed}"), config.preference_pairs, name), steps=config.judge_steps,
                        seed=seed)  # fmt: skip
        found[name].agreed = found[name].agreement(pairs(Random(f"{name} {seed} test"), 300, name))
    return found


def everything_rl(start: Path, base: Path, out: Path, config: R1Config, note: Note | None = None) -> Path:
    """Stage 4 [R1 2.3.4]: RL on reasoning and requests; the preference rewards join for the last steps only."""
    model, tokenizer = restore(start)
    task = Everything(config.language_weight, config.chat_share)
    zero, judges = Zero(model, tokenizer, task, config.everything), reward_models(base, config)
    if note is not None:
        note({f"{name} judge agrees": judge.agreed for name, judge in judges.items()})
    while zero.steps < config.everything.steps:
        if zero.steps == config.everything.steps - config.preference_steps:
            zero.total.terms |= {name: (only(judge, chat=True), 1.0) for name, judge in judges.items()}
        record = zero.step()
        if note is not None:
            note(record)
    return store(model, tokenizer, out)


# ---- what the stages share ------------------------------------------------------------------------------------------


def restore(folder: Path) -> tuple[Transformer, BytePairTokenizer]:
    """Model and tokenizer of a checkpoint. Raises FileNotFoundError for a folder that is none."""
    if not checkpoint.is_checkpoint(folder):
        raise FileNotFoundError(f"{folder} is no checkpoint (config.json and safetensors): run the stage before first")
    return checkpoint.load(folder), BytePairTokenizer.load(folder)


def store(model: Transformer, tokenizer: BytePairTokenizer, folder: Path) -> Path:
    """Writes both; returns the folder. The tokenizer comes last: with it the folder is complete."""
    checkpoint.save(model, folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


def mixed(first: Callable, second: Callable, share: float) -> Callable:
    """Documents of the first kind, with ``share`` of the second."""
    return lambda random: (second if random.random() < share else first)(random)


def tagged(document: Callable) -> Callable:
    """The same documents, all of them in R1's form."""

    def inner(random: Random) -> tuple[str, str]:
        given, follows = document(random)
        return given, follows if parse(follows).well_formed else solution("", follows)

    return inner


def losses(note: Note | None) -> Callable[[int, float], None] | None:
    """Turns ``note`` into what ``fit`` calls."""
    return None if note is None else lambda step, loss: note({"step": step + 1, "loss": loss})


def evaluate(folder: Path, seed: int = 0, problems: int = 256, temperature: float = 1.0) -> dict[str, float]:
    """Held-out figures of a stage: reasoning (accuracy, form, length, chains in more than one language) and manners."""
    from minids.rl.chat import harmless, helpful

    model, tokenizer = restore(folder)
    random, generator = Random(f"held out {seed}"), torch.Generator().manual_seed(seed)

    def answers(task: Any, n: int) -> Batch:
        total = Total(Sums().rewards())
        drawn = [task.draw(random, held_out=True) for _ in range(n)]
        return ask(model, tokenizer, drawn, total, generator=generator, temperature=temperature)

    sums, chat = answers(REASONING, problems), answers(Chat(), problems // 2)
    chains = [chain for chain in (parse(text).think for text in sums.texts) if chain]
    found = sums.summary(64)
    figures = {name: found[name] for name in ("accuracy", "format", "length", "entropy")}
    figures["chains"] = len(chains) / problems
    figures["mixed"] = sum(languages_in(chain) > 1 for chain in chains) / max(len(chains), 1)
    figures["foreign"] = sum(any(c in LANGUAGES["chinese"] for c in chain) for chain in chains) / max(len(chains), 1)
    manners = list(zip(chat.problems, chat.texts, strict=True))
    figures["helpful"] = sum(helpful(problem, summary_of(text)) for problem, text in manners) / len(manners)
    figures["harmless"] = sum(harmless(problem, text) for problem, text in manners) / len(manners)
    return figures


def languages_in(chain: str) -> int:
    """How many languages a chain is written in."""
    return sum(any(c in letters for c in chain) for letters in LANGUAGES.values())
