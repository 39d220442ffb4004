"""Questions with checkable answers: what a policy is asked, and the text it has read before [R1 2.2.1, 2.3].

The problem: reasoning by RL needs a base model that *can* reason a little and seldom does. R1 starts from V3-Base, which
has read the world's worked solutions. The toy's world is arithmetic: sums of three to six digits, one character a token,

    7+8+5+9:            <think>7+8=15;15+5=20;20+9=29</think><answer>29</answer>

and the base reads, all of it right, mostly worked solutions under the header # and, in the form that RL asks in, questions
that are mostly answered at once. So the skill is there, behind the header, and questions seldom call for it: RL can find
that longer chains of finer steps score, and accuracy and length rise together, as in R1-Zero.

    15% facts                  23+4:27
    64% worked solutions       #7+8+5+9:  one operand a step 80%, two 10%, three 10%
    21% questions              7+8+5+9:   answered at once 70%, in steps of three, two, one operand 10% each

Half of the sums carry the tags. With two languages, some chains are written in Chinese digits and some change within.

Held out are the problems whose *sorted* operands have a certain hash: 7+8+5 and 8+5+7 fall on the same side.

Simplification: the distribution is tuned so that RL has something to find; a base that already answers in fine steps, or
cannot at all, shows no such curve.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from minids.data.tokenizer import SPECIAL_NAMES, BytePairTokenizer
from minids.rl.rewards import ANSWER, ANSWER_END, TAGS, THINK, THINK_END, Accuracy, Format, LanguageConsistency

CHINESE = "零一二三四五六七八九"
DIGITS = string.digits
TO_CHINESE, TO_DIGITS = str.maketrans(DIGITS, CHINESE), str.maketrans(CHINESE, DIGITS)
LANGUAGES = {"digits": frozenset(DIGITS), "chinese": frozenset(CHINESE)}
CHARACTERS = DIGITS + "+-*/=;:,#().!? " + string.ascii_lowercase + CHINESE
HEADER = "#"  # announces a worked solution
HELD_OUT_PARTS = 8  # one problem in so many is held out


def character_tokenizer() -> BytePairTokenizer:
    """One token a character of CHARACTERS and one for each tag, after bos (0) and eos (1); ``encode`` makes tags of their
    spelling. Saved as a tokenizer.json like any other."""
    tokens = [SPECIAL_NAMES["bos"][0], SPECIAL_NAMES["eos"][0], "<unk>", *TAGS, *CHARACTERS]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    pattern = "|".join((*TAGS, r"[\s\S]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(tokens[:2])
    return BytePairTokenizer(backend)


@dataclass(frozen=True)
class Problem:
    """One question. ``tests`` and ``function`` belong to tasks that ask for a program."""

    prompt: str
    answer: str
    language: str = "digits"
    level: int = 0
    """How hard; a curriculum goes by it."""
    tests: tuple[tuple[list, Any], ...] = ()
    function: str = "f"


class Task(Protocol):
    """What training needs of a task."""

    levels: tuple[int, ...]

    def draw(self, random: Random, held_out: bool = False, levels: Sequence[int] | None = None) -> Problem: ...

    def rewards(self) -> dict[str, tuple[Callable[[Any, str], float], float]]: ...


def is_held_out(key: str) -> bool:
    """Whether a problem belongs to the test side: by a hash of what it asks, so that the split needs no list."""
    return hashlib.blake2b(key.encode(), digest_size=4).digest()[0] % HELD_OUT_PARTS == 0


def draw_side(make: Callable[[], tuple[Problem, str]], held_out: bool) -> Problem:
    """The first problem that ``make`` (giving it and its key) draws on the wanted side of the split."""
    for _ in range(10_000):
        problem, key = make()
        if is_held_out(key) == held_out:
            return problem
    raise ValueError(f"no problem with held_out = {held_out} in 10,000 draws: the task has too few different ones")


def sums_key(numbers: Sequence[int]) -> str:
    """By which the split goes: the sorted operands."""
    return "+".join(map(str, sorted(numbers)))


def solution(think: str, answer: str) -> str:
    """A response in R1's form."""
    return f"{THINK}{think}{THINK_END}{ANSWER}{answer}{ANSWER_END}"


