"""The checks of notebook 04's exercises: silent on stubs, right answers pass, the usual mistakes are named."""

import pytest
import torch
from exercises import Lesson


@pytest.fixture(scope="module")
def lesson():
    return Lesson("04_mtp", {"1": "my_labels", "2": "my_join", "3": "my_mtp_term", "4": "my_tokens_a_pass"})


# ---- 1, labels -------------------------------------------------------------------------------------------------------


def labels(tokens, ids, k, ahead=1, left=0, fill=-100, borders=True):
    """Position by position."""
    out = []
    for i in range(len(tokens) - 1 - k):
        crosses = borders and int(ids[i + left]) != int(ids[i + k + ahead])
        out.append(fill if crosses else int(tokens[i + k + ahead]))
    return torch.tensor(out)


def rolled(tokens, ids, k):
    return tokens.roll(-(k + 1))[:-1]


def rolled_and_masked(tokens, ids, k):
    return torch.where(ids.roll(-(k + 1)) == ids, tokens.roll(-(k + 1)), -100)[:-1]


def in_place(tokens, ids, k):
    """The right labels, written into the given tokens."""
    wanted = tokens[k + 1 :]
    wanted[ids[k + 1 :] != ids[: -k - 1]] = -100
    return wanted


# ---- 2, what enters the block ----------------------------------------------------------------------------------------


def norm(x, gain, eps=1e-6):
    return gain * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def join(h, e, gain_e, gain_h, m, k, token=None, state=0, swap=False, normed=True, eps=1e-6):
    out = []
    for i in range(len(h) - k):
        a, b = e[i + (k if token is None else token)], h[i + state]
        pair = [norm(a, gain_e, eps), norm(b, gain_h, eps)] if normed else [a, b]
        out.append(m @ torch.cat(pair[::-1] if swap else pair))
    return torch.stack(out)


def one_norm(h, e, gain_e, gain_h, m, k):
    return norm(torch.cat([e[k:], h[:-k]], -1), torch.cat([gain_e, gain_h])) @ m.T


# ---- 3, the term -----------------------------------------------------------------------------------------------------


def term(nll, counts, n, lam):
    return lam * sum(x[c].sum() / n for x, c in zip(nll, counts, strict=True)) / len(nll)


# ---- 4, tokens a pass ------------------------------------------------------------------------------------------------


def tokens_a_pass(good):
    place = passes = 0
    while place < len(good):
        passes, place = passes + 1, place + 1 + next((k for k, ok in enumerate(good[place]) if not ok), good.shape[1])
    return place / passes


def passes_of(good):
    place = passes = 0
    while place < len(good):
        passes, place = passes + 1, place + 1 + next((k for k, ok in enumerate(good[place]) if not ok), good.shape[1])
    return passes


def shares(good):
    return [float(x) for x in good.double().mean(0)]


RIGHT = [("1", labels), ("2", join), ("3", term), ("4", tokens_a_pass)]


@pytest.mark.parametrize("number", "1234")
def test_a_stub_is_not_a_failure(lesson, capsys, number):
    lesson.silent(number, capsys)


@pytest.mark.parametrize("number, answer", RIGHT)
def test_right_answers_pass(lesson, capsys, number, answer):
    lesson.accepts(number, answer, capsys)


@pytest.mark.parametrize("wrong, hint", [
    (lambda t, i, k: labels(t, i, k, ahead=0), "that token has been read"),
    (lambda t, i, k: labels(t, i, k, borders=False), "cross from one document"),
    (lambda t, i, k: labels(t, i, k, left=k), "crossing counts from position i"),
    (rolled, "no torch.roll"),
    (rolled_and_masked, "T - k positions"),
    (lambda t, i, k: labels(t, i, k, fill=0), "0 is a token"),
    (lambda t, i, k: labels(t, i, k)[:-1], "not equal"),
    (in_place, "an input was overwritten"),
    (lambda t, i, k: labels(t, i, k, fill=-1), "not equal; -1 is what came, -100 what should"),
])  # fmt: skip
def test_wrong_labels_are_named(lesson, wrong, hint):
    lesson.refuses("1", wrong, hint)


