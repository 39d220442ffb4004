"""transformers as the independent implementation: same weights, same logits to 1e-5 in FP32, same greedy tokens.

Every case goes through files, so the checkpoint format is held to the same standard as the arithmetic. Weights are large
enough for an error in any part to show in the logits; `test_the_comparison_can_fail` proves it for each part.
"""

import random
import types

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.modeling_layers import MtpModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minids import ModelConfig, Transformer
from minids.checkpoint import load, save
from minids.infer import generate
from minids.model import attention, router
from minids.model.attention import LatentCache
from minids.model.rope import rope_attention_factor, rope_frequencies, softmax_scale

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
TOLERANCE = 1e-5
N_CONFIGS = 40
BATCH, LENGTH, NEW_TOKENS = 2, 40, 10
# transformers writes num_nextn_predict_layers = 1 into its configs but no MTP weights.
pytestmark = pytest.mark.filterwarnings("ignore:.*loaded without MTP modules")


def random_shapes(seed: int) -> dict:
    """A small config in the published keys; the low bits of the seed decide the features, the rest is drawn."""
    r = random.Random(seed)
    layers, heads, groups = r.randint(1, 4), r.randint(1, 4), r.choice([1, 2, 4])
    dense = layers if seed % 10 == 0 else r.randint(0, layers - 1)
    kept, group_size = r.randint(1, groups), r.randint(2, 5)
    values = dict(
        vocab_size=r.randint(50, 120), hidden_size=r.randint(4, 16) * 4, num_hidden_layers=layers,
        first_k_dense_replace=dense, intermediate_size=r.randint(8, 90), moe_intermediate_size=r.randint(4, 40),
        num_attention_heads=heads, num_key_value_heads=heads, q_lora_rank=None if seed % 3 == 0 else r.randint(6, 40),
        kv_lora_rank=r.randint(6, 40), qk_nope_head_dim=r.randint(3, 16), qk_rope_head_dim=2 * r.randint(1, 8),
        v_head_dim=r.randint(3, 20), n_routed_experts=groups * group_size, n_shared_experts=1 + seed // 2 % 2,
        num_experts_per_tok=r.randint(1, kept * group_size), n_group=groups, topk_group=kept,
        norm_topk_prob=seed % 7 != 0, routed_scaling_factor=r.uniform(0.7, 2.5), rope_theta=r.choice([100.0, 10000.0]),
        max_position_embeddings=256, tie_word_embeddings=seed % 8 == 1, rope_scaling=None,
    )  # fmt: skip
    if seed % 2:
        mscale = r.uniform(0.5, 2)
        extra = [{"mscale": mscale, "mscale_all_dim": mscale}, {"mscale": 1.3, "mscale_all_dim": 0.6}, {}][seed // 2 % 3]
        values["rope_scaling"] = dict(
            type="yarn", factor=r.choice([2, 4.0, 40]), original_max_position_embeddings=r.choice([8, 16]),
            beta_fast=r.choice([2, 32]), beta_slow=r.choice([0.5, 1]), **extra,
        )  # fmt: skip
    return values


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Logits of order 1 and, for every other seed, a correction bias that is strongly negative.

    At a gain of 0.7 a layer, rounding stays below a third of the tolerance; at 1 two attention kernels inside
    transformers already differ by more than the tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(-2.0 * (seed % 2), 0.5, generator=generator)
        elif tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name == "model.embed_tokens.weight":
            tensor.normal_(generator=generator)
        elif name != "lm_head.weight" or not tied:
            gain = 1.0 if name == "lm_head.weight" else 0.7
            tensor.normal_(0, gain * tensor.shape[-1] ** -0.5, generator=generator)
    if tied:  # the head is the embedding, so the norm before it brings the logits down
        model.model.norm.weight.mul_(len(model.model.norm.weight) ** -0.5)


def closest_call(model: Transformer, tokens: torch.Tensor) -> float:
    """The smallest difference of scores that decided a choice of an expert or a group: what rounding may flip."""
    closest = float("inf")
    with torch.no_grad():
        out = model(tokens, mtp=False)
    for gate, routing in zip(model.routers(), out.routing, strict=False):
        cfg, choice = model.cfg, routing.scores
        if gate.e_score_correction_bias is not None:
            choice = choice + gate.e_score_correction_bias
        rankings = [(choice if cfg.topk_method == "greedy" else router.keep_best_groups(choice, cfg),
                     cfg.num_experts_per_tok)]  # fmt: skip
        if cfg.topk_method != "greedy":
            best = choice.unflatten(-1, (cfg.n_group, -1)).topk(2 if cfg.topk_method == "noaux_tc" else 1, -1)
            rankings.append((best.values.sum(-1), cfg.topk_group))
        for values, kept in rankings:
            if kept < values.shape[-1]:
                ranked = values.sort(-1, descending=True).values
                closest = min(closest, (ranked[:, kept - 1] - ranked[:, kept]).min().item())
    return closest


def safe_tokens(model: Transformer, seed: int) -> torch.Tensor:
    """Random tokens, drawn again while a routing decision hangs on less than rounding: another CPU may decide else."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        tokens = torch.randint(model.cfg.vocab_size, (BATCH, LENGTH), generator=generator)
        if closest_call(model, tokens) > 1e-5:
            return tokens
    raise AssertionError("no tokens with clear routing decisions in 20 draws")


@torch.no_grad()
def assert_same_logits(theirs, ours: Transformer, tokens: torch.Tensor) -> None:
    expected, found = theirs(tokens).logits, ours(tokens, mtp=False).logits
    assert 0.2 < expected.std() < 5, "logits must be of order 1 for an absolute tolerance to mean something"
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def greedy(model: Transformer, prompt: torch.Tensor, cached: bool) -> torch.Tensor:
    """NEW_TOKENS greedy tokens a row; with the cache the prompt runs naive and each further token absorbed."""
    cache = LatentCache(model.cfg, len(prompt), prompt.shape[1] + NEW_TOKENS) if cached else None
    tokens, feed = prompt, prompt
    for _ in range(NEW_TOKENS):
        logits = model(feed if cached else tokens, cache=cache, last_only=True, mtp=False).logits
        feed = logits.argmax(-1)
        tokens = torch.cat([tokens, feed], dim=1)
    return tokens


def their_greedy(theirs, ours: Transformer, prompt: torch.Tensor) -> torch.Tensor | None:
    """transformers' generate with its cache, (1, T) -> (1, T + NEW_TOKENS); None if rounding may decide a choice."""
    theirs.generation_config.eos_token_id = None
    out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False,
                          use_cache=True, pad_token_id=0, output_logits=True, return_dict_in_generate=True)  # fmt: skip
    best = torch.stack(out.logits).topk(2, -1).values
    clear = (best[..., 0] - best[..., 1]).min() > 1e-3 and closest_call(ours, out.sequences) > 1e-5
    return out.sequences if clear else None


