"""A tiny corpus, a tiny model, and the settings that train it in a second."""

import random

import pytest

from minids.data import DataConfig
from minids.train.settings import RecipeConfig, TrainConfig

# Two layers (one dense, one MoE with groups) and one MTP module: every mechanism of V3, 60 thousand parameters.
TINY = ("hidden_size=32", "num_hidden_layers=2", "intermediate_size=48", "moe_intermediate_size=16",
        "num_attention_heads=2", "q_lora_rank=16", "kv_lora_rank=16", "qk_nope_head_dim=8", "qk_rope_head_dim=4",
        "v_head_dim=8", "n_routed_experts=8", "num_experts_per_tok=2", "n_group=4", "topk_group=2")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 60 small programs, and a cache beside it."""
    root = tmp_path_factory.mktemp("corpus")
    folder = root / "text"
    folder.mkdir()
    generator = random.Random(0)
    names = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]
    for i in range(60):
        lines = [f"def {generator.choice(names)}_{i}({generator.choice(names)}):"]
        for _ in range(generator.randint(4, 12)):
            a, b, c = (generator.choice(names) for _ in range(3))
            lines.append(f"    {a} = {b} {generator.choice('+-*/')} {c} + {generator.randint(0, 99)}")
        (folder / f"{i}.py").write_text("\n".join([*lines, "    return alpha", ""]))
    return root


@pytest.fixture(scope="session")
def build_tiny(corpus):
    """build_tiny(out=..., **changes) -> TrainConfig: 20 steps of 4 rows of 32 tokens; `recipe` and `data` are dicts,
    `model` adds to TINY."""

    def build(recipe=None, data=None, model=(), **changes):
        data = {"corpus": "folder", "path": str(corpus / "text"), "vocab_size": 320, "min_chars": 1,
                "valid_fraction": 0.1, "cache_dir": str(corpus / "cache")} | (data or {})
        recipe = {"tokens": 20 * 4 * 32, "sequence_length": 32, "batch": 4, "batch_start": 4, "lr": 3e-3,
                  "warmup_steps": 2} | (recipe or {})
        settings = {"model": (*TINY, *model), "micro_batch": 4, "eval_every": 5, "eval_rows": 4,
                    "save_every": 5, "sample_tokens": 4, "prompts": ("def alpha",)} | changes
        return TrainConfig(data=DataConfig(**data), recipe=RecipeConfig(**recipe), **settings)

    return build


@pytest.fixture
def tiny(build_tiny, tmp_path):
    """`build_tiny` with the run in tmp_path / "run"."""
    return lambda **changes: build_tiny(**({"out": tmp_path / "run"} | changes))


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("CI", "1")
