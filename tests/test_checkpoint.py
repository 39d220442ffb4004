"""The published format: exact plan, bit-exact round trips, and an error for every way a checkpoint can be wrong."""

import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minids.checkpoint as module
from minids import ModelConfig, Transformer
from minids.checkpoint import CheckpointError, is_checkpoint, load, plan, save
from minids.folder import replace_folder
from minids.fp8 import dequantize, quantize_block
from minids.shards import INDEX, Header

CFG = ModelConfig.preset("toy", vocab_size=96, hidden_size=144, num_hidden_layers=3, max_position_embeddings=64)
EMBEDDING, HEAD, BIAS = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.e_score_correction_bias"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def build(cfg: ModelConfig = CFG, seed: int = 0) -> Transformer:
    """A model in which no two numbers agree by chance, norms and biases included."""
    torch.manual_seed(seed)
    model = Transformer(cfg)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:
                tensor.add_(torch.randn(tensor.shape))
            assert name == HEAD or tensor.std() > 0
    return model


def stored(folder) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read with safetensors alone."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(left: Transformer, right: Transformer) -> None:
    a, b = left.state_dict(), right.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.fixture
def folder(tmp_path):
    """A small FP32 checkpoint in several shards."""
    save(build(), tmp_path / "c", max_shard_bytes=200_000)
    return tmp_path / "c"


