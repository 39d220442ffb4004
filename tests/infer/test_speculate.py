"""Speculation loses nothing: greedy text is plain greedy text, and every draft is made from the true past."""

import pytest
import torch

from minids import Transformer
from minids.infer import SpeculationStats, generate, speculate
from minids.infer.sampling import probabilities

NAMES = ["plain_query", "groups_yarn", "softmax_depth3"]  # depths 1, 2, 3; see conftest.py
NEW = 20


def random_prompts(rows: int, longest: int, vocab: int, seed: int) -> list[list[int]]:
    """Ragged prompts of 1 to ``longest`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator).tolist()
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]


def model_of(small, name: str, kind: str) -> Transformer:
    return small.trained(name) if kind == "trained" else small.random(name)


@pytest.mark.parametrize("kind", ["trained", "random"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_plain_greedy_text(small, name, kind):
    """210 random prompts a configuration, in batches of ragged rows that end at any of three tokens or at the limit.

    In float64, so that one token at a time and several at once cannot round to another argmax: no row is left out."""
    model, stats = model_of(small, name, kind), SpeculationStats()
    for start in range(0, 210, 35):
        prompts = random_prompts(35, 20, small.vocab, seed=start)
        knobs = dict(max_new_tokens=NEW, eos_token_id=[3, 11, 17])
        plain = generate(model, prompts, **knobs)
        assert generate(model, prompts, speculate=True, stats=stats, **knobs) == plain
    depths = small.config(name).num_nextn_predict_layers
    assert len(stats.acceptance) == depths and stats.tokens == stats.steps + sum(stats.accepted)
    assert len({len(row) for row in plain}) > 3  # rows did end at different tokens
    if kind == "trained":
        assert all(0.02 < share < 0.98 for share in stats.acceptance), str(stats)


@pytest.mark.parametrize("name", NAMES)
def test_float32_differs_only_where_two_tokens_are_as_good(small, name):
    """In float32 a pass of several tokens may round otherwise than one of one token. Where the two texts first differ,
    the two tokens' logits must be equal to within that rounding; every other row must be equal."""
    model = small.trained(name)
    double, single = model, small.random(name).float()
    single.load_state_dict(model.state_dict())
    prompts, different = random_prompts(64, 20, small.vocab, seed=9), 0
    plain, drafted = (generate(single, prompts, NEW, speculate=s) for s in (False, True))
    for prompt, a, b in zip(prompts, plain, drafted, strict=True):
        if a != b:
            first = next(i for i in range(NEW) if a[i] != b[i])
            logits = double(torch.tensor([prompt + a[:first]]), mtp=False).logits[0, -1]
            assert abs(logits[a[first]] - logits[b[first]]) < 1e-4 * logits.abs().max()
            different += 1
    assert different <= 3


@pytest.mark.parametrize("n", [1, 2, 3])
def test_any_number_of_drafts_up_to_the_depth(small, n):
    model, stats = small.trained("softmax_depth3"), SpeculationStats()
    prompts = random_prompts(20, 12, small.vocab, seed=1)
    assert generate(model, prompts, NEW, speculate=n, stats=stats) == generate(model, prompts, NEW)
    assert len(stats.proposed) == n


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_draft_is_made_from_the_true_past(small, monkeypatch, name, temperature):
    """The logits of every draft of every step, against the model without a cache on the row's text and earlier drafts: an
    entry left over from a rejected draft, or made from its hidden states, would show here, and nowhere else. Sampled
    drafts come from these logits shaped as the model's own are, by temperature and top_p."""
    model, prompts = small.trained(name), random_prompts(8, 9, small.vocab, seed=2)
    texts, seen, real = {}, [], speculate.choose

    def choose(logits_BV, rows, wanted, depth, tokens):
        for row, logits, drafted in zip(rows, logits_BV, tokens, strict=True):
            if depth <= row.drafts_now:
                text = [*texts[id(row)], *drafted]
                assert len(text) == row.length + 1 + len(drafted)
                expected = model(torch.tensor([text])).mtp_logits[depth - 1][0, -1] if len(text) > depth else logits
                torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
                seen.append(depth)
        q_BV = real(logits_BV, rows, wanted, depth, tokens)
        if temperature:
            torch.testing.assert_close(q_BV, probabilities(logits_BV, temperature, 0.9))
        return q_BV

    real_step = speculate.step

    def step(model, cache, rows, stats=None):
        for row in rows:
            if id(row) not in texts:
                place = next(i for i, p in enumerate(prompts) if len(p) == row.length and i not in {t[0] for t in used})
                used.append((place, row))
                texts[id(row)] = [*prompts[place], *row.fresh]
        found = real_step(model, cache, rows, stats)
        for row, new in zip(rows, found, strict=True):
            texts[id(row)] += new
        return found

    used: list = []
    prompts.sort(key=len)  # rows are told apart by their order within a length
    monkeypatch.setattr(speculate, "choose", choose)
    monkeypatch.setattr(speculate, "step", step)
    stats = SpeculationStats()
    generate(model, prompts, NEW, temperature=temperature, top_p=0.9, seed=4, speculate=True, stats=stats)
    assert set(seen) == set(range(1, len(model.mtp_modules) + 1)) and len(seen) == sum(stats.proposed)
    assert 0 < sum(stats.accepted) < sum(stats.proposed)


