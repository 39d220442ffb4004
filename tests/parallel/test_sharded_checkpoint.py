"""A published checkpoint read by ranks: their slices of the whole, and no other expert's bytes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from minids import ModelConfig, checkpoint
from minids.model.transformer import Transformer
from minids.parallel import checkpoint as sharded
from minids.parallel.experts import is_expert
from minids.parallel.mesh import Layout, Mesh, run_on_threads
from minids.parallel.step import ExpertParallel
from minids.pipeline.check import tiny_config
from minids.published import entries_of
from minids.shards import CheckpointError, read_headers
from minids.train.optim import OptimConfig
from minids.train.settings import TrainConfig

CFG = tiny_config(3, hidden_size=128, moe_intermediate_size=160, tie_word_embeddings=False)
FOUR = Layout(4, 4, gpus_per_node=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small shards, so that experts of several ranks share some and scales may lie apart."""
    torch.manual_seed(0)
    model = Transformer(CFG)
    for gate in model.routers():
        gate.e_score_correction_bias.normal_()
    out = tmp_path_factory.mktemp("checkpoint")
    for name, fp8 in (("plain", False), ("fp8", True)):
        checkpoint.save(model, out / name, fp8=fp8, max_shard_bytes=300_000)
    return out


@pytest.mark.parametrize("name, dtype", [("plain", None), ("fp8", None), ("fp8", torch.float32), ("plain", torch.bfloat16)])
def test_each_rank_reads_its_slice_of_the_whole(folder, name, dtype):
    whole = checkpoint.load(folder / name, dtype=dtype)
    ranks = run_on_threads(FOUR, lambda mesh: (mesh.experts(8), sharded.load(folder / name, mesh, dtype=dtype)))
    for held, model in ranks:
        state, wanted = model.state_dict(), whole.state_dict()
        assert state.keys() == wanted.keys() and len(held) == 2
        for key, want in wanted.items():
            want = want[held.start : held.stop] if is_expert(key) else want
            assert state[key].dtype == want.dtype and torch.equal(state[key], want), key


def test_a_rank_reads_no_more_than_its_share(folder):
    stored, whole = read_headers(folder / "plain"), checkpoint.load(folder / "plain")
    entries = entries_of(whole, False, torch.float32)
    experts = sum(e.bytes for e in entries if is_expert(e.source))
    others = sum(e.bytes for e in entries if not is_expert(e.source) and not e.is_copy)

    def work(mesh):
        model = sharded.load(folder / "plain", mesh)
        return sharded.fill(model, folder / "plain", sharded.own_entries(entries, mesh.experts(8)), stored)

    assert run_on_threads(FOUR, work) == [experts // 4 + others] * 4


def test_a_gathered_model_is_saved_as_published_and_read_back(folder, tmp_path):
    config = TrainConfig(device="cpu", precision="fp32", optim=OptimConfig())

    def work(mesh):
        model = sharded.load(folder / "plain", mesh)
        return ExpertParallel(model.cfg, config, mesh, model=model).gather_model()

    first, *others = run_on_threads(Layout(4, 2), work)
    assert others == [None] * 3
    checkpoint.save(first, tmp_path / "again")
    old, new = ({k: v for f in sorted((root).glob("*.safetensors")) for k, v in load_file(f).items()}
                for root in (folder / "plain", tmp_path / "again"))  # fmt: skip
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("layout", [FOUR, Layout(4, 2), Layout(1)], ids=["EP 4", "2 replicas", "alone"])
@pytest.mark.parametrize("fp8", [False, True])
def test_ranks_write_together_what_one_process_writes(folder, tmp_path, layout, fp8):
    whole, out = checkpoint.load(folder / "plain"), tmp_path / "out"
    checkpoint.save(whole, tmp_path / "one", fp8=fp8, max_shard_bytes=300_000)
    sharded_models = run_on_threads(layout, lambda mesh: sharded.load(folder / "plain", mesh))
    for _ in range(2):  # the second time over the first
        run_on_threads(layout, lambda mesh: sharded.save(sharded_models[mesh.rank], mesh, out, fp8, 300_000))
    one, many = ({k: v for f in sorted(root.glob("*.safetensors")) for k, v in load_file(f).items()}
                 for root in (tmp_path / "one", out))  # fmt: skip
    assert one.keys() == many.keys()
    for name, tensor in one.items():
        assert tensor.dtype == many[name].dtype and torch.equal(tensor.view(torch.uint8), many[name].view(torch.uint8))
    assert (out / "config.json").read_text() == (tmp_path / "one" / "config.json").read_text()
    indices = [json.loads((root / "model.safetensors.index.json").read_text()) for root in (tmp_path / "one", out)]
    assert indices[0]["metadata"] == indices[1]["metadata"]
    assert sorted(p.name for p in out.glob("*.safetensors")) == sorted(set(indices[1]["weight_map"].values()))
    assert not list(tmp_path.glob(".*")), "nothing is left under a temporary name"
    state = checkpoint.load(out).state_dict()
    assert fp8 or all(torch.equal(state[key], value) for key, value in whole.state_dict().items())


def test_a_rank_writes_its_own_experts_only():
    files = sharded.plan_files(CFG, 4, False, 300_000, torch.float32)
    for rank, part in enumerate(files):
        experts = {entry.part[0] for entries in part.values() for entry in entries if is_expert(entry.source)}
        assert experts == {2 * rank, 2 * rank + 1}
        assert (rank == 0) == any(not is_expert(entry.source) for entries in part.values() for entry in entries)


def test_v3_over_64_ranks():
    """91,991 tensors, each written once, and 30 of 689 GB read by a rank."""
    cfg = ModelConfig.preset("v3")
    files = sharded.plan_files(cfg, 64, True, 5 * 2**30, torch.bfloat16)
    entries = [entry for part in files for some in part.values() for entry in some]
    assert len(entries) == len({entry.name for entry in entries}) == 91_991
    assert sum(entry.bytes for entry in entries) == pytest.approx(688.6e9, rel=1e-4)
    own = [e for e in sharded.own_entries(entries, Layout.v3().experts(5, 256)) if not e.is_copy]
    assert sum(entry.bytes for entry in own) == pytest.approx(29.9e9, rel=1e-3)
    assert {e.part[0] for e in own if is_expert(e.source)} == {0, 1, 2, 3}  # places in the rank's short stacks
    assert {e.name.split(".experts.")[1].split(".")[0] for e in own if is_expert(e.source)} == {"20", "21", "22", "23"}


def test_nothing_of_somebody_else_is_overwritten(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model = sharded.load(folder / "plain", Mesh.alone())
    with pytest.raises(FileExistsError, match="holds no checkpoint"):
        sharded.save(model, Mesh.alone(), tmp_path)
    with pytest.raises(ValueError, match="dtype=torch.float64"):
        sharded.save(model, Mesh.alone(), tmp_path / "new", dtype=torch.float64)


def test_an_expert_of_another_rank_that_is_missing_is_missed_by_all(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder / "plain", broken)
    index = broken / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    lost = "model.layers.2.mlp.experts.7.up_proj.weight"
    file = broken / values["weight_map"].pop(lost)
    tensors = load_file(file)
    del tensors[lost]
    from safetensors.torch import save_file

    save_file(tensors, file)
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"missing \(1\): model.layers.2.mlp.experts.7.up_proj.weight"):
        run_on_threads(FOUR, lambda mesh: sharded.load(broken, mesh))