def edit_json(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def rewrite(folder, name, change) -> None:
    """Replaces one stored tensor; None removes it, from the index too."""
    path = shard_of(folder, name)
    tensors = load_file(path)
    changed = change(tensors.pop(name))
    if changed is None:
        index = json.loads((folder / INDEX).read_text())
        del index["weight_map"][name]
        (folder / INDEX).write_text(json.dumps(index))
    else:
        tensors[name] = changed
    save_file({k: v.clone() for k, v in tensors.items()}, path, metadata={"format": "pt"})


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_plan_of_v3_is_the_published_checkpoint():
    began = time.perf_counter()
    entries = plan(ModelConfig.preset("v3"))
    assert time.perf_counter() - began < 20
    assert len(entries) == len({e.name for e in entries}) == 91_991
    assert sum(math.prod(e.shape) for e in entries) == 684_531_386_000
    assert sum(math.prod(e.shape) for e in entries if e.is_scale) == 41_540_496
    found = {e.name: (e.shape, e.dtype) for e in entries}
    fp8, bf16, fp32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
    attention = "model.layers.61.self_attn.kv_a_proj_with_mqa.weight"
    for name, shape, dtype in [
        (EMBEDDING, (129280, 7168), bf16),
        ("model.layers.0.mlp.gate_proj.weight", (18432, 7168), fp8),
        ("model.layers.0.mlp.gate_proj.weight_scale_inv", (144, 56), fp32),
        ("model.layers.3.self_attn.q_a_layernorm.weight", (1536,), bf16),
        ("model.layers.3.mlp.gate.weight", (256, 7168), bf16),
        ("model.layers.3.mlp.gate.e_score_correction_bias", (256,), fp32),
        ("model.layers.60.mlp.experts.255.down_proj.weight", (7168, 2048), fp8),
        ("model.layers.60.mlp.experts.255.down_proj.weight_scale_inv", (56, 16), fp32),
        ("model.layers.60.mlp.shared_experts.up_proj.weight", (2048, 7168), fp8),
        (attention, (576, 7168), fp8),
        (f"{attention}_scale_inv", (5, 56), fp32),
        ("model.layers.61.eh_proj.weight", (7168, 14336), bf16),
        ("model.layers.61.embed_tokens.weight", (129280, 7168), bf16),
        ("model.layers.61.shared_head.head.weight", (129280, 7168), bf16),
        ("model.layers.61.shared_head.norm.weight", (7168,), bf16),
    ]:
        assert found[name] == (shape, dtype)
    assert not any("eh_proj.weight_scale" in name or "gate.weight_scale" in name for name in found)


def test_plan_agrees_with_the_counts():
    for name in ("toy", "small", "v2_lite"):
        cfg = ModelConfig.preset(name)
        count, entries = cfg.count(), plan(cfg)
        assert sum(math.prod(e.shape) for e in entries if not e.is_scale) == count["on_disk"]
        assert sum(math.prod(e.shape) for e in entries if e.is_scale) == count["fp8_scales"]


@pytest.mark.parametrize("fp8", [False, True])
def test_save_writes_exactly_the_plan(tmp_path, fp8):
    save(build(), tmp_path / "c", fp8=fp8, max_shard_bytes=100_000)
    tensors = stored(tmp_path / "c")
    entries = plan(CFG, fp8, torch.bfloat16 if fp8 else torch.float32)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == {e.name: (e.shape, e.dtype) for e in entries}
    index = json.loads((tmp_path / "c" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    files = sorted(set(index["weight_map"].values()))
    n = len(files)
    assert n > 3 and files == [f"model-{i:05d}-of-{n:06d}.safetensors" for i in range(1, n + 1)]
    for file in files:
        with safe_open(tmp_path / "c" / file, "pt") as f:
            assert {name for name, where in index["weight_map"].items() if where == file} == set(f.keys())
            assert f.metadata() == {"format": "pt"}
            size = sum(f.get_tensor(name).nbytes for name in f.keys())
            assert size <= 100_000 or len([name for name in f.keys() if "scale" not in name]) == 1
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    if fp8:
        assert config["quantization_config"] == {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                                 "weight_block_size": [128, 128]}  # fmt: skip
    else:
        assert "quantization_config" not in config
    assert config["architectures"] == ["DeepseekV3ForCausalLM"] and config["hidden_size"] == 144
    assert config["torch_dtype"] == ("bfloat16" if fp8 else "float32")


@pytest.mark.parametrize("fp8", [False, True])
def test_shards_are_full_but_never_too_large(fp8):
    entries = plan(CFG, fp8)
    for limit in range(1_000, 200_000, 1_999):
        shards = module._pack(entries, limit)
        assert [entry for shard in shards for entry in shard] == entries
        sizes = [sum(entry.bytes for entry in shard) for shard in shards]
        for shard, size, after in zip(shards, sizes, [*shards[1:], None], strict=True):
            assert not shard[0].is_scale
            assert size <= limit or sum(not entry.is_scale for entry in shard) == 1
            if after:
                first = [after[0], *(entry for entry in after[1:2] if entry.is_scale)]
                assert size + sum(entry.bytes for entry in first) > limit


# ---- round trips ----------------------------------------------------------------------------------------------------


@given(
    depth=st.integers(0, 2), experts=st.sampled_from([4, 8]), shared=st.integers(0, 2), q_rank=st.sampled_from([None, 40]),
    hidden=st.integers(8, 150), dense=st.integers(0, 2), tied=st.booleans(), shard=st.sampled_from([1, 30_000, 10**9]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_round_trip_is_bit_exact(tmp_path_factory, depth, experts, shared, q_rank, hidden, dense, tied, shard, dtype, seed):
    cfg = CFG.replace(
        num_nextn_predict_layers=depth, n_routed_experts=experts, n_shared_experts=shared, q_lora_rank=q_rank, n_group=2,
        topk_group=1, num_experts_per_tok=2, hidden_size=hidden, num_hidden_layers=2, first_k_dense_replace=dense,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = build(cfg, seed).to(dtype)
    folder = tmp_path_factory.mktemp("round") / "c"
    save(model, folder, max_shard_bytes=shard)
    again = load(folder)
    assert_same(model, again)
    assert again.cfg.replace(extra={}) == cfg
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_fp8_round_trip_is_dequantised_quantisation(tmp_path, source):
    """Sizes of 144 and 96 leave cut blocks everywhere; nothing but quantisation may change a bit."""
    cfg = CFG.replace(num_nextn_predict_layers=2)
    model = build(cfg).to(source)
    save(model, tmp_path / "c", fp8=True, max_shard_bytes=50_000)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load(tmp_path / "c", dtype=dtype).state_dict()
        for name, tensor in model.state_dict().items():
            if "experts." in name and tensor.ndim == 3:
                gate_up = tensor.chunk(2, 1) if "gate_up" in name else [tensor]  # gate and up are blocked apart
                expected = torch.cat([dequantize(*quantize_block(part), dtype=dtype) for part in gate_up], 1)
            elif re.search(r"(_proj|_mqa)\.weight", name) and "eh_proj" not in name:
                expected = dequantize(*quantize_block(tensor), dtype=dtype)
            else:
                expected = tensor if "bias" in name else tensor.bfloat16().to(dtype)
            assert loaded[name].dtype == expected.dtype and torch.equal(loaded[name], expected), name
    assert load(tmp_path / "c").lm_head.weight.dtype == torch.bfloat16
    # Quantising again gives the same codes.
    save(load(tmp_path / "c", dtype=torch.float32), tmp_path / "again", fp8=True)
    first, second = stored(tmp_path / "c"), stored(tmp_path / "again")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if name.endswith("_scale_inv"):
            torch.testing.assert_close(second[name], tensor, rtol=2**-23, atol=0)
        else:
            assert torch.equal(second[name].float(), tensor.float()), name


def test_fp8_error_is_within_the_format(tmp_path):
    model = build()
    save(model, tmp_path / "c", fp8=True)
    loaded, exact = load(tmp_path / "c", dtype=torch.float32).state_dict(), model.state_dict()
    name = "model.layers.0.mlp.gate_proj.weight"
    error = (loaded[name] - exact[name]).abs()
    scale = exact[name].abs().max() / 448
    assert 0 < error.max() and (error <= (exact[name].abs() / 16).clamp(min=scale / 1024) * (1 + 1e-6)).all()


def test_expert_slices_are_where_they_belong(tmp_path):
    model = build()
    save(model, tmp_path / "c")
    tensors, experts = stored(tmp_path / "c"), model.model.layers[1].mlp.experts
    for e in range(CFG.n_routed_experts):
        stem = f"model.layers.1.mlp.experts.{e}."
        gate, up = experts.gate_up_proj[e].chunk(2)
        assert torch.equal(tensors[stem + "gate_proj.weight"], gate) and torch.equal(tensors[stem + "up_proj.weight"], up)
        assert torch.equal(tensors[stem + "down_proj.weight"], experts.down_proj[e])
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], tensors[EMBEDDING])
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], tensors[HEAD])


def test_dtypes(tmp_path):
    model = build()
    save(model, tmp_path / "c", dtype=torch.bfloat16)
    assert stored(tmp_path / "c")[BIAS].dtype == torch.float32 and stored(tmp_path / "c")[HEAD].dtype == torch.bfloat16
    kept, widened = load(tmp_path / "c"), load(tmp_path / "c", dtype=torch.float32)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in widened.parameters()} == {torch.float32}
    for loaded in (kept, widened):
        gate = loaded.model.layers[1].mlp.gate
        assert gate.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(gate.e_score_correction_bias, model.model.layers[1].mlp.gate.e_score_correction_bias)
    assert torch.get_default_dtype() == torch.float32
    assert module._stored_dtype(dict.fromkeys("ab", Header("f", (1,), "BF16"))) == torch.bfloat16
    for kinds in (("BF16", "F16"), ("F16", "F32"), ("F32", "BF16")):
        headers = {kind: Header("f", (1,), kind) for kind in kinds}
        assert module._stored_dtype(headers) == torch.float32
    rewrite(tmp_path / "c", "model.layers.1.mlp.gate.weight", lambda t: t.float())
    assert load(tmp_path / "c").lm_head.weight.dtype == torch.float32  # the widest: nothing stored is rounded


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_the_same_to_the_bit(tmp_path):
    save(build(), tmp_path / "cpu", fp8=True)
    save(build().cuda(), tmp_path / "cuda", fp8=True)
    first, second = stored(tmp_path / "cpu"), stored(tmp_path / "cuda")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].float(), second[name].float()) for name in first)
    loaded = load(tmp_path / "cpu", device="cuda")
    assert {t.device.type for t in loaded.state_dict().values()} == {"cuda"}
    assert_same(loaded.cpu(), load(tmp_path / "cpu"))