def test_a_sampled_row_does_not_depend_on_the_batch(small):
    model, prompts, seeds = small.trained("groups_yarn"), random_prompts(6, 9, small.vocab, seed=3), [5, 0, 9, 5, 2, 7]
    knobs = dict(temperature=0.8, top_p=0.9, speculate=2, eos_token_id=4)
    together = generate(model, prompts, NEW, seed=seeds, **knobs)
    for prompt, seed, row in zip(prompts, seeds, together, strict=True):
        assert generate(model, [prompt], NEW, seed=seed, **knobs) == [row]


def test_the_whole_context_can_be_filled(small):
    model = small.trained("softmax_depth3")
    for prompts in ([[2] * 44, [5, 6]], [[1], [2]]):
        new = 64 - len(prompts[0])
        assert generate(model, prompts, new, speculate=True) == generate(model, prompts, new)


def test_the_callback_sees_each_token_and_can_end_its_row(small):
    model, seen = small.trained("groups_yarn"), [[], []]

    def stop_at_seven(row: int, token: int) -> bool:
        seen[row].append(token)
        return row == 0 and len(seen[0]) == 7

    rows = generate(model, [[1, 2], [3]], NEW, speculate=True, on_token=stop_at_seven)
    assert rows == seen and [len(row) for row in rows] == [7, NEW]
    plain = generate(model, [[1, 2], [3]], NEW)
    assert rows == [plain[0][:7], plain[1]]
    seen[:] = [[], []]
    assert generate(model, [[1, 2], [3]], NEW, on_token=stop_at_seven) == rows


def test_half_precision_speculates_in_its_own_cache(small):
    """BF16 may round to other tokens; it must run, fill every row, and accept as often as float64 does, about."""
    model = small.trained("groups_yarn")
    half = small.random("groups_yarn").to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    prompts, found = random_prompts(20, 12, small.vocab, seed=6), {}
    for name, each in (("float64", model), ("bfloat16", half)):
        found[name] = SpeculationStats()
        rows = generate(each, prompts, NEW, speculate=True, stats=found[name])
        assert [len(row) for row in rows] == [NEW] * 20 and all(0 <= token < small.vocab for row in rows for token in row)
    assert abs(found["bfloat16"].acceptance[0] - found["float64"].acceptance[0]) < 0.15


@pytest.mark.parametrize(("value", "error", "message"), [
    (3, ValueError, "speculate=3: allowed is 0 to 2, one draft for each of this model's 2 MTP modules"),
    (-1, ValueError, "speculate=-1: allowed is 0 to 2"),
    (1.0, TypeError, "speculate must be an integer or a bool, got 1.0"),
    ("all", TypeError, "speculate must be an integer or a bool, got 'all'"),
])  # fmt: skip
def test_bad_values_are_named_before_any_work(small, value, error, message):
    model = small.random("groups_yarn")
    model.forward = lambda *args, **kwargs: pytest.fail("the model ran")
    with pytest.raises(error, match=message):
        generate(model, [[1]], 3, speculate=value)


@pytest.mark.parametrize("value", [1, True])
def test_a_model_without_mtp_modules_cannot_speculate(small, value):
    model = small.random("plain_query", num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="speculate=1: allowed is 0 to 0, .* 0 MTP modules"):
        generate(model, [[1]], 3, speculate=value)
    assert generate(model, [[1]], 3, speculate=False) == generate(model, [[1]], 3)


def test_statistics_by_hand():
    """Three steps with two drafts, of which 2, 0 and 1 are accepted; one with a single draft, accepted."""
    stats = SpeculationStats()
    for proposed, accepted in [(2, 2), (2, 0), (2, 1), (1, 1)]:
        stats.count(proposed, accepted)
    assert stats.proposed == [4, 3] and stats.accepted == [3, 1] and stats.steps == 4 and stats.tokens == 8
    assert stats.acceptance == [3 / 4, 1 / 3] and stats.conditional_acceptance == [3 / 4, 1 / 2]
    assert stats.tokens_per_step == 2
    assert str(stats) == "acceptance by position 75.0%, 33.3%; 2.00 tokens a step (4 steps)"
