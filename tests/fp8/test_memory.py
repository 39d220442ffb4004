"""The memory table: what is measured is what the formula says, and FP8 keeps what V3 says it keeps."""

import pytest
import torch

from minids import ModelConfig, Transformer
from minids.fp8 import to_fp8
from minids.fp8.memory import PARTS, compare, formula, measure, state_bytes, table
from minids.train.optim import OptimConfig, Optimizer

SHAPE = dict(hidden_size=160, num_hidden_layers=3, intermediate_size=144, moe_intermediate_size=48, vocab_size=300,
             num_attention_heads=2, q_lora_rank=32, kv_lora_rank=16, n_routed_experts=8, num_experts_per_tok=2)  # fmt: skip


def model_and_rows():
    torch.manual_seed(0)
    cfg = ModelConfig.preset("toy", **SHAPE, num_nextn_predict_layers=0)
    return Transformer(cfg), torch.randint(0, 300, (2, 71))


def slots_of(model, rows, multiple):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loads = model(rows[:, :-1]).loads()
    return int(((loads + multiple - 1) // multiple * multiple).sum())


def test_fp8_keeps_what_the_formula_says():
    model, rows = model_and_rows()
    to_fp8(model)
    found, _ = measure(model, rows)
    wanted = formula(model.cfg, 140, slots_of(model, rows, 128), (1, 2), fp8=True)
    for part in ("input of o_proj", "dense and shared", "routed experts"):
        assert found[part] == wanted[part], part
    # The rotation table is kept beside the compressed query and latent: 70 positions of 8 complex64.
    assert 0 <= found["core of attention"] - wanted["core of attention"] <= 70 * 8 * 8
    assert found["inputs of projections"] == 0  # behind norms, which keep their own inputs
    # Up-projections run again, and quantise their weights again.
    names = [name for name, _ in model.named_parameters() if "_proj" in name and not name.endswith("_b_proj.weight")]
    quantised = sum(model.get_parameter(name).numel() for name in names)
    assert 0 < found["weights' copies"] - quantised < 0.1 * quantised  # scales


def test_plain_keeps_what_the_formula_says():
    model, rows = model_and_rows()
    found, _ = measure(model, rows)
    wanted = formula(model.cfg, 140, slots_of(model, rows, 1), (1, 2), fp8=False)
    wanted["routed experts"] += 2 * 8 * 4  # where the blocks of 8 experts end, in two layers
    for part in ("input of o_proj", "dense and shared", "routed experts"):
        assert found[part] == wanted[part], part


def test_state_is_counted_by_dtype():
    model, rows = model_and_rows()
    numbers = sum(p.numel() for p in model.parameters())
    for moments, size in (("fp32", 8), ("bf16", 4)):
        optimizer = Optimizer(model, OptimConfig(moments=moments))
        measure(model, rows)[1].backward()
        assert state_bytes(model, optimizer) == {"weights": 4 * numbers, "moments": 0, "gradients": 4 * numbers}
        optimizer.step(0.0)
        assert state_bytes(model, optimizer) == {"weights": 4 * numbers, "moments": size * numbers, "gradients": 0}


def test_the_table_has_every_part_and_its_sum():
    cfg = ModelConfig.preset("toy", **SHAPE)
    lines = compare(cfg, rows=2, length=70)
    assert [part for part, *_ in lines] == [*PARTS, "weights", "moments", "gradients"]
    text = table(lines)
    kept = sum(line[2] for line in lines[: len(PARTS)])
    assert f"{kept / 1024:,.0f} |" in text and kept < 0.7 * sum(line[1] for line in lines[: len(PARTS)])


def test_a_batch_that_looks_like_a_weight_is_refused():
    model, _ = model_and_rows()
    with pytest.raises(ValueError, match="rows: got 300 tokens, as many as a weight has rows"):
        measure(model, torch.zeros(2, 151, dtype=torch.int64))