def test_logits_survive(folder):
    tokens = torch.randint(CFG.vocab_size, (2, 20))
    with torch.no_grad():
        expected, found = build()(tokens), load(folder, device="cpu")(tokens)
    assert torch.equal(expected.logits, found.logits) and torch.equal(expected.mtp_logits[0], found.mtp_logits[0])


def test_single_file_without_index_loads(folder):
    tensors = stored(folder)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(load(folder), build())


def test_scales_may_lie_in_another_shard(tmp_path):
    save(build(), tmp_path / "c", fp8=True)
    expected = load(tmp_path / "c")
    tensors = stored(tmp_path / "c")
    index = json.loads((tmp_path / "c" / INDEX).read_text())
    (file,) = set(index["weight_map"].values())
    scales = {name: t for name, t in tensors.items() if name.endswith("_scale_inv")}
    save_file(scales, tmp_path / "c" / "scales.safetensors")
    save_file({name: t for name, t in tensors.items() if name not in scales}, tmp_path / "c" / file)
    index["weight_map"] |= dict.fromkeys(scales, "scales.safetensors")
    (tmp_path / "c" / INDEX).write_text(json.dumps(index))
    assert_same(load(tmp_path / "c"), expected)


def test_unquantised_weights_under_an_fp8_config_load(tmp_path):
    """What the well-known FP8 to BF16 conversion leaves behind: BF16 weights, and a config that still says FP8."""
    save(build(), tmp_path / "c", dtype=torch.bfloat16)
    edit_json(tmp_path / "c" / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert_same(load(tmp_path / "c"), build().bfloat16())


def test_old_rotary_frequencies_are_ignored(folder):
    rewrite(folder, HEAD, lambda t: t)
    path = shard_of(folder, HEAD)
    save_file(load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, path)
    assert_same(load(folder), build())


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_save_holds_one_shard_at_a_time(tmp_path, monkeypatch):
    alive, most = [], []

    def spy(tensors, path, metadata):
        most.append(sum(t.nbytes for t in tensors.values()))
        assert not any(ref() is not None for ref in alive), "the shard before is still in memory"
        alive[:] = [weakref.ref(t) for t in tensors.values()]
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(module, "save_file", spy)
    save(build(), tmp_path / "c", fp8=True, max_shard_bytes=100_000)
    assert len(most) > 10 and max(most) <= 100_000


def test_load_reads_one_tensor_at_a_time(folder, monkeypatch):
    """Peak Python-side tensors: tracked by the number of tensors read and not yet freed."""
    alive, peak = weakref.WeakSet(), []

    class Spy:
        def __init__(self, file):
            self.file = file

        def get_tensor(self, name):
            value = self.file.get_tensor(name)
            alive.add(value)
            peak.append(len(alive))
            return value

        def __getattr__(self, name):
            return getattr(self.file, name)

    real = module.open_shard
    monkeypatch.setattr(module, "open_shard", lambda path: Spy(real(path)))
    load(folder)
    assert len(peak) == len(plan(CFG, fp8=False)) and max(peak) <= 2


# ---- MTP ------------------------------------------------------------------------------------------------------------


def drop_layer(folder, layer):
    for name in [n for n in json.loads((folder / INDEX).read_text())["weight_map"] if f"layers.{layer}." in n]:
        rewrite(folder, name, lambda t: None)


def test_mtp_switch(folder):
    assert load(folder).cfg.num_nextn_predict_layers == load(folder, mtp=True).cfg.num_nextn_predict_layers == 1
    without = load(folder, mtp=False)
    assert without.cfg.num_nextn_predict_layers == 0 and len(without.model.layers) == 3
    assert torch.equal(without.lm_head.weight, build().lm_head.weight)
    with pytest.raises(ValueError, match="mtp: got 'yes', allowed are True, False and 'auto'"):
        load(folder, mtp="yes")


def test_checkpoint_without_mtp_tensors(folder):
    drop_layer(folder, 3)
    with pytest.warns(UserWarning, match="num_nextn_predict_layers=1, but no MTP tensor is stored"):
        assert load(folder).cfg.num_nextn_predict_layers == 0
    with pytest.raises(CheckpointError, match="mtp=True, but num_nextn_predict_layers=1 and 0 MTP tensors"):
        load(folder, mtp=True)
    assert len(load(folder, mtp=False).model.layers) == 3


def test_half_an_mtp_layer_is_an_error(folder):
    rewrite(folder, "model.layers.3.enorm.weight", lambda t: None)
    with pytest.raises(CheckpointError, match=r"missing \(1\): model.layers.3.enorm.weight \(144,\)"):
        load(folder)
    assert len(load(folder, mtp=False).model.layers) == 3


def test_mtp_tensors_that_the_config_does_not_know_are_an_error(folder):
    edit_json(folder / "config.json", num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match="unexpected"):
        load(folder)
    assert len(load(folder, mtp=False).model.layers) == 3


@pytest.mark.parametrize("name", ["embed_tokens", "shared_head.head"])
def test_mtp_copies_must_be_copies_but_may_be_left_out(folder, name):
    name = f"model.layers.3.{name}.weight"
    rewrite(folder, name, lambda t: t + 1)
    with pytest.raises(CheckpointError, match=f"{name} differs from .*mtp=False loads the main model alone"):
        load(folder)
    assert len(load(folder, mtp=False).model.layers) == 3
    rewrite(folder, name, lambda t: None)
    assert_same(load(folder), build())


def test_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
    model = build(CFG.replace(tie_word_embeddings=True))
    save(model, tmp_path / "c")
    assert HEAD not in stored(tmp_path / "c")
    path = shard_of(tmp_path / "c", EMBEDDING)
    tensors = load_file(path)
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, path)
    assert_same(load(tmp_path / "c"), model)
    save_file(tensors | {HEAD: tensors[EMBEDDING] + 1}, path)
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load(tmp_path / "c")