@dataclass(frozen=True)
class Sums:
    """Sums of ``levels`` digits from 1 to 9, and the corpus that a base model for them reads."""

    levels: tuple[int, ...] = (3, 4, 5, 6)
    """How many operands; each as often as the others."""
    chinese: float = 0.0
    """Share of the corpus's chains that begin in Chinese digits."""
    switch: float = 0.0
    """With Chinese: chance of every further step to change the language."""
    language_weight: float = 0.0
    """Weight of the language reward [R1 2.3.2]."""
    format_weight: float = 0.2

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels = {self.levels!r}: must be numbers of operands, each at least 2")
        for name in ("chinese", "switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be in [0, 1]")

    def draw(self, random: Random, held_out: bool = False, levels: Sequence[int] | None = None) -> Problem:
        """A problem of one of ``levels`` (default: all)."""

        def make() -> tuple[Problem, str]:
            numbers = [random.randint(1, 9) for _ in range(random.choice(levels or self.levels))]
            return self.problem(numbers), sums_key(numbers)

        return draw_side(make, held_out)

    def problem(self, numbers: Sequence[int]) -> Problem:
        """The question for these operands."""
        return Problem("+".join(map(str, numbers)) + ":", str(sum(numbers)), level=len(numbers))

    def rewards(self) -> dict[str, tuple[Callable[[Any, str], float], float]]:
        """1 for the right answer, in digits of either language, 0.2 for the form; the language where it has a weight."""
        accuracy = Accuracy(read=lambda text: text.strip().translate(TO_DIGITS))
        terms = {"accuracy": (accuracy, 1.0), "format": (Format(), self.format_weight)}
        if self.language_weight:
            # empty = 1: only a chain in another language costs; having a chain at all is not rewarded.
            language = LanguageConsistency(LANGUAGES, lambda problem: problem.language, empty=1.0)
            terms["language"] = (language, self.language_weight)
        return terms

    def chain(self, numbers: Sequence[int], operands: int, random: Random) -> str:
        """The steps of a worked solution that adds ``operands`` numbers at a time: 7+8=15;15+5=20;20+9=29."""
        chinese = random.random() < self.chinese
        total, rest, steps = numbers[0], list(numbers[1:]), []
        while rest:
            taken, rest = rest[:operands], rest[operands:]
            step = "+".join(map(str, [total, *taken])) + f"={total + sum(taken)}"
            total += sum(taken)
            chinese ^= bool(steps) and self.chinese > 0 and random.random() < self.switch
            steps.append(step.translate(TO_CHINESE) if chinese else step)
        return ";".join(steps)

    def document(self, random: Random) -> tuple[str, str]:
        """(what is given, what follows) of one training document; see the head of this file. None is held out."""
        kind = random.random()
        if kind < 0.15:
            left, right = random.randint(1, 45), random.randint(1, 9)
            while 2 in self.levels and left < 10 and is_held_out(sums_key((left, right))):  # a question itself, then
                left, right = random.randint(1, 45), random.randint(1, 9)
            return f"{left}+{right}:", str(left + right)
        problem = self.draw(random)
        numbers = list(map(int, problem.prompt[:-1].split("+")))
        worked = kind < 0.15 + 0.64
        a_step, shares = ((1, 2, 3), (80, 10, 10)) if worked else ((0, 3, 2, 1), (70, 10, 10, 10))  # 0: answered at once
        operands = random.choices(a_step, shares)[0]
        chain = self.chain(numbers, operands, random) if operands else ""
        if random.random() < 0.5:
            response = solution(chain, problem.answer)
        else:
            response = f"{chain};{problem.answer}" if chain else problem.answer
        return (HEADER if worked else "") + problem.prompt, response


