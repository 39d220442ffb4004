"""Continuous batching: every request gets the tokens it would get alone, and no page is ever lost or owned twice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.infer import Engine, Request, generate
from minids.infer.paged import NOBODY, PagedCache
from minids.model.cache import LatentCache

CONFIG = {0: "plain_query", 1: "plain_query", 2: "groups_yarn", 3: "softmax_depth3"}  # drafts -> model, see conftest.py
PAGES, PAGE = 9, 4


def check_pages(engine: Engine) -> None:
    """Each page has one owner: nobody (free) or a running row, which has pages for its whole text."""
    cache = engine.cache
    owned = [page for pages in cache.owned for page in pages]
    assert sorted([*cache.free, *owned]) == list(range(1, cache.pages + 1)) and NOBODY not in owned
    for row, pages in enumerate(cache.owned):
        assert bool(pages) == (row in engine.running)
        assert cache.table[row].tolist() == pages + [NOBODY] * (cache.table.shape[1] - len(pages))
        if pages:
            assert len(pages) == cache.pages_for(engine.running[row].slots)


def alone(model, request: Request, speculate: int) -> list[int]:
    return generate(model, [request.prompt], request.max_new_tokens, request.temperature, request.top_p, request.seed,
                    request.stop_tokens or None, speculate=speculate)[0]  # fmt: skip


requests = st.builds(
    Request, prompt=st.lists(st.integers(0, 28), min_size=1, max_size=14), max_new_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.0, 1.0, 0.7]), top_p=st.sampled_from([1.0, 0.8]), seed=st.integers(0, 99),
    stop_tokens=st.sampled_from([(), (3, 11, 17)]),
)  # fmt: skip


@settings(max_examples=60)
@given(
    speculate=st.integers(0, 3), rows=st.integers(1, 4), chunk=st.sampled_from([1, 3, 512]), data=st.data(),
    arrivals=st.lists(st.tuples(st.integers(0, 6), requests, st.none() | st.integers(0, 5)), min_size=1, max_size=8),
)  # fmt: skip
def test_random_traffic(small, speculate, rows, chunk, data, arrivals):
    """Requests arrive at random steps, some are cancelled after a while; pages are short, so that they wait."""
    model = small.trained(CONFIG[speculate])
    engine = Engine(model, rows, PAGES, PAGE, speculate, prefill_tokens=chunk)
    got, finish, asked, age = {}, {}, {}, 0
    pending = sorted(arrivals, key=lambda arrival: arrival[0])
    while pending or engine.busy:
        while pending and pending[0][0] <= age:
            _, request, patience = pending.pop(0)
            id = engine.submit(request)
            asked[id], got[id] = (request, None if patience is None else age + patience), []
        for id, (_, until) in asked.items():
            if until == age and id not in finish and id in {j.id for j in (*engine.waiting, *engine.running.values())}:
                engine.cancel(id)
                check_pages(engine)
        for event in engine.step():
            assert event.id not in finish  # nothing after the end
            got[event.id] += event.tokens
            if event.finish:
                finish[event.id] = event.finish
        check_pages(engine)
        age += 1
    assert len(engine.cache.free) == PAGES and set(finish) == set(asked)
    for id, (request, _) in asked.items():
        solo = alone(model, request, speculate)
        if finish[id] == "cancelled":
            assert got[id] == solo[: len(got[id])]
        else:
            assert got[id] == solo
            assert finish[id] == ("stop" if solo[-1] in request.stop_tokens else "length")


def test_newcomers_are_read_beside_those_who_write(small):
    model, long = small.trained("groups_yarn"), [5] * 21
    engine = Engine(model, 2, 32, PAGE, speculate=2, prefill_tokens=4)
    first, second = engine.submit(Request([1, 2], 30)), None
    written = {first: 0}
    for step in range(7):
        if step == 1:
            second = engine.submit(Request(long, 3))
            written[second] = 0
        for event in engine.step():
            written[event.id] += len(event.tokens)
        if 1 <= step <= 5:
            assert written[second] == 0 and engine.running[1].read == 4 * step
        assert written[first] > step  # at least one a step, while the long prompt is read in six chunks
    assert written[second] >= 1


@pytest.mark.parametrize("speculate", [0, 2])
def test_padding_behind_the_last_slot_harms_nobody(small, speculate):
    """A prompt in its second chunk, beside a newcomer's longer one: its padding reaches behind all slots there are."""
    model = small.trained("groups_yarn")
    requests = [Request([1 + i % 7 for i in range(60)], 4), Request([2 + i % 5 for i in range(40)], 20)]
    engine, got = Engine(model, 2, 40, PAGE, speculate, prefill_tokens=40), {0: [], 1: []}
    engine.submit(requests[0])
    events = engine.step()
    before = engine.cache.data[:, engine.cache.owned[0][:10]].clone()  # the first chunk's slots
    engine.submit(requests[1])
    events += engine.step()
    assert before.any() and engine.cache.data[:, engine.cache.owned[0][:10]].equal(before)
    for event in [*events, *engine.stream()]:
        got[event.id] += event.tokens
    assert list(got.values()) == [alone(model, request, speculate) for request in requests]


