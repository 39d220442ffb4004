"""RoPE and YaRN: rotations that depend on distance alone, neighbouring pairs, and V3's published constants."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from minids import ModelConfig
from minids.model.rope import (
    apply_rope,
    rope_attention_factor,
    rope_frequencies,
    rope_table,
    softmax_scale,
    yarn_mscale,
    yarn_ramp,
)

CFG = ModelConfig.preset("toy", qk_rope_head_dim=8)


def rotate(x, positions, cfg=CFG):
    return apply_rope(x, rope_table(cfg, positions))


def test_by_hand():
    cfg = CFG.replace(qk_rope_head_dim=4, rope_theta=100.0)  # theta = 1, 1/10
    out = rotate(torch.tensor([1.0, 0.0, 0.0, 2.0]).view(1, 1, 1, 4), torch.tensor([[3]]), cfg).flatten()
    expected = [math.cos(3), math.sin(3), -2 * math.sin(0.3), 2 * math.cos(0.3)]
    torch.testing.assert_close(out, torch.tensor(expected))


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_scores_depend_on_distance_alone(t, s, shift):
    torch.manual_seed(t * 1000 + s)
    q, k = torch.randn(2, 1, 1, 1, 8).unbind()

    def score(a, b):
        return (rotate(q, torch.tensor([[a]])) * rotate(k, torch.tensor([[b]]))).sum()

    torch.testing.assert_close(score(t, s), score(t + shift, s + shift), atol=2e-4, rtol=1e-4)


def test_keeps_norms_and_position_zero():
    x = torch.randn(2, 5, 3, 8)
    positions = torch.arange(5).expand(2, 5)
    out = rotate(x, positions)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(out[:, 0], x[:, 0])
    assert rotate(x.bfloat16(), positions).dtype == torch.bfloat16


def test_pairs_are_neighbours_not_halves():
    x = torch.zeros(1, 1, 1, 8)
    x[..., 0] = 1.0
    changed = rotate(x, torch.tensor([[1]])).flatten().nonzero().flatten().tolist()
    assert changed == [0, 1]


def test_yarn_constants_of_v3():
    v3 = ModelConfig.preset("v3")
    assert round(softmax_scale(v3), 5) == 0.13523
    assert rope_attention_factor(v3) == 1.0
    assert math.isclose(yarn_mscale(40, 1.0), 0.1 * math.log(40) + 1)
    assert softmax_scale(v3.replace(rope_scaling=None)) == 192**-0.5
    plain, yarn, ramp = rope_frequencies(v3.replace(rope_scaling=None)), rope_frequencies(v3), yarn_ramp(v3)
    kept, stretched = ramp == 0, ramp == 1
    assert kept.sum() == 11 and stretched.sum() == 9  # of 32 pairs; the other 12 are blended
    torch.testing.assert_close(yarn[kept], plain[kept])
    torch.testing.assert_close(yarn[stretched], plain[stretched] / 40)
    turns = 4096 * plain / (2 * math.pi)  # how often a pair turns within the original length
    assert (turns[kept] > 32).sum() >= 10 and (turns[stretched] < 1).all()


def test_yarn_of_factor_one_changes_nothing():
    one = {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
    cfg = CFG.replace(rope_scaling=one)
    torch.testing.assert_close(rope_frequencies(cfg), rope_frequencies(CFG))
    assert softmax_scale(cfg) == softmax_scale(CFG)
