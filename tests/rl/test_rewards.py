"""Each reward on cases by hand, 200 hostile texts through all of them, and faults that must not stop training."""

import math
import threading
import time
from dataclasses import dataclass, field

import pytest

from minids.rl.rewards import (
    MAX_CHARACTERS,
    Accuracy,
    Format,
    LanguageConsistency,
    Length,
    ProgramTests,
    Total,
    deadline,
    parse,
)
from minids.rl.sandbox import Limits, Sandbox

LANGUAGES = {"digits": frozenset("0123456789"), "chinese": frozenset("零一二三四五六七八九十")}


@dataclass
class Question:
    answer: str
    language: str = "digits"
    function: str = "f"
    tests: list = field(default_factory=lambda: [([2], 4), ([3], 9)])


def full(think="1+1=2", answer="2"):
    return f"<think>{think}</think><answer>{answer}</answer>"


@pytest.mark.parametrize(("text", "think", "answer", "form"), [
    (full("a", "b"), "a", "b", True), (" <think>a</think>\n<answer>b</answer>\n", "a", "b", True),
    (full("", ""), "", "", True),
    ("<answer>b</answer>", None, "b", False), ("<answer>b</answer><think>a</think>", "a", "b", False),
    ("x" + full("a", "b"), "a", "b", False), (full("a", "b") + "x", "a", "b", False),
    ("<think>a</think>x<answer>b</answer>", "a", "b", False), (full("a", "b") + full("a", "b"), None, None, False),
    ("<think>a<answer>b</answer></think>", "a<answer>b</answer>", "b", False),
    ("<think>a</think><answer>b", "a", None, False),
    ("<think>a<answer>b</think>c</answer>", "a<answer>b", "b</think>c", False),
    ("</answer>b<answer>", None, None, False),
    ("<think><think>a</think><answer>b</answer>", None, "b", False),
    ("<THINK>a</THINK><ANSWER>b</ANSWER>", None, None, False),
    ("", None, None, False), ("<think>a</think><answer>b</answer><answer>c</answer>", "a", None, False),
])  # fmt: skip
def test_parsing(text, think, answer, form):
    parsed = parse(text)
    assert (parsed.think, parsed.answer, parsed.well_formed) == (think, answer, form)
    assert Format()(Question("b"), text) == float(form)


def test_accuracy_as_text_and_as_number():
    assert Accuracy()(Question("12"), full(answer=" 12 ")) == 1.0
    assert Accuracy()(Question("12"), full(answer="12.0")) == 0.0
    numeric = Accuracy(numeric=True)
    answers = ("1/2", "0.50", "(3-2)/2", "0.5001", "x", "")
    assert [numeric(Question("0.5"), full(answer=a)) for a in answers] == [1, 1, 1, 0, 0, 0]
    for same in ("x^2", "Paris", "B", "3" * 40):  # no number that is read here, but the same text
        assert numeric(Question(same), full(answer=f" {same} ")) == 1.0
    assert [numeric(Question("B"), full(answer=a)) for a in ("C", "2", "b")] == [0, 0, 0]
    chinese = Accuracy(read=lambda text: text.strip().translate(str.maketrans("零一二三四五六七八九", "0123456789")))
    assert chinese(Question("29"), full(answer="二九")) == 1.0
    assert Accuracy()(Question("2"), "2") == 0.0  # not where an answer belongs


def test_language_consistency():
    reward = LanguageConsistency(LANGUAGES, lambda problem: problem.language)
    assert reward(Question("2"), full("1+2=3")) == 1.0
    assert reward(Question("2", "chinese"), full("1+2=3")) == 0.0
    assert reward(Question("2"), full("1+二=三;9")) == 0.5
    assert reward(Question("2"), full("++")) == 0.0 and reward(Question("2"), "no chain") == 0.0
    assert LanguageConsistency(LANGUAGES, lambda problem: problem.language, empty=1.0)(Question("2"), full("")) == 1.0


@pytest.mark.parametrize("text", [
    "<think>七八<think></think>", "<think>七八", "七八<think></think>", "<think></think>七八",
    "<think>七</think><think>八</think>", "</think>七八<think>", "<think></think><answer>七八",
])  # fmt: skip
@pytest.mark.parametrize("empty", [0.0, 1.0])
def test_a_chain_beside_the_tags_or_in_broken_ones_does_not_hide_its_language(text, empty):
    reward = LanguageConsistency(LANGUAGES, lambda problem: problem.language, empty)
    assert reward(Question("2"), text + "<answer>2</answer>") <= 1 / 3
    assert reward(Question("2", "chinese"), text + "<answer>2</answer>") >= 2 / 3
    assert reward(Question("2"), full("", "二")) == empty  # the answer is no chain
    assert reward(Question("2"), "七" * (MAX_CHARACTERS + 1)) == 0.0


def test_length():
    assert [Length(4, 8)(None, "x" * n) for n in (0, 4, 8, 12, 99)] == [0, 0, -0.5, -1, -1]
    with pytest.raises(ValueError, match="span = 0"):
        Length(4, 0)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(Limits(cpu_seconds=1, wall_seconds=1.0)) as box:
        yield box


def test_programs(sandbox):
    square = Question("")
    whole = ProgramTests(sandbox)
    assert whole(square, full(answer="def f(x):\n    return x ** 2")) == 1.0
    assert whole(square, full(answer="def f(x):\n    return x + x")) == 0.0
    assert ProgramTests(sandbox, all_or_nothing=False)(square, full(answer="f = lambda x: x + x")) == 0.5
    wrapped = ProgramTests(sandbox, wrap=lambda text: f"f = lambda x: ({text})")
    assert wrapped(square, full(answer="x * x")) == 1.0 and wrapped(square, full(answer="x *")) == 0.0


