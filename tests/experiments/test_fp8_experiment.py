"""The fp8 experiment: what it compares, what it keeps, and what it refuses."""

import json

import pytest

from minids.data import DataConfig
from minids.experiments import fp8
from minids.experiments.fp8 import VARIANTS, Fp8Config, compare, run, smooth, train_config
from minids.fp8.recipe import RECIPES
from minids.train.settings import RecipeConfig

TINY = ("hidden_size=32", "num_hidden_layers=2", "intermediate_size=48", "moe_intermediate_size=16",
        "num_attention_heads=2", "q_lora_rank=16", "kv_lora_rank=16", "qk_nope_head_dim=8", "qk_rope_head_dim=4",
        "v_head_dim=8", "n_routed_experts=8", "num_experts_per_tok=2", "n_group=4", "topk_group=2")  # fmt: skip


@pytest.fixture
def config(tmp_path):
    def build(**changes):
        (tmp_path / "text").mkdir(exist_ok=True)
        for i in range(40):
            (tmp_path / "text" / f"{i}.py").write_text("\n".join(f"value_{j} = {i * j} + {j}" for j in range(30)))
        data = DataConfig(corpus="folder", path=str(tmp_path / "text"), vocab_size=320, min_chars=1, valid_fraction=0.1,
                          cache_dir=str(tmp_path / "cache"))  # fmt: skip
        recipe = RecipeConfig(tokens=12 * 4 * 32, sequence_length=32, batch=4, batch_start=4, warmup_steps=2)
        return Fp8Config(**{"out": tmp_path / "out", "model": TINY, "data": data, "recipe": recipe, "micro_batch": 4,
                            "variants": ("bf16", "v3", "mx"), **changes})  # fmt: skip

    return build


def test_variants_differ_in_precision_alone(config, tmp_path):
    settings = {v: train_config(config(variants=VARIANTS), v, tmp_path).to_dict() for v in VARIANTS}
    for variant, found in settings.items():
        found.pop("out")
        assert (found.pop("fp8") == variant) == (variant in RECIPES)
        assert found.pop("precision") == ("fp32" if variant == "fp32" else "bf16-autocast")
        assert found.pop("micro_batch") == (2 if variant == "bf16_split" else 4)
        assert found["optim"]["moments"] == "bf16"
    assert all(found == settings["bf16"] for found in settings.values())


def test_finished_variants_are_kept_and_skipped(config, tmp_path, monkeypatch):
    first = run(config(variants=("bf16", "v3")))
    assert list(first["variants"]) == ["bf16", "v3"] and len(first["variants"]["v3"]["losses"]) == 12
    started = []
    real = fp8.one_variant
    monkeypatch.setattr(fp8, "one_variant", lambda c, v, *rest: started.append(v) or real(c, v, *rest))
    second = run(config())
    assert started == ["mx"] and second["variants"]["v3"] == json.loads((tmp_path / "out" / "v3.json").read_text())
    stored = json.loads((tmp_path / "out" / "fp8.json").read_text())
    assert set(stored["differences"]) == {"v3", "mx"} and (tmp_path / "out" / "loss_differences.png").exists()
    base, v3 = stored["variants"]["bf16"]["losses"], stored["variants"]["v3"]["losses"]
    assert base != v3 and all(abs(a / b - 1) < 0.02 for a, b in zip(base, v3, strict=True))
    assert run(config(draw_only=True))["variants"].keys() == second["variants"].keys()
    assert started == ["mx"]


def test_a_variant_that_was_cut_off_is_trained_again(config, tmp_path):
    run(config(variants=("bf16",)))
    path = tmp_path / "out" / "bf16.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "finished": False, "losses": whole["losses"][:3]}))
    assert run(config(variants=("bf16",)))["variants"]["bf16"]["losses"] == whole["losses"]


def test_minutes_end_a_variant_early_on_the_same_curve(config, tmp_path):
    whole = run(config(variants=("bf16",)))["variants"]["bf16"]["losses"]
    cut = run(config(variants=("bf16",), out=tmp_path / "cut", minutes=1e-6))["variants"]["bf16"]
    assert cut["finished"] and cut["losses"] == whole[:1]


def test_held_out_losses_are_taken_on_the_way_and_change_nothing(config, tmp_path):
    plain = run(config(variants=("bf16",)))["variants"]["bf16"]
    found = run(config(variants=("bf16", "v3"), out=tmp_path / "evals", evals=3))
    curves = {name: variant["valid_curve"] for name, variant in found["variants"].items()}
    assert [step for step, _ in curves["bf16"]] == [step for step, _ in curves["v3"]] == [4, 8, 12]
    assert found["variants"]["bf16"]["losses"] == plain["losses"] and curves["bf16"][-1] == plain["valid_curve"][0]
    assert curves["v3"][-1][1] == found["variants"]["v3"]["valid"] and curves["bf16"][0][1] > curves["bf16"][1][1]
    assert "valid_bf16" not in found["variants"]["bf16"]
    assert 0 < abs(found["variants"]["v3"]["valid_bf16"] / found["variants"]["v3"]["valid"] - 1) < 0.01
    difference = found["differences"]["v3"]["valid"]
    for (step, ours), (_, theirs), (at, d) in zip(curves["v3"], curves["bf16"], difference, strict=True):
        assert at == step and d == pytest.approx(ours / theirs - 1, abs=1e-6)
    shorter = {"valid_curve": curves["v3"][:1] + [[6, 1.0]]}
    assert fp8.compare_valid(found["variants"]["bf16"], shorter) == [difference[0]] and fp8.compare_valid({}, shorter) == []


def test_differences_are_of_smoothed_curves_after_the_first_tenth():
    assert smooth([4.0, 3.0], 0.9) == pytest.approx([4.0, 3.9])
    base = [4.0] * 20
    shifted = [8.0] * 2 + [4.04] * 18
    found = compare(base, shifted)
    assert found["curve"][:2] == [1.0, 1.0]
    ema = [4.04 + (8 - 4.04) * 0.9 ** (t + 1) for t in range(18)]
    assert found["largest"] == pytest.approx(ema[0] / 4 - 1) and found["last"] == pytest.approx(ema[-1] / 4 - 1)
    assert len(compare(base, shifted[:5])["curve"]) == 5


def test_other_settings_in_the_folder_are_refused(config):
    run(config(variants=("bf16",)))
    with pytest.raises(ValueError, match="holds variants of other settings"):
        run(config(variants=("v3",), seed=1))


@pytest.mark.parametrize("changes, message", [
    ({"variants": ("v4",)}, "variants = .*must be some of bf16, bf16_split, fp32, v3"),
    ({"variants": ()}, "must be some of"), ({"minutes": -1.0}, "minutes = -1.0"), ({"evals": -1}, "evals = -1"),
    ({"micro_batch": 1, "variants": ("bf16_split",)}, "micro_batch = 1 with bf16_split"),
    ({"device": "tpu"}, "device = 'tpu'"), ({"preset": "tiny"}, "preset='tiny'"),
])  # fmt: skip
def test_impossible_settings_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