def assert_same_greedy_tokens(theirs, ours: Transformer, tokens: torch.Tensor) -> None:
    """Prompts of different lengths: one by one without and with a cache, then all at once in a ragged batch."""
    prompts = [tokens[row : row + 1, : LENGTH // 2 - 7 * row] for row in range(BATCH)]
    pairs = [(prompt, their_greedy(theirs, ours, prompt)) for prompt in prompts]
    pairs = [(prompt, expected) for prompt, expected in pairs if expected is not None]
    assert pairs, "no prompt with clear choices"
    for prompt, expected in pairs:
        assert torch.equal(greedy(ours, prompt, cached=False), expected)
        assert torch.equal(greedy(ours, prompt, cached=True), expected)
    found = generate(ours, [prompt[0].tolist() for prompt, _ in pairs], max_new_tokens=NEW_TOKENS)
    assert found == [expected[0, -NEW_TOKENS:].tolist() for _, expected in pairs]


def hf_v3(values: dict) -> DeepseekV3ForCausalLM:
    # Its default, the grouped GEMM, refuses rows that do not start at multiples of 16 bytes.
    return DeepseekV3ForCausalLM(DeepseekV3Config(**values, experts_implementation="eager")).eval()


def hf_load(folder, kind=DeepseekV3ForCausalLM):
    return kind.from_pretrained(folder, experts_implementation="eager").eval()


def test_configs_cover_the_features():
    configs = [ModelConfig.from_dict(random_shapes(seed)) for seed in range(N_CONFIGS)]
    moe = [c for c in configs if c.first_k_dense_replace < c.num_hidden_layers]
    for feature in (
        [c.rope_scaling is not None for c in configs],
        [c.rope_scaling is not None and rope_attention_factor(c) != 1 for c in configs],
        [c.q_lora_rank is None for c in configs],
        [c.first_k_dense_replace > 0 for c in configs],
        [c.first_k_dense_replace == c.num_hidden_layers for c in configs],
        [c.tie_word_embeddings for c in configs],
        [c.n_shared_experts == 2 for c in moe],
        [c.topk_group < c.n_group for c in moe],
        [not c.norm_topk_prob for c in moe],
    ):
        assert 4 <= sum(feature) < len(feature)


@pytest.mark.parametrize("seed", range(N_CONFIGS))
def test_transformers_saves_we_load(seed, tmp_path):
    theirs = hf_v3(random_shapes(seed))
    randomise(theirs, seed)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    tokens = safe_tokens(ours, seed)
    assert_same_logits(theirs, ours, tokens)
    if seed % 2:
        assert_same_greedy_tokens(theirs, ours, tokens)


@pytest.mark.parametrize("seed", range(N_CONFIGS))
def test_we_save_transformers_loads(seed, tmp_path):
    ours = Transformer(ModelConfig.from_dict(random_shapes(seed)))  # with one MTP module, which transformers leaves out
    randomise(ours, seed + 1000)
    save(ours, tmp_path / "checkpoint", max_shard_bytes=20_000)
    theirs = hf_load(tmp_path / "checkpoint")
    tokens = safe_tokens(ours, seed)
    assert_same_logits(theirs, ours, tokens)
    if seed % 2 == 0:
        assert_same_greedy_tokens(theirs, ours, tokens)
    theirs.save_pretrained(tmp_path / "again")
    for name, tensor in load(tmp_path / "again").state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


# ---- V2: softmax scores, no bias ------------------------------------------------------------------------------------


def random_v2_shapes(seed: int) -> dict:
    """V2-Lite's style for even seeds (greedy, q_lora null), V2's for odd ones (groups scored by their best expert)."""
    values = random_shapes(seed) | dict(
        norm_topk_prob=False, n_shared_experts=2, q_lora_rank=None if seed % 2 == 0 else 20, tie_word_embeddings=False,
        topk_method="greedy" if seed % 2 == 0 else "group_limited_greedy", num_nextn_predict_layers=0,
    )  # fmt: skip
    # transformers' V2 wants the hidden size to divide by the heads, and complex views that start at even elements.
    values |= {"hidden_size": values["num_attention_heads"] * 16, "qk_nope_head_dim": 10, "kv_lora_rank": 24}
    return values


@pytest.mark.parametrize("seed", range(8))
def test_v2_both_ways(seed, tmp_path):
    values = random_v2_shapes(seed)
    theirs = DeepseekV2ForCausalLM(DeepseekV2Config(**values, experts_implementation="eager")).eval()
    randomise(theirs, seed)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    assert ours.cfg.scoring_func == "softmax" and ours.cfg.num_nextn_predict_layers == 0
    tokens = safe_tokens(ours, seed)
    assert_same_logits(theirs, ours, tokens)
    assert_same_greedy_tokens(theirs, ours, tokens)
    save(ours, tmp_path / "ours")
    again = hf_load(tmp_path / "ours", DeepseekV2ForCausalLM)
    assert_same_logits(again, ours, tokens)


# ---- MTP ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def their_mtp_logits(folder, cfg: ModelConfig, tokens: torch.Tensor) -> list[torch.Tensor]:
    """transformers' MTP modules over known tokens: depth k reads depth k-1's state and the token k further on."""
    theirs = hf_load(folder)
    # It looks for layer 61 and beyond, V3's own number, in any model.
    theirs._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{cfg.num_hidden_layers + k}\." for k in range(cfg.num_nextn_predict_layers)
    ]
    modules = MtpModel.from_pretrained(theirs).eval()
    # The state that its generate(use_mtp=True) hands over.
    hidden = theirs(tokens, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, theirs.model(tokens).last_hidden_state)  # that is: after the final norm
    logits = []
    for k in range(cfg.num_nextn_predict_layers):
        known = tokens[:, k + 1 :]
        positions = torch.arange(k + 1, tokens.shape[1])[None]
        hidden = modules.forward_layer(k, hidden[:, : known.shape[1]], positions, None, input_ids=known)
        logits.append(modules._project_to_logits(hidden))
    return logits


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_mtp_logits(depth, tmp_path):
    """transformers feeds MTP with the state after the final norm, and depth k+1 with depth k's state after its norm."""
    cfg = ModelConfig.from_dict(random_shapes(7) | {"num_nextn_predict_layers": depth})
    ours = Transformer(cfg)
    randomise(ours, seed=depth)
    save(ours, tmp_path)
    tokens = safe_tokens(ours, depth)
    expected = their_mtp_logits(tmp_path, cfg, tokens)
    with torch.no_grad():
        found = ours(tokens).mtp_logits
        ours.cfg = cfg.replace(mtp_hidden_norm=False)
        before_norm = ours(tokens).mtp_logits
    assert len(found) == len(expected) == depth
    for k in range(depth):
        assert found[k].shape == (BATCH, LENGTH - k - 1, cfg.vocab_size)
        torch.testing.assert_close(found[k], expected[k], rtol=0, atol=TOLERANCE)
        assert (before_norm[k] - expected[k]).abs().max() > 0.01  # the switch is a real one


# ---- FP8 ------------------------------------------------------------------------------------------------------------


def test_fp8_checkpoint_dequantises_as_in_transformers(tmp_path):
    """By the function of its FP8 layers. Its loader is no oracle: it takes ceil(N / 128) blocks of equal height, which
    is another matrix for every N that 128 does not divide, such as the 576 of kv_a_proj_with_mqa."""
    ours = Transformer(ModelConfig.preset("toy", vocab_size=64, hidden_size=200, num_hidden_layers=2))
    randomise(ours, seed=0)
    save(ours, tmp_path, fp8=True)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    unquantised = {}
    for name, tensor in tensors.items():
        if f"{name}_scale_inv" in tensors:
            tensor = _dequantize_fp8_weight(tensor, tensors[f"{name}_scale_inv"], [128, 128], torch.float32)
        if not name.endswith("_scale_inv"):
            unquantised[name] = tensor.float()
    save(load(tmp_path, dtype=torch.float32), tmp_path / "ours")
    (file,) = (tmp_path / "ours").glob("*.safetensors")
    found = load_file(file)
    assert found.keys() == unquantised.keys() and len(tensors) > len(found)
    for name, tensor in found.items():
        assert torch.equal(tensor, unquantised[name]), name


# ---- the check can fail ---------------------------------------------------------------------------------------------


def split_half_rope(x, table):
    pairs = torch.complex(*x.chunk(2, -1)) * table.unsqueeze(-2)
    return torch.cat([pairs.real, pairs.imag], -1)


def gate_with(monkeypatch, change):
    """Replaces the router by one written out here, in which `change` alters one step."""

    def forward(self, x):
        cfg, s = self.cfg, self.scores(x)
        indices = self.choose(s)
        source = s + self.e_score_correction_bias if change == "bias leaks into the gate" else s
        weights = source.gather(-1, indices)
        if change != "gates not normalised":
            weights = weights / weights.sum(-1, keepdim=True)
        if change != "no routed scaling":
            weights = weights * cfg.routed_scaling_factor
        return router.Routing(weights, indices, s, router.count_load(indices, cfg.n_routed_experts))

    monkeypatch.setattr(router.Gate, "forward", forward)


def mask_with_zero(choice, cfg):
    kept = KEEP_BEST_GROUPS(choice, cfg)
    return kept.masked_fill(kept.isinf(), 0.0)


def score_groups_by_best(choice, cfg):
    return KEEP_BEST_GROUPS(choice, types.SimpleNamespace(n_group=cfg.n_group, topk_group=cfg.topk_group, topk_method=""))


KEEP_BEST_GROUPS = router.keep_best_groups


def each(model, attribute):
    return [getattr(m, attribute) for m in model.modules() if hasattr(m, attribute)]


@torch.no_grad()
def perturb(model: Transformer, change: str, monkeypatch) -> None:
    """Applies one of the errors seen in public reimplementations."""
    if change == "split-half rope":
        monkeypatch.setattr(attention, "apply_rope", split_half_rope)
    elif change == "no mscale":
        for layer in each(model, "self_attn"):
            layer.scale = model.cfg.qk_head_dim**-0.5
    elif change == "no yarn":
        model.cfg = model.cfg.replace(rope_scaling=None)
    elif change == "group mask of 0":
        monkeypatch.setattr(router, "keep_best_groups", mask_with_zero)
    elif change == "no groups":
        monkeypatch.setattr(router, "keep_best_groups", lambda choice, cfg: choice)
    elif change == "group score is the best":
        monkeypatch.setattr(router, "keep_best_groups", score_groups_by_best)
    elif change == "no bias":
        for gate in model.routers():
            gate.e_score_correction_bias.zero_()
    elif change == "no shared expert":
        for shared in each(model, "shared_experts"):
            shared.down_proj.weight.zero_()
    elif change == "gate and up swapped":
        for experts in model.experts():
            experts.gate_up_proj.copy_(torch.cat(experts.gate_up_proj.chunk(2, 1)[::-1], 1))
    elif change == "experts shifted by one":
        for experts in model.experts():
            experts.down_proj.copy_(experts.down_proj.roll(1, 0))
    elif change == "latent not normed":
        for norm in each(model, "kv_a_layernorm"):
            monkeypatch.setattr(norm, "forward", lambda x: x)
    else:
        gate_with(monkeypatch, change)


CHANGES = [
    "split-half rope", "no mscale", "no yarn", "group mask of 0", "no groups", "group score is the best", "no bias",
    "no shared expert", "gate and up swapped", "experts shifted by one", "latent not normed", "bias leaks into the gate",
    "gates not normalised", "no routed scaling",
]  # fmt: skip


def full_featured(tmp_path):
    """A model with every feature switched on, in both implementations, and tokens."""
    values = random_shapes(11) | dict(
        num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=16, n_group=4, topk_group=2,
        num_experts_per_tok=5, norm_topk_prob=True, routed_scaling_factor=2.5, qk_rope_head_dim=8, qk_nope_head_dim=8,
        rope_scaling=dict(type="yarn", factor=4, original_max_position_embeddings=16, beta_fast=4, beta_slow=1,
                          mscale=1.0, mscale_all_dim=1.0),
    )  # fmt: skip
    theirs = hf_v3(values)
    randomise(theirs, seed=11)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    return theirs, ours, safe_tokens(ours, 11)


@pytest.mark.parametrize("change", ["nothing", *CHANGES])
def test_the_comparison_can_fail(change, tmp_path, monkeypatch):
    theirs, ours, tokens = full_featured(tmp_path)
    if change == "nothing":
        assert_same_logits(theirs, ours, tokens)
        gate_with(monkeypatch, "nothing")  # the router written out here is the same function
        assert_same_logits(theirs, ours, tokens)
        return
    perturb(ours, change, monkeypatch)
    with torch.no_grad():
        difference = (theirs(tokens).logits - ours(tokens, mtp=False).logits).abs().max()
    assert difference > 1000 * TOLERANCE


# ---- YaRN as a function ---------------------------------------------------------------------------------------------


def their_yarn(values: dict) -> tuple[torch.Tensor, float, float]:
    config = DeepseekV3Config(**values)
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    layers = transformers.models.deepseek_v3.modeling_deepseek_v3
    return frequencies, factor, layers.yarn_apply_mscale(config.rope_parameters, config.qk_head_dim**-0.5)


def assert_same_yarn(values: dict) -> ModelConfig:
    cfg = ModelConfig.from_dict(values)
    frequencies, factor, scale = their_yarn(values)
    torch.testing.assert_close(rope_frequencies(cfg), frequencies, rtol=1e-6, atol=0)
    assert rope_attention_factor(cfg) == pytest.approx(factor, rel=1e-12)
    assert softmax_scale(cfg) == pytest.approx(scale, rel=1e-12)
    return cfg


def test_yarn_of_v3():
    v3 = ModelConfig.preset("v3")
    cfg = assert_same_yarn(dict(rope_scaling=dict(v3.rope_scaling), max_position_embeddings=163840))
    assert softmax_scale(cfg) == pytest.approx(0.13523, abs=5e-6) and rope_attention_factor(cfg) == 1
    plain = rope_frequencies(v3.replace(rope_scaling=None))
    assert torch.equal(rope_frequencies(v3)[:10], plain[:10])  # fast pairs stay
    torch.testing.assert_close(rope_frequencies(v3)[-8:], plain[-8:] / 40)  # slow ones are stretched 40 times


@given(
    factor=st.floats(1, 64), length=st.integers(1, 10000), rope_dim=st.integers(1, 64), fast=st.floats(2, 64),
    slow=st.floats(0.1, 2), theta=st.floats(50, 1e6), mscales=st.sampled_from([(1, 1), (0.707, 0.707), (1.3, 0.4), None]),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_yarn_of_any_numbers(factor, length, rope_dim, fast, slow, theta, mscales):
    scaling = dict(type="yarn", factor=factor, original_max_position_embeddings=length, beta_fast=fast, beta_slow=slow)
    if mscales:
        scaling |= {"mscale": mscales[0], "mscale_all_dim": mscales[1]}
    assert_same_yarn(dict(rope_scaling=scaling, rope_theta=theta, qk_rope_head_dim=2 * rope_dim))