# ---- one error that lists everything --------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_in_one_error(folder):
    rewrite(folder, EXPERT, lambda t: None)
    rewrite(folder, "model.norm.weight", lambda t: None)
    rewrite(folder, HEAD, lambda t: t[:, :5])
    rewrite(folder, BIAS, lambda t: t.long())
    path = shard_of(folder, EMBEDDING)
    save_file(load_file(path) | {"model.stranger": torch.ones(2, 3)}, path)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert f"missing (2): {EXPERT} (64, 144), model.norm.weight (144,)" in message
    assert "unexpected (1): model.stranger (2, 3)" in message
    assert "wrong shape (1): lm_head.weight: found (96, 5), expected (96, 144)" in message
    assert f"wrong dtype (1): {BIAS}: found I64, allowed F64, F32, BF16, F16" in message
    assert str(folder) in message


def test_long_lists_are_cut(folder):
    edit_json(folder / "config.json", num_hidden_layers=2, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    n = sum("layers.2." in e.name or "layers.3." in e.name for e in plan(CFG, fp8=False))
    assert f"unexpected ({n})" in str(caught.value) and f"... and {n - 20} more" in str(caught.value)
    assert len(str(caught.value)) < 3000


def test_missing_scale(tmp_path):
    save(build(), tmp_path / "c", fp8=True)
    rewrite(tmp_path / "c", f"{EXPERT}_scale_inv", lambda t: None)
    with pytest.raises(CheckpointError, match=rf"missing \(1\): {EXPERT}_scale_inv \(1, 2\)"):
        load(tmp_path / "c")


def test_scale_of_wrong_shape(tmp_path):
    save(build(), tmp_path / "c", fp8=True)
    rewrite(tmp_path / "c", f"{EXPERT}_scale_inv", lambda t: t[:, :1])
    with pytest.raises(CheckpointError, match=rf"{EXPERT}_scale_inv: found \(1, 1\), expected \(1, 2\)"):
        load(tmp_path / "c")


def test_fp8_weights_without_a_quantization_config(tmp_path):
    save(build(), tmp_path / "c", fp8=True)
    edit_json(tmp_path / "c" / "config.json", quantization_config=None)
    with pytest.raises(CheckpointError, match="found F8_E4M3, allowed F64, F32, BF16, F16"):
        load(tmp_path / "c")


def test_other_float8_is_refused(tmp_path):
    save(build(), tmp_path / "c", fp8=True)
    rewrite(tmp_path / "c", EXPERT, lambda t: t.float().to(torch.float8_e5m2))
    with pytest.raises(CheckpointError, match="found F8_E5M2, allowed F64, F32, BF16, F16, F8_E4M3"):
        load(tmp_path / "c")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"quant_method": "gptq"}, "quant_method='gptq', allowed is 'fp8'"),
        ({"fmt": "e5m2"}, "fmt='e5m2', allowed is 'e4m3'"),
        ({"weight_block_size": [1, 128]}, r"weight_block_size=\[1, 128\], allowed is \[128, 128\]"),
        ({"weight_block_size": None}, r"weight_block_size=None, allowed is \[128, 128\]"),
    ],
)
def test_unknown_quantisation(tmp_path, change, message):
    save(build(), tmp_path / "c", fp8=True)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    edit_json(tmp_path / "c" / "config.json", quantization_config={**config["quantization_config"], **change})
    with pytest.raises(CheckpointError, match=f"quantization_config.{message}"):
        load(tmp_path / "c")