def test_a_request_waits_until_pages_are_free_and_first_come_is_first_served(small):
    engine = Engine(small.trained("plain_query"), 4, pages=4, page_size=4)
    big = [engine.submit(Request([1] * 8, 5)) for _ in range(2)]  # 12 slots: 3 of 4 pages
    little = engine.submit(Request([1], 2))  # its one page would be free at once
    order = [event.id for event in engine.stream() if event.finish]
    assert order[:1] == big[:1] and set(order[1:]) == {big[1], little}
    assert len(engine.cache.free) == 4


@settings(max_examples=25)
@given(name=st.sampled_from(sorted(set(CONFIG.values()))), data=st.data(), chunks=st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=5))  # fmt: skip
@torch.no_grad()
def test_pages_equal_one_block(small, name, data, chunks):
    """Two rows in shuffled pages give the logits, MTP's too, of a contiguous cache; what other rows leave is never read."""
    model = small.trained(name)
    pool = PagedCache(model.cfg, 3, 20, 4, dtype=torch.float64, mtp=True)
    pool.data[:] = 1e3  # pages hold what others wrote
    pool.free = data.draw(st.permutations(pool.free))
    assert pool.take(2, 30) and pool.take(0, 30)
    block = LatentCache(model.cfg, 2, 30, dtype=torch.float64, mtp=True)
    for counts in chunks:
        if max(block.lengths + torch.tensor(counts)) > 25:
            break
        tokens, n_valid = torch.randint(0, small.vocab, (2, max(counts))), torch.tensor(counts)
        view = pool.view([2, 0])
        got, expected = (model(tokens, cache=cache, n_valid=n_valid, mtp=True, absorb=False) for cache in (view, block))
        view.keep()
        for row, count in enumerate(counts):
            for a, b in zip([got.logits, *got.mtp_logits], [expected.logits, *expected.mtp_logits], strict=True):
                torch.testing.assert_close(a[row, :count], b[row, :count], rtol=1e-6, atol=1e-6)
        block.set_lengths(block.lengths.tolist())
    assert pool.lengths[2] == block.lengths[0] and pool.lengths[0] == block.lengths[1]


def test_rows_cannot_outgrow_or_share_their_pages(small):
    pool = PagedCache(small.config("plain_query"), 2, 3, 4)
    assert pool.take(0, 5) and not pool.take(1, 5) and pool.free == [3]
    with pytest.raises(ValueError, match="row=0 owns pages already"):
        pool.take(0, 1)
    view = pool.view([0])
    view.set_lengths([9])
    with pytest.raises(ValueError, match="row 0 counts 9 tokens, its pages hold 8"):
        view.keep()
    pool.give_back(0)
    assert sorted(pool.free) == [1, 2, 3] and pool.take(1, 12)


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in tokens)


def test_stop_strings_end_a_text_before_them(small):
    model = small.trained("groups_yarn")
    solo = Letters().decode(generate(model, [[1, 2]], 20)[0])
    stop = solo[6:9]
    assert stop not in solo[:8]
    for speculate in (0, 2):
        engine = Engine(model, 2, speculate=speculate, tokenizer=Letters())
        id = engine.submit(Request([1, 2], 20, stop=(stop, "zzzz")))
        other = engine.submit(Request([1, 2], 20))
        text, tokens, finish = {id: "", other: ""}, {id: [], other: []}, {}
        for event in engine.stream():
            text[event.id] += event.text
            tokens[event.id] += event.tokens
            finish[event.id] = event.finish
        assert text == {id: solo[:6], other: solo} and finish == {id: "stop", other: "length"}
        assert Letters().decode(tokens[id]) == solo[:9]
        assert len(engine.cache.free) == engine.cache.pages


def test_a_stop_token_belongs_to_the_tokens_and_not_to_the_text(small):
    model = small.trained("plain_query")
    solo = generate(model, [[4]], 10)[0]
    engine = Engine(model, tokenizer=Letters())
    engine.submit(Request([4], 10, stop_tokens=[solo[3]]))
    events = list(engine.stream())
    end = solo.index(solo[3]) + 1
    assert sum((list(event.tokens) for event in events), []) == solo[:end]
    assert "".join(event.text for event in events) == Letters().decode(solo[: end - 1])