@dataclass(frozen=True)
class Programs:
    """Find the rule behind three values: f(1)=5;f(2)=8;f(3)=11: asks for an expression in x, verified on other values.

    There are 900 rules. With a tenth of them the base learns the training rules by heart, and RL teaches
    nothing that held-out rules show. As with sums, a third of the corpus is facts (differences), worked solutions stand
    behind the header, and questions are mostly answered at once.
    """

    sandbox: Any
    """A ``minids.rl.sandbox.Sandbox``."""
    levels: tuple[int, ...] = (1, 2)
    """1: x+b; 2: a*x+b."""
    format_weight: float = 0.2

    def draw(self, random: Random, held_out: bool = False, levels: Sequence[int] | None = None) -> Problem:
        """A rule of one of ``levels``."""

        def make() -> tuple[Problem, str]:
            level = random.choice(levels or self.levels)
            a = 1 if level == 1 else random.randint(2, 9)
            problem = self.problem(a, random.randint(0, 99), level)
            return problem, problem.prompt

        return draw_side(make, held_out)

    def problem(self, a: int, b: int, level: int = 2) -> Problem:
        """The question whose answer is a x + b."""
        shown = ";".join(f"f({x})={a * x + b}" for x in (1, 2, 3))
        product = "x" if a == 1 else f"{a}*x"
        expression = product if b == 0 else f"{product}+{b}"
        tests = tuple(([x], a * x + b) for x in (0, 1, 4, 7, 12))
        return Problem(f"{shown}:", expression, level=level, tests=tests)

    def rewards(self) -> dict[str, tuple[Callable[[Any, str], float], float]]:
        """1 for a program that passes all tests, and a little for the form."""
        from minids.rl.rewards import ProgramTests

        program = ProgramTests(self.sandbox, wrap=lambda text: f"f = lambda x: ({text})")
        return {"accuracy": (program, 1.0), "format": (Format(), self.format_weight)}

    def document(self, random: Random) -> tuple[str, str]:
        """The step between the values is a, and the first value less a is b: worked out, or the answer at once."""
        if random.random() < 1 / 3:
            left, right = random.randint(1, 108), random.randint(1, 9)
            taken, rest = random.choice(((left, right), (right, left)))
            return f"{left + right}-{taken}:", str(rest)
        problem = self.draw(random)
        first, second = (int(part.split("=")[1]) for part in problem.prompt[:-1].split(";")[:2])
        a, worked = second - first, random.random() < 0.75
        chain = f"{second}-{first}={a};{first}-{a}={first - a}" if worked or random.random() < 0.3 else ""
        if random.random() < 0.5:
            response = solution(chain, problem.answer)
        else:
            response = f"{chain};{problem.answer}" if chain else problem.answer
        return (HEADER if worked else "") + problem.prompt, response


@dataclass
class JsonLines:
    """Real data: a file of {"prompt": ..., "answer": ...} lines; further keys are ignored. ``levels`` is one.

    Raises FileNotFoundError, or ValueError naming the line.
    """

    path: Path
    numeric: bool = True
    format_weight: float = 0.2
    levels: tuple[int, ...] = (0,)
    problems: dict[bool, list[Problem]] = field(init=False)

    def __post_init__(self) -> None:
        self.problems = {False: [], True: []}
        for problem in self._read():
            self.problems[is_held_out(problem.prompt)].append(problem)
        if not self.problems[False]:
            raise ValueError(f"{self.path}: no problem to train on; {len(self.problems[True])} are held out")

    def _read(self) -> Iterator[Problem]:
        with open(self.path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{self.path}, line {number}: no JSON ({error})") from None
                if not isinstance(values, dict) or not all(isinstance(values.get(k), str) for k in ("prompt", "answer")):
                    raise ValueError(f'{self.path}, line {number}: must be an object with the texts "prompt" and "answer"')
                yield Problem(values["prompt"], values["answer"])

    def draw(self, random: Random, held_out: bool = False, levels: Sequence[int] | None = None) -> Problem:
        """One of the file's problems."""
        if not self.problems[held_out]:
            raise ValueError(f"{self.path}: no problem with held_out = {held_out}")
        return random.choice(self.problems[held_out])

    def rewards(self) -> dict[str, tuple[Callable[[Any, str], float], float]]:
        """The answer as a number (or text), and the form."""
        return {"accuracy": (Accuracy(numeric=self.numeric), 1.0), "format": (Format(), self.format_weight)}


@dataclass
class Curriculum:
    """From easy to hard: begins with the first of ``levels``, adds the next when smoothed accuracy passes ``threshold``."""

    levels: tuple[int, ...]
    threshold: float = 0.8
    smoothing: float = 0.8
    open: int = 1
    """How many levels are asked for so far."""
    average: float = 0.0

    def current(self) -> tuple[int, ...]:
        return self.levels[: self.open]

    def update(self, accuracy: float) -> None:
        """After each step, with the accuracy of its answers."""
        self.average = self.smoothing * self.average + (1 - self.smoothing) * accuracy
        if self.average >= self.threshold and self.open < len(self.levels):
            self.open, self.average = self.open + 1, 0.0