BOMBS = [
    "9**9**9", "(lambda: [0] * 10**12)()", "__import__('os').system('touch {tmp}')", "while True: pass", ":(){ :|:& };:",
    "import os\nwhile True: os.fork()", "exec('x=1')", "eval('9**9**9')", "open('{tmp}', 'w')", "f = lambda x: f(x)",
    "import socket; socket.socket().connect(('127.0.0.1', 1))", "1" * 4000, "-" * 4000, "(" * 4000, "1+" * 2000 + "1",
    "1/0", "٤", "４", "²", "四", "\x00", "\ud800", "'; DROP TABLE rewards; --", "${jndi:ldap://x}", "{{7*7}}", "%s%s%s%n",
    "<answer>4</answer>", "</think>", "<think><think><think>", "</answer></answer>", "4 or 5", "4\n5", "four", "NaN",
    "inf", "-0", "1e309", "0x4", "4j", "True",
]  # fmt: skip
SHAPES = [lambda t: full(answer=t), lambda t: full(think=t, answer="5"), lambda t: t, lambda t: full(answer="5") + t,
          lambda t: f"<think>{t}<answer>4</answer>"]  # fmt: skip
HUGE = ["x" * 10**7, "<think>" * 10**6, "<think>" + "1" * 10**7 + "</think><answer>4</answer>",
        "<answer>4</answer>" * 500_000, "\ud800" * 10**6, "Question: 2^2 = ? " * 10**5]  # fmt: skip


def expected(shape: int, bomb: str) -> tuple[float, float]:
    """(accuracy, format) of a bomb in its shape, where 4 is right. Two give it as the one answer, without the form: a bare
    answer, and one in a chain that never ends; the bomb </think> ends it and so makes the form whole."""
    tagged = any(tag in bomb for tag in ("think>", "answer>"))
    right = (shape == 4 and "answer>" not in bomb) or (shape == 2 and bomb == "<answer>4</answer>")
    form = (shape < 2 and not tagged) or (shape == 4 and bomb == "</think>")
    return float(right), float(form)


def test_200_hostile_texts_get_the_right_reward_and_take_no_time(sandbox, tmp_path):
    question, mark = Question("4"), tmp_path / "was_here"
    total = Total({"accuracy": (Accuracy(), 1.0), "numeric": (Accuracy(numeric=True), 1.0), "format": (Format(), 1.0),
                   "language": (LanguageConsistency(LANGUAGES, lambda p: p.language), 1.0),
                   "program": (ProgramTests(sandbox), 1.0), "length": (Length(100, 100), 1.0)})  # fmt: skip
    cases = [(i, bomb) for bomb in BOMBS for i in range(len(SHAPES))]
    assert len(cases) == 200
    for i, bomb in cases:
        text, started = SHAPES[i](bomb.replace("{tmp}", str(mark))), time.monotonic()
        value, terms = total(question, text)
        assert time.monotonic() - started < 3.0, text[:60]
        assert (terms["accuracy"], terms["format"]) == expected(i, bomb), text[:60]
        assert terms["numeric"] == terms["accuracy"] and terms["program"] == 0.0
        assert 0 <= terms["language"] <= 1 and -1 <= terms["length"] <= 0 and value == pytest.approx(sum(terms.values()))
    assert total.faults == {} and not mark.exists()


@pytest.mark.parametrize("text", HUGE)
def test_huge_texts_are_not_looked_at(sandbox, text):
    assert len(text) > MAX_CHARACTERS
    rewards = [Accuracy(), Accuracy(numeric=True), Format(), ProgramTests(sandbox),
               LanguageConsistency(LANGUAGES, lambda p: p.language)]  # fmt: skip
    started = time.monotonic()
    assert [reward(Question("4"), text) for reward in rewards] == [0.0] * 5
    assert time.monotonic() - started < 0.5


def test_faults_count_as_zero_and_are_counted():
    def raises(problem, text):
        raise KeyError("x")

    def hangs(problem, text):
        while True:
            pass

    total = Total({"good": (lambda p, t: 1.0, 2.0), "raises": (raises, 5.0), "hangs": (hangs, 5.0),
                   "nan": (lambda p, t: math.nan, 5.0), "text": (lambda p, t: "high", 5.0)}, seconds=0.05)  # fmt: skip
    for _ in range(3):
        value, terms = total(Question("4"), "text")
        assert value == 2.0 and terms == {"good": 1.0, "raises": 0.0, "hangs": 0.0, "nan": 0.0, "text": 0.0}
    assert total.faults == {("raises", "KeyError"): 3, ("hangs", "Overtime"): 3, ("nan", "not finite"): 3,
                            ("text", "ValueError"): 3}  # fmt: skip


def test_outside_the_main_thread_rewards_are_refused_rather_than_zero():
    """No alarm rings there: each reward would be a fault, and a whole run worth nothing."""
    total, seen = Total({"accuracy": (Accuracy(), 1.0)}), []

    def work():
        try:
            seen.append(total(Question("2"), full()))
        except RuntimeError as error:
            seen.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["rewards are timed by a signal, which needs the main thread"] and total.faults == {}
    assert total(Question("2"), full())[0] == 1.0


def test_bad_settings():
    with pytest.raises(ValueError, match="at least one"):
        Total({})
    with pytest.raises(ValueError, match=r"terms\['x'\]"):
        Total({"x": (Accuracy(), math.inf)})


def test_a_deadline_leaves_no_alarm_behind():
    with deadline(0.02):
        pass
    time.sleep(0.05)
