"""The config: the paper's counts come out exactly, the published file is read as it is, impossible values are refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minids import ModelConfig
from minids.config import PRESETS

# The file published with DeepSeek-V3, key by key.
PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1,
    "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


def test_counts_are_the_papers():
    n = ModelConfig.preset("v3").count()
    assert n["main"] == 671_026_419_200
    assert n["mtp"] == 11_610_068_224
    assert n["on_disk"] == 684_489_845_504
    assert n["fp8_scales"] == 41_540_496
    assert n["on_disk"] + n["fp8_scales"] == 684_531_386_000
    assert n["activated"] == 37_552_297_472
    assert n["activated_without_embedding"] == 36_625_618_432
    assert n["kv_bytes_per_token"] == 70_272
    assert ModelConfig.preset("v2_lite").count()["main"] == 15_706_484_224


def test_training_flops_are_the_papers():
    cfg = ModelConfig.preset("v3")
    assert cfg.flops_per_token() == 6 * 36_625_618_432 + 3 * 61 * 2 * 128 * 320 * 2048
    assert round(cfg.flops_per_token() / 1e9) == 250
    slope = cfg.flops_per_token(8192) - cfg.flops_per_token(4096)
    assert slope == 3 * 61 * 2 * 128 * 320 * 2048  # linear in the length
    with pytest.raises(ValueError, match="length=0"):
        cfg.flops_per_token(0)


def test_small_activates_a_third_of_a_billion():
    assert 0.25e9 < ModelConfig.preset("small").count()["activated"] < 0.4e9


def test_reads_the_published_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED))
    cfg = ModelConfig.from_json(path)
    assert cfg.replace(initializer_range=0.006, extra={}) == ModelConfig.preset("v3")
    assert cfg.extra["auto_map"] == PUBLISHED["auto_map"] and cfg.extra["ep_size"] == 1
    written = cfg.to_dict()
    assert {key: written[key] for key in PUBLISHED} == PUBLISHED  # nothing lost, nothing changed
    assert cfg.aux_loss_alpha == 1e-4  # missing in the file: the paper's, not 0


def test_reads_rope_parameters(tmp_path):
    newer = {k: v for k, v in PUBLISHED.items() if k not in ("rope_scaling", "rope_theta")}
    scaling = {k: v for k, v in PUBLISHED["rope_scaling"].items() if k != "type"}
    newer["rope_parameters"] = {**scaling, "rope_theta": 10000, "rope_type": "yarn"}
    assert ModelConfig.from_dict(newer).rope_scaling == PUBLISHED["rope_scaling"]
    newer["rope_parameters"] = {"rope_theta": 5000.0, "rope_type": "default"}
    plain = ModelConfig.from_dict(newer)
    assert plain.rope_scaling is None and plain.rope_theta == 5000.0


@given(st.sampled_from(sorted(PRESETS)))
def test_round_trip(name):
    cfg = ModelConfig.preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))).replace(extra={}) == cfg


@pytest.mark.parametrize("changes, named", [
    ({"num_key_value_heads": 64}, "num_key_value_heads=64"),
    ({"hidden_size": 0}, "hidden_size=0"),
    ({"hidden_size": 7168.0}, "hidden_size=7168.0"),
    ({"vocab_size": "many"}, "vocab_size='many'"),
    ({"num_experts_per_tok": 129}, "num_experts_per_tok=129.*at most 128"),
    ({"n_group": 7}, "n_group=7.*divisor"),
    ({"n_group": 256, "topk_group": 8}, "n_group=256.*two experts"),
    ({"topk_group": 9}, "topk_group=9.*1 to n_group=8"),
    ({"topk_group": 0}, "topk_group=0"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim=63.*even"),
    ({"first_k_dense_replace": 62}, "first_k_dense_replace=62"),
    ({"n_routed_experts": 0}, "n_routed_experts=0"),
    ({"q_lora_rank": 0}, "q_lora_rank=0"),
    ({"scoring_func": "relu"}, "scoring_func='relu'.*sigmoid or softmax"),
    ({"topk_method": "best"}, "topk_method='best'"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ({"rope_theta": -1}, "rope_theta=-1"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling=.*yarn"),
    ({"rope_scaling": {"type": "yarn", "factor": 0.5, "original_max_position_embeddings": 8}}, "factor of at least 1"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, "original_max_position_embeddings"),
    ({"rope_theta": 1.0}, r"rope_theta=1\.0.*above 1"),
    ({"rope_scaling": [40]}, r"rope_scaling=\[40\].*an object"),
    ({"rope_scaling": "yarn"}, "rope_scaling='yarn'.*an object"),
    ({"rope_scaling": {**PUBLISHED["rope_scaling"], "factor": float("inf")}}, "a finite factor"),
    ({"rope_scaling": {**PUBLISHED["rope_scaling"], "beta_fast": "32"}}, "beta_fast.*numbers"),
    ({"rope_scaling": {**PUBLISHED["rope_scaling"], "mscale_all_dim": "1"}}, "mscale_all_dim.*numbers"),
    ({"rms_norm_eps": True}, "rms_norm_eps=True"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'.*true or false"),
    ({"norm_topk_prob": 1}, "norm_topk_prob=1.*true or false"),
    ({"quantization_config": "fp8"}, "quantization_config='fp8'.*an object"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"aux_loss_alpha": -1}, "aux_loss_alpha=-1"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1"),
])  # fmt: skip
def test_impossible_values_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig.preset("v3").replace(**changes)


def test_a_factor_without_a_type_is_not_dropped():
    nameless = {key: value for key, value in PUBLISHED["rope_scaling"].items() if key != "type"}
    with pytest.raises(ValueError, match="rope_scaling=.*type 'yarn'"):
        ModelConfig.from_dict({**PUBLISHED, "rope_scaling": nameless})
    with pytest.raises(ValueError, match="rope_scaling=.*an object"):
        ModelConfig.from_dict({**PUBLISHED, "rope_scaling": [40]})


def test_ways_in_refuse_what_is_no_config(tmp_path):
    with pytest.raises(ValueError, match="preset='v4'.*toy, small, v2_lite, v3"):
        ModelConfig.preset("v4")
    with pytest.raises(ValueError, match="does not exist"):
        ModelConfig.from_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="bad.json"):
        ModelConfig.from_json(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="allowed is an object"):
        ModelConfig.from_json(tmp_path / "list.json")
    with pytest.raises(ValueError, match="no field hiden_size"):
        ModelConfig.preset("toy").replace(hiden_size=4)
