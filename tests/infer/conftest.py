"""Small models with MTP modules for the tests of speculation: random ones, and ones whose drafts are often right."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch

from minids import ModelConfig, Transformer

YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
# Depth, query with and without low rank, experts in groups or not, RoPE stretched or not, MTP reading before the norm.
CONFIGS = {
    "plain_query": dict(num_nextn_predict_layers=1, q_lora_rank=None, n_group=1, topk_group=1),
    "groups_yarn": dict(num_nextn_predict_layers=2, n_group=4, topk_group=2, rope_scaling=YARN),
    "softmax_depth3": dict(num_nextn_predict_layers=3, n_group=2, topk_group=1, mtp_hidden_norm=False,
                           scoring_func="softmax", norm_topk_prob=False, routed_scaling_factor=1.0),
}  # fmt: skip
VOCAB = 29


def config(name: str, **overrides) -> ModelConfig:
    shape = dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, first_k_dense_replace=1, intermediate_size=48,
        moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, q_lora_rank=24, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, num_attention_heads=4, max_position_embeddings=64,
        initializer_range=0.2,
    )  # fmt: skip
    return ModelConfig.from_dict({**shape, **CONFIGS.get(name, {}), **overrides})


def random_model(name: str, seed: int = 0, dtype=torch.float64, **overrides) -> Transformer:
    """Weights drawn, router biases and norms too."""
    torch.manual_seed(seed)
    model = Transformer(config(name, **overrides)).to(dtype)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
        for gate in model.routers():
            if gate.e_score_correction_bias is not None:
                gate.e_score_correction_bias.uniform_(-0.1, 0.1)
    return model.eval()


def texts(rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """A language that is half learnt in seconds: after an odd token comes a fixed one; after an even token one that also
    depends on the token before, by a table that takes longer to learn. One time in eight it is any token."""
    table = torch.randint(0, VOCAB, (VOCAB, VOCAB), generator=torch.Generator().manual_seed(1))
    found = torch.randint(0, VOCAB, (rows, length), generator=generator)
    for i in range(2, length):
        last, before = found[:, i - 1], found[:, i - 2]
        follows = torch.where(last % 2 == 1, table[0, last], table[before, last])
        surprise = torch.rand(rows, generator=generator) < 0.125
        found[:, i] = torch.where(surprise, found[:, i], follows)
    return found


@cache
@torch.enable_grad()
def trained_model(name: str, steps: int = 40, noise: float = 0.7) -> Transformer:
    """`random_model` after some steps on `texts`, then disturbed by noise, float64: its drafts are neither always wrong nor
    always right. Cached: tests must not change it."""
    model, generator = random_model(name, initializer_range=0.05).float(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        rows = texts(24, 33, generator)
        out = model(rows[:, :-1], labels=rows[:, 1:])
        optimizer.zero_grad()
        (out.loss + out.mtp_loss).backward()
        optimizer.step()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * parameter.std() * noise)
    return model.double().eval()


@pytest.fixture(scope="session")
def small():
    """The functions of this file, for tests (which import no file beside them)."""
    return SimpleNamespace(names=list(CONFIGS), vocab=VOCAB, config=config, random=random_model, trained=trained_model,
                           texts=texts)  # fmt: skip