BAD = [
    (dict(prompt=[]), ValueError, "prompt is empty"),
    (dict(prompt=[29]), ValueError, r"prompt\[0\] is token 29; allowed are 0 to 28"),
    (dict(prompt="ab"), TypeError, "prompt must be a sequence of token ids, got 'ab'"),
    (dict(prompt=[1] * 60), ValueError, "prompt has 60 tokens; with max_new_tokens=5 .* max_position_embeddings is 64"),
    (dict(prompt=[1] * 40), ValueError, "can fill 44 slots, 11 pages of 4: allowed is pages=9"),
    (dict(max_new_tokens=0), ValueError, "max_new_tokens must be at least 1, got 0"),
    (dict(max_new_tokens="5"), TypeError, "max_new_tokens must be an integer, got '5'"),
    (dict(temperature=-1.0), ValueError, "temperature must be .* got -1.0"),
    (dict(top_p=2), ValueError, "top_p must be .* got 2"),
    (dict(seed=-1), ValueError, "seed must be .* got -1"),
    (dict(stop_tokens=[29]), ValueError, r"stop_tokens must be in 0 to 28 \(vocab_size\), got 29"),
    (dict(stop_tokens=["x"]), TypeError, r"stop_tokens must be one or several token ids, got \['x'\]"),
    (dict(stop=["x"]), ValueError, r"stop=\['x'\] needs an Engine with a tokenizer"),
    (dict(stop="x"), TypeError, "stop must be a sequence of strings, got 'x'"),
    (dict(stop=[""]), ValueError, "stop must hold no empty string"),
    (dict(stop=None), TypeError, "stop must be a sequence of strings, got None"),
    (dict(stop=("x" for _ in range(2))), ValueError, r"stop=\['x', 'x'\] needs an Engine with a tokenizer"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_a_bad_request_is_refused_and_changes_nothing(small, change, error, message):
    engine = Engine(small.trained("plain_query"), 2, PAGES, PAGE)
    with pytest.raises(error, match=message):
        engine.submit(Request(**{"prompt": [1], "max_new_tokens": 5, **change}))
    assert not engine.busy and len(engine.cache.free) == PAGES
    assert engine.submit(Request([1], 1)) == 0


@pytest.mark.parametrize(("change", "message"), [
    (dict(speculate=2), "speculate=2: allowed is 0 to 1"), (dict(max_rows=0), "max_rows=0: allowed is a positive integer"),
    (dict(pages=-1), "pages=-1"), (dict(page_size=2.5), "page_size=2.5"), (dict(prefill_tokens=0), "prefill_tokens=0"),
])  # fmt: skip
def test_a_bad_engine_is_refused(small, change, message):
    with pytest.raises(ValueError, match=message):
        Engine(small.trained("plain_query"), **change)


def test_only_what_runs_or_waits_can_be_cancelled(small):
    engine = Engine(small.trained("plain_query"), 1, PAGES, PAGE)
    first, second = engine.submit(Request([1], 6)), engine.submit(Request([2], 6))
    engine.step()
    for id in (2, -1, "0", True):
        with pytest.raises(ValueError, match="no such request was submitted"):
            engine.cancel(id)
    engine.cancel(second)
    engine.cancel(first)
    check_pages(engine)
    assert {event.id: event.finish for event in engine.step() if event.finish} == {first: "cancelled", second: "cancelled"}
    with pytest.raises(ValueError, match="id=0: this request has ended"):
        engine.cancel(first)
    assert not engine.busy


def test_a_row_with_bad_logits_ends_alone_and_poisons_nobody(small, monkeypatch):
    """One row's logits become NaN, as an overflow in half precision makes them: the others, and later users of its pages,
    write what they would have."""
    model = small.trained("groups_yarn")
    expected = generate(model, [[1, 2]], 12, speculate=2)[0]
    engine = Engine(model, 2, 8, PAGE, speculate=2)
    good, bad = engine.submit(Request([1, 2], 12)), engine.submit(Request([3], 12))
    later = engine.submit(Request([1, 2], 12))
    real, calls = type(model).forward, []

    def forward(self, tokens, **kwargs):
        out = real(self, tokens, **kwargs)
        calls.append(len(tokens))
        if len(calls) == 3:
            out.logits[1, -1] = torch.nan
            engine.cache.data[:, engine.cache.owned[1]] = torch.nan
        return out

    monkeypatch.setattr(type(model), "forward", forward)
    tokens, finish = {good: [], bad: [], later: []}, {}
    for event in engine.stream():
        tokens[event.id] += event.tokens
        finish[event.id] = event.finish
        check_pages(engine)
    assert finish == {good: "length", bad: "error", later: "length"}
    assert tokens[good] == tokens[later] == expected


def test_an_exception_frees_every_page(small, monkeypatch):
    model = small.trained("plain_query")
    engine = Engine(model, 2, PAGES, PAGE, speculate=1)
    ids = [engine.submit(Request([1, 2], 5)) for _ in range(3)]
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", lambda *a, **k: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(MemoryError):
            engine.step()
    check_pages(engine)
    assert len(engine.cache.free) == PAGES and not engine.running
    assert {event.id: event.finish for event in engine.stream() if event.finish} == {
        ids[0]: "error", ids[1]: "error", ids[2]: "length"}  # fmt: skip