# ---- damaged folders ------------------------------------------------------------------------------------------------


def test_missing_folder_and_files(folder, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    name = shard_of(folder, HEAD).name
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"names 1 missing file\(s\): {name}"):
        load(folder)
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match="found neither model.safetensors.index.json nor model.safetensors"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\(pytorch_model.bin\) can run code when opened and are never read"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json does not exist"):
        load(folder)


@pytest.mark.parametrize("length", [0, 4, 200, -1])
def test_truncated_shard(folder, length):
    path = shard_of(folder, HEAD)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=f"{path.name}: truncated, or no safetensors file"):
        load(folder)


def test_pickle_under_a_safetensors_name_is_not_opened(folder):
    class Trap:
        def __reduce__(self):
            return (os.abort, ())

    torch.save({"x": Trap()}, shard_of(folder, HEAD))
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load(folder)


def test_huge_header_is_refused(folder):
    path = shard_of(folder, HEAD)
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"weight_map": 3}'])
def test_bad_index(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="no index with a weight_map"):
        load(folder)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "weights.bin", 3])
def test_index_names_only_safetensors_beside_it(folder, file):
    edit_json(folder / INDEX, weight_map={HEAD: file})
    with pytest.raises(CheckpointError, match="not the name of a safetensors file beside it"):
        load(folder)


