"""Tasks: everything in the corpus is true, the split is kept, shares are those that the docstring promises."""

import json
import re
from collections import Counter
from fractions import Fraction
from random import Random

import pytest

from minids.rl.arithmetic import value
from minids.rl.rewards import Total, parse
from minids.rl.sandbox import Sandbox
from minids.rl.tasks import (
    TO_DIGITS,
    Curriculum,
    JsonLines,
    Programs,
    Sums,
    character_tokenizer,
    is_held_out,
    solution,
)


def operands(prompt):
    return sorted(map(int, prompt.strip("#:").split("+")))


@pytest.mark.parametrize("task", [Sums(), Sums(levels=(3, 8)), Sums(chinese=0.5, switch=0.5)])
def test_every_document_is_right_and_none_is_held_out(task):
    random, tokenizer = Random(0), character_tokenizer()
    for _ in range(3000):
        given, follows = task.document(random)
        assert tokenizer.decode(tokenizer.encode(given + follows)) == given + follows
        assert 2 not in tokenizer.encode(given + follows)  # <unk>
        parsed = parse(follows)
        steps = (parsed.think if parsed.well_formed else follows).translate(TO_DIGITS).split(";")
        final = (parsed.answer if parsed.well_formed else steps.pop()).translate(TO_DIGITS)
        numbers = operands(given)
        assert value(final) == sum(numbers)
        for step in filter(None, steps):
            left, right = step.split("=")
            assert value(left) == value(right) == Fraction(right)
        if len(numbers) > 2:
            assert not is_held_out("+".join(map(str, numbers)))


def test_shares_are_the_documented_ones():
    random, kinds, n = Random(1), Counter(), 20_000
    for _ in range(n):
        given, follows = Sums().document(random)
        think = parse(follows).think if "<think>" in follows else ";".join(follows.split(";")[:-1])
        kind = "worked" if given[0] == "#" else "fact" if given.count("+") == 1 else "question"
        per_step = think.split(";")[0].count("+") if think else 0
        kinds[kind] += 1
        if given.count("+") == 5 or kind == "fact":  # with six operands, steps of three can be told from steps of all
            kinds[kind, per_step] += 1
            kinds[kind, "tags"] += "<think>" in follows
            kinds[kind, "six"] += 1
    wanted = {"fact": 0.15, "worked": 0.64, "question": 0.21}
    assert all(abs(kinds[k] / n - share) < 0.012 for k, share in wanted.items())
    for kind, shares in {"worked": (0, 80, 10, 10), "question": (70, 10, 10, 10)}.items():
        found = [100 * kinds[kind, i] / kinds[kind, "six"] for i in range(4)]
        assert found == pytest.approx(shares, abs=6), (kind, found)
        assert kinds[kind, "tags"] / kinds[kind, "six"] == pytest.approx(0.5, abs=0.06)


def test_the_split_keeps_permutations_together():
    random, sides = Random(2), Counter()
    for _ in range(400):
        held_out = Sums().draw(random, held_out=True)
        assert is_held_out("+".join(map(str, operands(held_out.prompt))))
        sides[held_out.level] += 1
        again = list(map(int, held_out.prompt[:-1].split("+")))
        random.shuffle(again)
        assert is_held_out("+".join(map(str, sorted(again))))
    assert set(sides) == {3, 4, 5, 6}
    assert {Sums().draw(random, levels=(5,)).level for _ in range(20)} == {5}


def test_facts_hold_no_question_of_the_test_side():
    """With sums of two, a fact such as 3+4: is a question itself."""
    task, random = Sums(levels=(2, 3)), Random(5)
    short = [given for given, _ in (task.document(random) for _ in range(4000)) if given.count("+") == 1]
    small = [given for given in short if all(number < 10 for number in operands(given.removeprefix("#")))]
    assert len(small) > 500 and max(sum(operands(given.removeprefix("#"))) for given in short) > 18
    for given in small:
        assert not is_held_out("+".join(map(str, sorted(operands(given.removeprefix("#"))))))


def test_languages():
    random = Random(3)
    mixed = [Sums(chinese=0.35, switch=0.25).chain([1, 2, 3, 4, 5, 6], 1, random) for _ in range(3000)]
    begins = [bool(re.match("[零一二三四五六七八九]", chain)) for chain in mixed]
    assert sum(begins) / 3000 == pytest.approx(0.35, abs=0.03)
    steps = [chain.split(";") for chain in mixed]
    changes = [sum(a.isascii() != b.isascii() for a, b in zip(s, s[1:], strict=False)) for s in steps]
    assert sum(changes) / (4 * 3000) == pytest.approx(0.25, abs=0.02)
    assert all(chain.isascii() for chain in (Sums(switch=0.5).chain([1, 2, 3], 1, random) for _ in range(50)))


