"""Gradients of a whole model in FP8 by two engines, or two kinds of scales: equally far from BF16, as the format has it.

A last bit that differs moves a number to the next E4M3 number, 2^-3 to 2^-4 away, so that two ways to compute the same FP8
model soon round independently of each other: each is some distance d from BF16's gradients, and they are up to sqrt(2) d
from each other. An engine with a mistake would be further from BF16 than the other. (All experts are chosen: where they are
not, the choice flips at ties, which adds half as much again.)
"""

import copy

import pytest
import torch

from minids import ModelConfig, Transformer
from minids.fp8 import Fp8Recipe, to_fp8

SIZES = dict(vocab_size=512, num_hidden_layers=2, hidden_size=256, intermediate_size=256, moe_intermediate_size=128,
             num_attention_heads=4, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64, v_head_dim=64, bos_token_id=0,
             eos_token_id=1, n_routed_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1)  # fmt: skip
WHERE = [
    pytest.param("cpu", {"scale": "ue8m0"}, id="two scales"),
    pytest.param("cuda", {"engine": "real"}, id="two engines",
                 marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]  # fmt: skip


def gradients(base, rows, recipe):
    model = copy.deepcopy(base)
    if recipe is not None:
        to_fp8(model, recipe)
    with torch.autocast(rows.device.type, torch.bfloat16):
        out = model(rows[:, :-1], labels=rows[:, 1:])
    (out.loss + 0.3 * out.mtp_loss).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def distance(found, wanted):
    """Relative, the mean over all parameters."""
    return sum(float((found[n] - w).norm() / w.norm()) for n, w in wanted.items()) / len(wanted)


@pytest.mark.parametrize("device, changes", WHERE)
def test_two_ways_are_equally_far_from_bf16(device, changes):
    torch.manual_seed(0)
    with torch.device(device):
        base = Transformer(ModelConfig.preset("small", **SIZES))
    rows = torch.randint(0, 512, (2, 257), generator=torch.Generator().manual_seed(0)).to(device)
    bf16 = gradients(base, rows, None)
    one = gradients(base, rows, Fp8Recipe.named("v3", engine="simulated"))
    two = gradients(base, rows, Fp8Recipe.named("v3", **{"engine": "simulated", **changes}))
    d_one, d_two, between = distance(one, bf16), distance(two, bf16), distance(two, one)
    assert 0.05 < d_one < 0.15
    assert abs(d_two / d_one - 1) < 0.1
    assert 0 < between < 1.1 * 2**0.5 * d_one