def test_index_that_names_the_wrong_file(folder):
    index = json.loads((folder / INDEX).read_text())
    assert index["weight_map"][HEAD] != index["weight_map"][EMBEDDING]
    index["weight_map"][HEAD] = index["weight_map"][EMBEDDING]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) that are not in their file: lm_head.weight"):
        load(folder)


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_load_names_a_device_that_is_not_there(folder, device):
    with pytest.raises(ValueError, match=f"device='{device}' cannot be used .*allowed are cpu, cuda"):
        load(folder, device=device)


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16", torch.float8_e4m3fn])
def test_load_names_a_dtype_that_no_model_has(folder, dtype):
    with pytest.raises(ValueError, match=f"dtype: got {dtype!r}, allowed are torch.float64"):
        load(folder, dtype=dtype)


def test_quantization_config_that_is_no_object(tmp_path):
    save(build(), tmp_path / "c", fp8=True)
    edit_json(tmp_path / "c" / "config.json", quantization_config="fp8")
    with pytest.raises(ValueError, match="quantization_config='fp8': allowed is null or an object"):
        load(tmp_path / "c")


# ---- saving over something ------------------------------------------------------------------------------------------


def test_refuses_bad_arguments_before_writing(tmp_path):
    with pytest.raises(ValueError, match="dtype: got torch.int8, allowed are torch.float32"):
        save(build(), tmp_path / "c", dtype=torch.int8)
    with pytest.raises(ValueError, match="max_shard_bytes: got 0"):
        save(build(), tmp_path / "c", max_shard_bytes=0)
    assert list(tmp_path.iterdir()) == []


def test_non_finite_weight_is_named_and_leaves_the_old_checkpoint(folder):
    model = build()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[3, -1, 0] = float("nan")
    with pytest.raises(ValueError, match=f"cannot save {EXPERT} in FP8: .* NaN"):
        save(model, folder, fp8=True)
    assert_same(load(folder), build())
    assert [path.name for path in folder.parent.iterdir()] == ["c"]


