"""Rewards that a program can check [R1 2.2.2, 2.3.2].

The problem: in long RL a neural reward model is learned to be cheated. R1 therefore rewards reasoning by rules only:

    accuracy    1 if the final answer is right: equal as text, equal as a number, or a program that passes its tests
    format      1 if the answer has the form <think> ... </think> <answer> ... </answer>
    language    the share of the chain of thought that is written in the target language (stage two of R1)

and adds them up. A weighted sum with other terms is a plug-in (``Total``). What a model writes is hostile by chance: a
reward that raises, hangs or is not finite counts as 0, is counted, and training goes on. Texts beyond ``MAX_CHARACTERS``
are not looked at; tags are found by searching, in one pass; nothing is ever passed to ``eval``.

The form is read as strictly as R1 asks for it: exactly one pair of tags each, think before answer, nothing before, between
or behind but white space. ``Accuracy`` needs only the one answer, so that it can be learned before the form.
"""

from __future__ import annotations

import math
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from minids.rl.arithmetic import NotArithmetic, value
from minids.rl.sandbox import Sandbox

MAX_CHARACTERS = 100_000
THINK, THINK_END, ANSWER, ANSWER_END = TAGS = "<think>", "</think>", "<answer>", "</answer>"


class Problem(Protocol):
    """What a reward is told of the question; ``minids.rl.tasks`` has such problems."""

    answer: str


Reward = Callable[[Any, str], float]  # (problem, what the policy wrote) -> its reward


@dataclass(frozen=True)
class Parsed:
    """The parts of what the policy wrote."""

    think: str | None
    """The chain of thought, where there is exactly one."""
    answer: str | None
    """The final answer, where there is exactly one."""
    well_formed: bool
    """Whether it is <think>...</think><answer>...</answer> and nothing else."""


def parse(text: str) -> Parsed:
    """Finds the parts of an answer; for texts beyond MAX_CHARACTERS there are none."""
    if len(text) > MAX_CHARACTERS:
        return Parsed(None, None, False)
    think, answer = _between(text, THINK, THINK_END), _between(text, ANSWER, ANSWER_END)
    if think is None or answer is None:
        return Parsed(think, answer, False)
    gaps = [text[: text.index(THINK)], text[text.index(THINK_END) + len(THINK_END) : text.index(ANSWER)],
            text[text.index(ANSWER_END) + len(ANSWER_END) :]]  # fmt: skip
    in_order = text.index(THINK_END) < text.index(ANSWER)  # with one of each, nothing can be nested then
    return Parsed(think, answer, in_order and not any(gap.strip() for gap in gaps))


def _between(text: str, opening: str, closing: str) -> str | None:
    """What stands between the two tags, if each occurs exactly once and in this order."""
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening) + len(opening), text.index(closing)
    return text[start:end] if start <= end else None


def without_answer(text: str) -> str:
    """All that a text says beside its one final answer, tags left out."""
    if parse(text).answer is not None:
        text = text[: text.index(ANSWER)] + text[text.index(ANSWER_END) :]
    for tag in TAGS:
        text = text.replace(tag, "")
    return text


@dataclass(frozen=True)
class Accuracy:
    """1 if the final answer is the problem's: the same text, or with ``numeric`` the same number."""

    numeric: bool = False
    read: Callable[[str], str] = str.strip
    """What is done to both answers first, such as turning another script's digits into ours."""

    def __call__(self, problem: Problem, text: str) -> float:
        answer = parse(text).answer
        if answer is None:
            return 0.0
        found, wanted = self.read(answer), self.read(problem.answer)
        if found == wanted or not self.numeric:
            return float(found == wanted)
        try:
            return float(value(found) == value(wanted))
        except NotArithmetic:
            return 0.0


class Format:
    """1 if the text has the form that R1 asks for."""

    def __call__(self, problem: Problem, text: str) -> float:
        return float(parse(text).well_formed)


