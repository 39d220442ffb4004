"""Generation against recomputation without a cache, and rows against the same rows alone."""

import pytest
import torch

from minids import ModelConfig, Transformer
from minids.infer import generate
from minids.infer.generate import stop_tokens
from minids.infer.sampling import row_generators, sample

VARIANTS = {
    "v3": {},
    "yarn": {"rope_scaling": {
        "type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    }},
    "v2_lite": {"q_lora_rank": None, "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "scoring_func": "softmax",
                "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "mtp": {"num_nextn_predict_layers": 2},
}  # fmt: skip
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [11] * 12, [3, 1, 4, 1, 5]]


def tiny(seed: int = 0, **overrides) -> Transformer:
    """A random model in float64, where no two logits of interest are close enough for rounding to reorder them."""
    shape = dict(
        vocab_size=61, hidden_size=32, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=48,
        moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, q_lora_rank=24,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, num_attention_heads=4,
        num_nextn_predict_layers=0, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    try:
        model = Transformer(ModelConfig.from_dict({**shape, **overrides}))
    finally:
        torch.set_default_dtype(torch.float32)
    for gate in model.routers():
        if gate.e_score_correction_bias is not None:
            gate.e_score_correction_bias.uniform_(-0.1, 0.1)
    return model


@torch.no_grad()
def without_cache(model: Transformer, prompt: list[int], count: int, stop=(), choose=None) -> list[int]:
    """The definition: run the whole text for every new token."""
    text, choose = list(prompt), choose or (lambda logits: logits.argmax(-1))
    for _ in range(count):
        text.append(choose(model(torch.tensor([text]), mtp=False).logits[:, -1]).item())
        if text[-1] in stop:
            break
    return text[len(prompt) :]


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_equals_recomputation_and_the_row_alone(variant):
    model = tiny(**VARIANTS[variant])
    together = generate(model, PROMPTS, 20)
    assert [len(row) for row in together] == [20] * len(PROMPTS)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert row == without_cache(model, prompt, 20)
        assert [row] == generate(model, [prompt], 20)
    assert len({tuple(row) for row in together}) > 1  # the model does read its prompts


def test_sampled_rows_equal_recomputation_with_the_same_generator():
    model = tiny()
    together = generate(model, PROMPTS, 15, temperature=0.9, top_p=0.9, seed=40)
    for row, prompt in enumerate(PROMPTS):
        generators = row_generators([40 + row])
        alone = without_cache(model, prompt, 15, choose=lambda logits, g=generators: sample(logits, 0.9, 0.9, g))
        assert together[row] == alone


def test_a_sampled_row_does_not_depend_on_the_batch():
    model, knobs = tiny(), dict(temperature=1.0, top_p=0.95)
    seeds = [7, 1, 7, 3, 12]
    together = generate(model, PROMPTS, 12, seed=seeds, **knobs)
    for row, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], 12, seed=seeds[row], **knobs) == [together[row]]
    backwards = generate(model, PROMPTS[::-1], 12, seed=seeds[::-1], **knobs)
    assert backwards[::-1] == together


def test_seeds_repeat_differ_and_count_up_by_row():
    model, knobs = tiny(), dict(temperature=1.0)
    first = generate(model, [[5]] * 4, 12, seed=3, **knobs)
    assert generate(model, [[5]] * 4, 12, seed=3, **knobs) == first
    assert generate(model, [[5]] * 4, 12, seed=[3, 4, 5, 6], **knobs) == first
    assert len({tuple(row) for row in first}) == 4  # one prompt, four different texts
    assert generate(model, [[5]] * 4, 12, seed=4, **knobs)[:3] == first[1:]


def test_global_random_state_is_neither_read_nor_changed():
    model = tiny()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = generate(model, PROMPTS, 5, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert generate(model, PROMPTS, 5, temperature=1.0) == first


@pytest.mark.parametrize("several", [False, True])
def test_eos_ends_its_row_alone(several):
    """Stop at a token each greedy text contains somewhere else; every row ends right after its first occurrence."""
    model = tiny()
    free = generate(model, PROMPTS, 20)
    eos = [free[0][4], free[2][9]] if several else free[1][6]
    stop = set(eos) if several else {eos}
    stopped = generate(model, PROMPTS, 20, eos_token_id=eos)
    for whole, row in zip(free, stopped, strict=True):
        end = next((i + 1 for i, token in enumerate(whole) if token in stop), 20)
        assert row == whole[:end]
    assert len({len(row) for row in stopped}) > 1  # some rows did stop before others


def test_rows_are_right_whatever_the_order_in_which_they_finish():
    """Sampled rows end at many different steps, so that the batch shrinks several times."""
    model, stop = tiny(), set(range(6))
    prompts = [[token] for token in range(20, 36)]
    rows = generate(model, prompts, 30, temperature=1.2, seed=100, eos_token_id=sorted(stop))
    assert len({len(row) for row in rows}) > 5
    for row, prompt in enumerate(prompts):
        own = row_generators([100 + row])
        assert rows[row] == without_cache(model, prompt, 30, stop, lambda logits, own=own: sample(logits, 1.2, 1.0, own))


def test_callback_sees_every_token_in_order():
    model, seen = tiny(), [[] for _ in PROMPTS]
    rows = generate(model, PROMPTS, 9, eos_token_id=generate(model, PROMPTS, 9)[0][3],
                    on_token=lambda row, token: seen[row].append(token))  # fmt: skip
    assert seen == rows
    assert len(rows[0]) < 9


def test_the_whole_context_can_be_filled():
    model = tiny()
    prompt = [2] * 60
    assert generate(model, [prompt], 4) == [without_cache(model, prompt, 4)]


def test_no_prompts_give_no_rows():
    assert generate(tiny(), [], 3) == []


def test_numpy_and_tensor_prompts_are_taken():
    model = tiny()
    expected = generate(model, [[5, 6, 7]], 4)
    assert generate(model, torch.tensor([[5, 6, 7]]), 4) == expected
    assert generate(model, torch.tensor([[5, 6, 7]]).numpy(), 4) == expected


def test_training_goes_on_after_generating():
    """Nothing made in inference mode may be left behind in the model, or backward would refuse it."""
    model = tiny(num_nextn_predict_layers=1)
    tokens = torch.randint(0, 61, (2, 9))
    model(tokens).logits.sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    generate(model, PROMPTS, 4)
    assert model.training
    model(tokens).logits.sum().backward()
    for name, parameter in model.named_parameters():
        if name in before:
            torch.testing.assert_close(parameter.grad, before[name])


def test_bfloat16_models_generate():
    rows = generate(tiny().to(torch.bfloat16), PROMPTS, 6, temperature=0.7)
    assert [len(row) for row in rows] == [6] * len(PROMPTS)
    assert all(0 <= token < 61 for row in rows for token in row)


BAD = [
    (dict(prompts=[[1], []]), ValueError, r"prompts\[1\] is empty"),
    (dict(prompts=[[1, 61]]), ValueError, r"prompts\[0\]\[1\] is token 61; allowed are 0 to 60"),
    (dict(prompts=[[-1]]), ValueError, r"prompts\[0\]\[0\] is token -1; allowed are 0 to 60"),
    (dict(prompts=[1, 2]), TypeError, r"prompts\[0\] must be a sequence of token ids, got 1"),
    (dict(prompts=[[1.5]]), TypeError, r"prompts\[0\] must be a sequence of token ids"),
    (dict(prompts=["text"]), TypeError, r"prompts\[0\] must be a sequence of token ids, got 'text'"),
    (
        dict(prompts=[[1] * 60]),
        ValueError,
        r"60 tokens; with max_new_tokens=5 that is 65, but max_position_embeddings is 64",
    ),
    (dict(max_new_tokens=0), ValueError, "max_new_tokens must be at least 1, got 0"),
    (dict(max_new_tokens=2.0), TypeError, "max_new_tokens must be an integer, got 2.0"),
    (dict(temperature=-1), ValueError, "temperature must be finite and >= 0.*got -1"),
    (dict(temperature=None), TypeError, "temperature must be a number, got None"),
    (dict(top_p=0.0), ValueError, r"top_p must be in \(0, 1\].*got 0.0"),
    (dict(top_p=1.5), ValueError, r"top_p must be in \(0, 1\].*got 1.5"),
    (dict(seed=-3), ValueError, "seed must be in .*got -3"),
    (dict(seed=0.5), TypeError, "seed must be an integer, got 0.5"),
    (dict(seed=True), TypeError, "seed must be an integer, got True"),
    (dict(seed=[1, 2]), ValueError, "seed must be one integer or one a prompt: got 2 seeds for 1 prompts"),
    (dict(eos_token_id=61), ValueError, r"eos_token_id must be in 0 to 60 \(vocab_size\), got 61"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named_before_any_work(change, error, message):
    model = tiny()
    model.forward = lambda *args, **kwargs: pytest.fail("the model ran")
    arguments = {"prompts": [[1]], "max_new_tokens": 5, **change}
    with pytest.raises(error, match=message):
        generate(model, **arguments)


def test_logits_that_are_not_finite_stop_generation():
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite .* at new token 0"):
        generate(model, [[1]], 3)


def test_stop_tokens():
    assert stop_tokens(None, 10) == frozenset()
    assert stop_tokens(3, 10) == {3}
    assert stop_tokens([3, 9], 10) == {3, 9}