def test_never_overwrites_what_is_no_checkpoint(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="thesis exists and holds no checkpoint"):
        save(build(), tmp_path / "thesis")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="file exists"):
        save(build(), tmp_path / "file")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work" and (tmp_path / "file").read_text() == "x"
    (tmp_path / "empty").mkdir()
    save(build(), tmp_path / "empty")
    assert is_checkpoint(tmp_path / "empty") and not is_checkpoint(tmp_path / "thesis")


def test_replaces_a_checkpoint_and_keeps_its_neighbours(folder):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("kept")
    before = {path.name for path in folder.glob("*.safetensors")}
    save(build(seed=1), folder)
    assert_same(load(folder), build(seed=1))
    assert (folder / "tokenizer.json").read_text() == "{}" and (folder / "notes" / "a.txt").read_text() == "kept"
    assert before.isdisjoint(path.name for path in folder.glob("*.safetensors"))
    assert [path.name for path in folder.parent.iterdir()] == ["c"]


def test_saves_through_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    save(build(seed=1), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(load(folder), build(seed=1))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failure_while_writing_leaves_the_old_checkpoint(folder, monkeypatch, error):
    def fail(tensors, path, metadata):
        if "00003" in path.name:
            raise error("disk full")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(error):
        save(build(seed=1), folder, max_shard_bytes=200_000)
    assert_same(load(folder), build())
    assert [path.name for path in folder.parent.iterdir()] == ["c"]


def test_failure_of_the_last_rename_brings_the_old_checkpoint_back(folder, monkeypatch):
    real = Path.rename

    def fail(self, target):
        if self.name.endswith(".partial"):
            raise OSError("no")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        save(build(seed=1), folder)
    assert_same(load(folder), build())
    assert [path.name for path in folder.parent.iterdir()] == ["c"]


def test_killed_between_the_two_renames(folder):
    folder.rename(folder.with_name(".c.previous"))
    (folder.parent / ".c.partial").mkdir()
    assert_same(load(folder), build())
    save(build(seed=1), folder)
    assert [path.name for path in folder.parent.iterdir()] == ["c"]
    assert_same(load(folder), build(seed=1))


def test_killed_after_the_two_renames(folder):
    (folder.parent / ".c.previous").mkdir()
    assert_same(load(folder), build())
    save(build(seed=1), folder)
    assert [path.name for path in folder.parent.iterdir()] == ["c"]


KILLED = """
import sys, torch
import minids.checkpoint as module
from minids import ModelConfig, Transformer
real = module.save_file
def slow(tensors, path, metadata):
    real(tensors, path, metadata=metadata)
    print(path.name, flush=True)
    if "00002" in path.name:
        sys.stdin.read()
module.save_file = slow
torch.manual_seed(1)
module.save(Transformer(ModelConfig.from_json(sys.argv[1] + "/config.json")), sys.argv[1], max_shard_bytes=200_000)
"""


def test_kill_9_while_writing(folder):
    command = [sys.executable, "-c", KILLED, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[1])}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGKILL)
    assert "00002" in lines[1] and process.returncode == -signal.SIGKILL
    assert (folder.parent / ".c.partial").is_dir()
    assert_same(load(folder), build())
    save(build(seed=2), folder)
    assert_same(load(folder), build(seed=2))
    assert [path.name for path in folder.parent.iterdir()] == ["c"]


def test_replace_folder_takes_more_than_a_model(tmp_path):
    """What a trainer does: model and optimizer state appear together or not at all."""
    for step in (1, 2):
        with replace_folder(tmp_path / "run", is_checkpoint, "checkpoint") as partial:
            save(build(seed=step), partial)
            save_file({"step": torch.tensor([step])}, partial / "trainer.safetensors")
        assert_same(load(tmp_path / "run"), build(seed=step))
        assert load_file(tmp_path / "run" / "trainer.safetensors")["step"] == step
    with pytest.raises(RuntimeError), replace_folder(tmp_path / "run", is_checkpoint, "checkpoint") as partial:
        save(build(seed=3), partial)
        raise RuntimeError("the optimizer state cannot be written")
    assert_same(load(tmp_path / "run"), build(seed=2))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
