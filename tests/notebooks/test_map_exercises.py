"""The checks of notebook 00's exercises: silent on stubs, right answers pass, the usual mistakes are named."""

import pytest
from exercises import Lesson

from minids import ModelConfig

WORDS = ("map-01", "def attention(", "def parts(", "def cache(", "tiny = ModelConfig", "narrow = ModelConfig",
         "lite = ModelConfig", "v3 = ModelConfig")  # fmt: skip


@pytest.fixture(scope="module")
def lesson():
    stubs = {"1": "cache_bytes", "2": "decode_crossover", "3": "successor"}
    return Lesson("00_map", stubs, needed=WORDS, missing=("awake", "used", "claim", "plots"), given={"claims": []})


def cache_bytes(c, length, bytes_each=2, layers=True, rope=1, latents=1):
    numbers = latents * c.kv_lora_rank + rope * c.qk_rope_head_dim
    return length * bytes_each * numbers * (c.num_hidden_layers if layers else 1)


def mha_bytes(c, length):
    return 2 * length * c.num_hidden_layers * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)


def crossover(c, parameters=None, each=2, width=None, heads=True, layers=True):
    """Parameters without the embedding, norms and biases too, unless given."""
    d = c.hidden_size
    if parameters is None:
        shapes = [c.linears(moe=c.is_moe_layer(i)) for i in range(c.num_hidden_layers)]
        used = [(c.num_experts_per_tok if name.startswith("experts.") else copies) * rows * columns
                for layer in shapes for name, (copies, rows, columns) in layer.items()]  # fmt: skip
        moe = sum(c.is_moe_layer(i) for i in range(c.num_hidden_layers))
        parameters = sum(used) + moe * c.n_routed_experts * d + c.vocab_size * d
    core = 2 * (width or 2 * c.kv_lora_rank + c.qk_rope_head_dim)
    return each * parameters / (core * (c.num_attention_heads if heads else 1) * (c.num_hidden_layers if layers else 1))


def twice_the_experts(c):
    return c.replace(n_routed_experts=2 * c.n_routed_experts)


@pytest.mark.parametrize("number", "123")
def test_a_stub_is_not_a_failure(lesson, capsys, number):
    lesson.silent(number, capsys)


@pytest.mark.parametrize("number, answer", [
    ("1", cache_bytes),
    ("2", crossover),  # of matrices alone: norms and biases are no matrices
    ("2", lambda c: crossover(c, c.count()["activated_without_embedding"])),
    ("2", lambda c: round(crossover(c))),
    ("3", twice_the_experts),
])  # fmt: skip
def test_right_answers_pass(lesson, capsys, number, answer):
    lesson.accepts(number, answer, capsys)


@pytest.mark.parametrize("wrong, hint", [
    (lambda c, n: cache_bytes(c, n, layers=False), "each layer"),
    (lambda c, n: cache_bytes(c, n, bytes_each=1), "two bytes"),
    (lambda c, n: cache_bytes(c, n, rope=2, latents=2), "do not count it twice"),
    (lambda c, n: cache_bytes(c, n, rope=0), "rotated key is cached"),
    (lambda c, n: cache_bytes(c, n, rope=c.num_attention_heads), "serves all heads"),
    (mha_bytes, "that is MHA"),
    (lambda c, n: cache_bytes(c, 1), "not one token"),
    (lambda c, n: cache_bytes(c, n) / 1000, "not kilobytes"),
    (lambda c, n: cache_bytes(c, n) / 1024, "kilobytes of 1024"),
    (lambda c, n: 70272 * n, "yours / right"),
    (lambda c, n: cache_bytes(c, n + 1), "yours / right"),
    (lambda c, n: None if n == 7 else cache_bytes(c, n), "nothing is returned in case 2"),
])  # fmt: skip
def test_wrong_caches_are_named(lesson, wrong, hint):
    lesson.refuses("1", wrong, hint)


@pytest.mark.parametrize("wrong, hint", [
    (lambda c: crossover(c, width=c.qk_head_dim + c.v_head_dim), "naive form"),
    (lambda c: crossover(c, width=c.latent_dim), "values C more"),
    (lambda c: crossover(c, c.count()["activated_without_embedding"], each=6), "is training"),
    (lambda c: crossover(c, c.count()["activated_without_embedding"], each=4), "not half of them"),
    (lambda c: crossover(c, c.count()["activated"]), "looked up"),
    (lambda c: crossover(c, c.count()["main"] - c.count()["embedding"]), "skips most experts"),
    (lambda c: crossover(c, c.count()["activated_without_embedding"], layers=False), "every layer"),
    (lambda c: crossover(c, c.count()["activated_without_embedding"], heads=False), "every head"),
    (lambda c: 29_317, "yours / right"),
])  # fmt: skip
def test_wrong_crossovers_are_named(lesson, wrong, hint):
    lesson.refuses("2", wrong, hint)


@pytest.mark.parametrize("wrong, hint", [
    (lambda c: c, "parameters x 1.00, not 2"),
    (lambda c: c.replace(num_hidden_layers=122), "FLOPs x 1.978"),
    (lambda c: twice_the_experts(c).replace(kv_lora_rank=576), "FLOPs|more cache"),
    (lambda c: twice_the_experts(c).to_dict(), "a config"),
    (lambda c: ModelConfig.preset("toy"), "parameters x 0.00"),
])  # fmt: skip
def test_wrong_successors_are_named(lesson, wrong, hint):
    lesson.refuses("3", wrong, hint)