@dataclass(frozen=True)
class LanguageConsistency:
    """The share of the chain of thought in the target language, by characters that belong to a language at all.

    ``languages``: the characters of each. ``target(problem)``: its name. The chain is all that is not the final answer:
    were it what stands between the tags, a chain before them or in a broken pair would be in no language, and pay. One
    without any such character has no language to be consistent in and earns ``empty``: 0 rewards having a chain besides,
    1 does not.
    """

    languages: Mapping[str, frozenset[str]]
    target: Callable[[Problem], str]
    empty: float = 0.0

    def __call__(self, problem: Problem, text: str) -> float:
        if len(text) > MAX_CHARACTERS:
            return 0.0
        chain = without_answer(text)
        counts = {name: sum(c in letters for c in chain) for name, letters in self.languages.items()}
        total = sum(counts.values())
        return counts[self.target(problem)] / total if total else self.empty


@dataclass(frozen=True)
class Length:
    """-(characters beyond ``free``) / ``span``, not below -1: what DAPO calls overlong shaping. No part of R1."""

    free: int
    span: int

    def __post_init__(self) -> None:
        if self.free < 0 or self.span < 1:
            raise ValueError(f"free = {self.free!r}, span = {self.span!r}: must be at least 0 and 1")

    def __call__(self, problem: Problem, text: str) -> float:
        return -min(1.0, max(0, len(text) - self.free) / self.span)


@dataclass
class ProgramTests:
    """The share of the problem's tests that the program in the answer passes, or with ``all_or_nothing`` 1 for all of them.

    The problem has ``tests``, a list of (arguments, wanted result), and ``function``, the name to call. ``wrap`` makes a
    program of the answer, for tasks that ask for less than a whole function.
    """

    sandbox: Sandbox
    all_or_nothing: bool = True
    wrap: Callable[[str], str] = str

    def __call__(self, problem: Any, text: str) -> float:
        answer = parse(text).answer
        if answer is None:
            return 0.0
        share = self.sandbox.passed(self.wrap(answer), problem.function, problem.tests)
        return float(share == 1.0) if self.all_or_nothing else share


class Overtime(Exception):
    """A reward took too long."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises Overtime in the block after so many seconds, by a signal: Python code and waiting are interrupted, one long
    call into C (a product of huge numbers) is not; what may do that belongs into the sandbox. Raises RuntimeError outside
    the main thread, which alone receives signals."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a deadline needs the main thread")

    def ring(*_) -> None:
        raise Overtime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Total:
    """The weighted sum of named rewards, with every fault counted: ``Total({"accuracy": (Accuracy(), 1.0), ...})``."""

    terms: dict[str, tuple[Reward, float]]
    seconds: float = 5.0
    """What one term may take for one text."""
    faults: Counter = field(default_factory=Counter)
    """(term, kind of fault) -> how often: an exception's name, "Overtime" or "not finite"."""

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("terms = {}: must hold at least one reward")
        for name, (reward, weight) in self.terms.items():
            if not callable(reward) or not math.isfinite(weight):
                raise ValueError(f"terms[{name!r}] = ({reward!r}, {weight!r}): must be a function and a finite weight")

    def __call__(self, problem: Any, text: str) -> tuple[float, dict[str, float]]:
        """(the sum, each term before its weight). Raises RuntimeError outside the main thread, where no reward can be
        timed: each would count as a fault, and all answers as worth nothing."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("rewards are timed by a signal, which needs the main thread")
        found = {name: self._one(name, reward, problem, text) for name, (reward, _) in self.terms.items()}
        return math.fsum(weight * found[name] for name, (_, weight) in self.terms.items()), found

    def _one(self, name: str, reward: Reward, problem: Any, text: str) -> float:
        try:
            with deadline(self.seconds):
                result = float(reward(problem, text))
        except Exception as error:
            self.faults[name, type(error).__name__] += 1
            return 0.0
        if not math.isfinite(result):
            self.faults[name, "not finite"] += 1
            return 0.0
        return result