@pytest.mark.parametrize("wrong, hint", [
    (lambda h, e, ge, gh, m, k: join(h, e, ge, gh, m, k, swap=True), "embedding first"),
    (lambda h, e, ge, gh, m, k: join(h, e, ge, gh, m, k, token=0), "i \\+ k, not i"),
    (lambda h, e, ge, gh, m, k: join(h, e, ge, gh, m, k, token=0, state=k), "the token runs ahead"),
    (lambda h, e, ge, gh, m, k: join(h, e, ge, gh, m, k, token=1), "belongs to depth 1"),
    (lambda h, e, ge, gh, m, k: join(h, e, gh, ge, m, k), "mixed up"),
    (lambda h, e, ge, gh, m, k: join(h, e, ge, gh, m, k, normed=False), "both halves are normed"),
    (one_norm, "a norm for each half"),
    (lambda h, e, ge, gh, m, k: join(h, e, 1, 1, m, k), "norms have gains"),
    (lambda *a: join(*a, eps=0), "needs its 1e-6"),
    (lambda h, e, ge, gh, m, k: (join(h, e, ge, gh, m, k), h.mul_(2))[0], "an input was overwritten"),
    (lambda h, e, ge, gh, m, k: join(torch.cat([h, h[:k]]), e.roll(-k, 0).repeat(2, 1), ge, gh, m, k, token=0),
     "have no token"),
    (lambda h, e, ge, gh, m, k: 2 * join(h, e, ge, gh, m, k), "not equal"),
])  # fmt: skip
def test_wrong_inputs_are_named(lesson, wrong, hint):
    lesson.refuses("2", wrong, hint)


def own_count(nll, counts, n, lam):
    return lam * sum(x[c].mean() for x, c in zip(nll, counts, strict=True)) / len(nll)


@pytest.mark.parametrize("wrong, hint", [
    (own_count, "its own labels"),
    (lambda nll, c, n, lam: lam * sum((x * y).mean() for x, y in zip(nll, c, strict=True)) / len(c), "divided by T - k"),
    (lambda nll, c, n, lam: len(nll) * term(nll, c, n, lam), "divide by D"),
    (lambda nll, c, n, lam: len(nll) * term(nll, c, n, lam) / 3, "not always 3"),
    (lambda nll, c, n, lam: 0.1 / lam * len(nll) * term(nll, c, n, lam), "divide by D"),
    (lambda nll, c, n, lam: term(nll, c, n, lam) / 2, "do not divide by B"),
    (lambda nll, c, n, lam: lam * nll[0][c[0]].sum() / n, "all depths count"),
    (lambda nll, c, n, lam: term(nll, c, n, 1.0), "lambda is missing"),
    (lambda nll, c, n, lam: lam * sum(x.sum() for x in nll) / n / len(nll), "do not count"),
    (lambda nll, c, n, lam: lam * torch.cat([x[y] for x, y in zip(nll, c, strict=True)]).mean(), "one mean"),
    (lambda nll, c, n, lam: n * term(nll, c, n, lam), "not divided by T"),
    (lambda nll, c, n, lam: -term(nll, c, n, lam), "not equal"),
])  # fmt: skip
def test_wrong_terms_are_named(lesson, wrong, hint):
    lesson.refuses("3", wrong, hint)


def unchained(good):
    place = passes = 0
    while place < len(good):
        passes, place = passes + 1, place + 1 + int(good[place].sum())
    return place / passes


@pytest.mark.parametrize("wrong, hint", [
    (lambda good: len(good) / passes_of(good), "also beyond N"),
    (lambda good: 1 / tokens_a_pass(good), "not passes a token"),
    (lambda good: 1 + sum(shares(good)), "only after a right first"),
    (lambda good: 1 + shares(good)[0] * (1 + shares(good)[1]), "not independent"),
    (lambda good: 1 + good.long().cumprod(1).double().mean(0).sum(), "over all positions"),
    (unchained, "after a wrong draft"),
    (lambda good: tokens_a_pass(good) - 1, "own token is missing"),
    (lambda good: 1.01 * tokens_a_pass(good), "not equal"),
])  # fmt: skip
def test_wrong_tokens_a_pass_are_named(lesson, wrong, hint):
    lesson.refuses("4", wrong, hint)