def test_rewards_of_sums():
    task = Sums(language_weight=0.5)
    total, problem = Total(task.rewards()), task.problem([7, 8, 5, 9])
    assert (problem.prompt, problem.answer, problem.level) == ("7+8+5+9:", "29", 4)
    assert total(problem, solution("7+8=15;15+5=20;20+9=29", "29"))[0] == pytest.approx(1.7)
    assert total(problem, solution("七+八=一五;15+5=20", "二九"))[0] == pytest.approx(1.2 + 0.5 * 5 / 9)
    assert total(problem, solution("", "29"))[0] == pytest.approx(1.7)  # no chain is no change of language
    assert total(problem, "29")[0] == pytest.approx(0.5) and total(problem, solution("", "28"))[0] == pytest.approx(0.7)
    assert "language" not in Sums().rewards()


def test_programs_are_verified_by_running_them():
    with Sandbox() as sandbox:
        task = Programs(sandbox)
        total, random = Total(task.rewards()), Random(4)
        for _ in range(30):
            problem = task.draw(random)
            given, follows = task.document(random)
            assert total(problem, solution("", problem.answer))[1] == {"accuracy": 1.0, "format": 1.0}
            assert "<unk>" not in character_tokenizer().decode(character_tokenizer().encode(given + follows))
        rule = task.problem(3, 2)
        assert (rule.prompt, rule.answer) == ("f(1)=5;f(2)=8;f(3)=11:", "3*x+2")
        answers = {"2+x*3": 1.0, "x+x+x+2": 1.0, "3*x+1": 0.0, "5": 0.0, "": 0.0, "[5,8,11][x-1]": 0.0,
                   "__import__('os').fork()": 0.0}  # fmt: skip
        assert {a: total(rule, solution("", a))[1]["accuracy"] for a in answers} == answers


def test_the_corpus_of_programs_is_right_and_holds_no_rule_of_the_test_side():
    task, random, kinds, n = Programs(None), Random(6), Counter(), 6000
    for _ in range(n):
        given, follows = task.document(random)
        steps = re.findall(r"(\d+)-(\d+)=(\d+)", follows)
        assert all(int(a) - int(b) == int(c) for a, b, c in steps)
        kinds["tags"] += follows.startswith("<think>")
        if fact := re.fullmatch(r"(\d+)-(\d+):", given):
            kinds["fact"] += 1
            assert int(fact[1]) - int(fact[2]) == int(follows)
            continue
        assert not is_held_out(given.removeprefix("#"))
        values = [int(part.split("=")[1]) for part in given.removesuffix(":").split(";")]
        a, b = values[1] - values[0], 2 * values[0] - values[1]
        rule = ("x" if a == 1 else f"{a}*x") + (f"+{b}" if b else "")
        assert follows.removesuffix("</answer>").split("<answer>")[-1].split(";")[-1] == rule
        assert len(steps) == (2 if given.startswith("#") else len(steps)) and len(steps) in (0, 2)
        kinds["worked"] += given.startswith("#")
        kinds["at once"] += not steps
    shares = {"fact": 1 / 3, "tags": 1 / 3, "worked": 1 / 2, "at once": 2 / 3 * 0.25 * 0.7}
    assert all(kinds[kind] / n == pytest.approx(share, abs=0.025) for kind, share in shares.items()), kinds
    levels = {(task.draw(random, held_out=side).level, side) for side in (False, True) for _ in range(60)}
    assert levels == {(1, False), (2, False), (1, True), (2, True)}


def test_json_lines(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1), "source": "made"} for i in range(100)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    task, random = JsonLines(path), Random(5)
    assert sum(map(len, task.problems.values())) == 100 and 3 < len(task.problems[True]) < 30
    drawn = task.draw(random, held_out=True)
    assert is_held_out(drawn.prompt) and Total(task.rewards())(drawn, solution("", drawn.answer + ".0"))[0] == 1.2
    for bad, message in (("{", "line 2: no JSON"), ('{"prompt": "x"}', "line 2: must be an object"), ("[1]", "line 2")):
        path.write_text(json.dumps(rows[0]) + "\n" + bad + "\n")
        with pytest.raises(ValueError, match=message):
            JsonLines(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no problem to train on"):
        JsonLines(path)
    with pytest.raises(FileNotFoundError):
        JsonLines(tmp_path / "none.jsonl")


def test_curriculum_opens_a_level_at_a_time():
    curriculum = Curriculum((3, 4, 5), threshold=0.8, smoothing=0.5)
    seen = []
    for _ in range(12):
        seen.append(curriculum.current())
        curriculum.update(1.0)
    assert [len(levels) for levels in seen] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    curriculum.update(0.0)
    assert curriculum.current() == (3, 4, 5)


@pytest.mark.parametrize("bad", [{"levels": ()}, {"levels": (1, 3)}, {"chinese": 1.5}, {"switch": -0.1}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sums(**bad)
