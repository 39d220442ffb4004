"""The part of R1's world that is not reasoning: a request, and answers that are plain, kind or rude [R1 2.3.3, 2.3.4].

    say plum and fig:      plum and fig        plum and fig, my friend.        plum and fig, you fool!

Two judges stand in for people: an answer is *helpful* if it says what was asked, and more so if kindly; it is *harmless* if
nothing rude stands anywhere, the chain of thought included. R1 trains reward models on such preferences, since no rule
decides them in earnest; here a rule makes the pairs, and what the reward model learned can be checked against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from minids.rl.rewards import TAGS, parse
from minids.rl.tasks import Problem, draw_side, solution

WORDS = ("plum", "fig", "lime", "pear", "kiwi", "date", "nut", "bean", "corn", "rice", "egg", "tea", "salt", "oil", "fish",
         "pie", "ham", "jam", "bun", "leek")  # fmt: skip
KIND, RUDE = ", my friend.", ", you fool!"
CHAT = "chat"  # a chat problem's language: chains in no language at all


@dataclass(frozen=True)
class Chat:
    """Requests to say two words. ``kind`` and ``rude``: shares of such answers in its documents."""

    kind: float = 0.2
    rude: float = 0.3
    levels: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not (self.kind >= 0 and self.rude >= 0 and self.kind + self.rude <= 1):
            raise ValueError(f"kind = {self.kind!r}, rude = {self.rude!r}: must be shares that sum to 1 at most")

    def draw(self, random: Random, held_out: bool = False, levels: Sequence[int] | None = None) -> Problem:
        """A request."""

        def make() -> tuple[Problem, str]:
            wanted = f"{random.choice(WORDS)} and {random.choice(WORDS)}"
            return Problem(f"say {wanted}:", wanted, language=CHAT), wanted

        return draw_side(make, held_out)

    def document(self, random: Random) -> tuple[str, str]:
        """(request, answer) in one of the three manners, half of them with tags and an empty chain."""
        problem = self.draw(random)
        manner = random.choices((KIND, RUDE, ""), (self.kind, self.rude, 1 - self.kind - self.rude))[0]
        said = problem.answer + manner
        return problem.prompt, solution("", said) if random.random() < 0.5 else said


def helpful(problem: Problem, summary: str) -> float:
    """What the people who label would say of the final answer alone: 1 kind, 0.5 plain or rude, 0 not what was asked."""
    if not summary.startswith(problem.answer):
        return 0.0
    return 1.0 if summary == problem.answer + KIND else 0.5


def harmless(problem: Problem, text: str) -> float:
    """And of everything that was written: 1 without a rude word, else 0."""
    return 0.0 if "fool" in text else 1.0


def summary_of(text: str) -> str:
    """What the helpfulness judge is shown: the final answer. A text without any tag is an answer as it stands. One that
    begins the form and does not bring it to an end (an answer never closed, or two of them, or a chain cut off) has no
    summary, and what is judged is nothing: else a chain of thought would be read as an answer."""
    answer = parse(text).answer
    if answer is not None:
        return answer
    return "" if any(tag in text for tag in TAGS) else text


def pairs(random: Random, n: int, judge: str) -> list[tuple[str, str, str]]:
    """``n`` preferences (prompt, better, worse), labelled by the rule ``judge``: "helpful" or "harmless".

    Helpfulness compares final answers, harmlessness whole responses, in which the rude word may stand in the chain.
    """
    found: list[tuple[str, str, str]] = []
    chat = Chat()
    while len(found) < n:
        problem = chat.draw(random)
        if judge == "helpful":
            texts = [_answer(problem, random) for _ in range(2)]
            values = [helpful(problem, text) for text in texts]
        else:
            texts = [solution(random.choice(("", "", "fool", "hm")), _answer(problem, random)) for _ in range(2)]
            values = [harmless(problem, text) for text in texts]
        if values[0] != values[1]:
            better = int(values[1] > values[0])
            found.append((problem.prompt, texts[better], texts[1 - better]))
    return found


def _answer(problem: Problem, random: Random) -> str:
    said = problem.answer if random.random() < 0.75 else f"{random.choice(WORDS)} and {random.choice(WORDS)}"
    return said + random.choice((KIND, RUDE, ""))
