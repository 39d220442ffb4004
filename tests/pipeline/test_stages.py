"""The cut model: what each stage holds, equal weights, and what is refused."""

import pytest
import torch
from torch import nn

from minids import ModelConfig, Transformer
from minids.model.balancer import Balancer
from minids.pipeline import build_schedule
from minids.pipeline.check import tiny_config
from minids.pipeline.lower import Transfer, lower, needs
from minids.pipeline.runtime import Placement, choose_micro_batches
from minids.pipeline.schedules import NAMES
from minids.pipeline.stages import Elsewhere, Stage, build_rank_model, split_layers
from minids.pipeline.train import check
from minids.train.settings import RecipeConfig, TrainConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize("counts", [(), (1, 3, 2, 2), (0, 4, 4, 0)])
def test_pieces_cover_the_model_once(counts):
    cfg = tiny_config(8)
    pieces = split_layers(cfg, 4, counts)
    assert [i for piece in pieces for i in piece.layers] == list(range(8))
    names = [name for name, _ in Transformer(cfg).named_parameters()]
    holders = {name: [p.stage for p in pieces if p.holds(name, cfg)] for name in names}
    assert holders["model.embed_tokens.weight"] == [0, 3]
    assert holders["lm_head.weight"] == holders["model.norm.weight"] == [3]
    assert holders["model.layers.8.eh_proj.weight"] == [3]  # MTP: with the last stage
    assert all(len(stages) == 1 for name, stages in holders.items() if name != "model.embed_tokens.weight")


def test_without_mtp_the_embedding_is_held_once():
    cfg = tiny_config(4, num_nextn_predict_layers=0)
    assert [p.has_embedding(cfg) for p in split_layers(cfg, 4)] == [True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_parts_have_the_weights_of_the_whole(dtype, tied):
    """Built rank by rank without storage, drawn from one seed: bit for bit the model of one process, and so is the
    generator afterwards."""
    cfg = tiny_config(4, tie_word_embeddings=tied)
    torch.manual_seed(3)
    torch.set_default_dtype(dtype)
    try:
        whole = Transformer(cfg).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    after, found = torch.get_rng_state(), {}
    for piece in split_layers(cfg, 4):
        torch.manual_seed(3)
        part = build_rank_model(cfg, [piece], CPU, dtype)
        assert torch.equal(torch.get_rng_state(), after)
        for name, value in part.state_dict().items():
            assert value.dtype == whole[name].dtype and torch.equal(value, whole[name]), name
            found[name] = value
    assert found.keys() == whole.keys()


@pytest.mark.parametrize("recompute, mtp, splits", [(False, 1, [True] * 4), (False, 2, [True, True, True, False]),
                                                    (True, 1, [False] * 4)])  # fmt: skip
def test_backward_is_not_split_where_a_weight_would_run_the_block_again(recompute, mtp, splits):
    """Or where one use of the embedding lies behind another, in the last stage."""
    cfg, config = tiny_config(4, num_nextn_predict_layers=mtp), TrainConfig(pipeline="zb1p", recompute=recompute)
    pieces = split_layers(cfg, 4)
    model = build_rank_model(cfg, pieces, CPU, torch.float32)
    assert [Stage(model, piece, config, Balancer.install(model)).splits for piece in pieces] == splits


def test_one_rank_holds_both_ends_of_a_v_with_one_embedding():
    cfg = tiny_config(8)
    placement = Placement.plan(TrainConfig(pipeline="zbv"), cfg, 4)
    model = build_rank_model(cfg, placement.pieces_of(0), CPU, torch.float32)
    assert placement.holders("model.embed_tokens.weight") == (0,)
    assert sum(not isinstance(layer, Elsewhere) for layer in model.model.layers) == 3  # two main layers and MTP
    assert isinstance(model.model.embed_tokens, nn.Embedding)


def test_dualpipe_keeps_every_parameter_twice():
    cfg = tiny_config(4)
    placement = Placement.plan(TrainConfig(pipeline="dualpipe"), cfg, 4)
    held = {placement.holders(name) for name, _ in Transformer(cfg).named_parameters()}
    assert held == {(0, 3), (1, 2)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_transfers_cannot_wait_in_a_circle(name, ranks):
    """Executed with the strictest transport, where a send waits for its receive and everything is in order, every list
    comes to its end, and every action finds what it needs."""
    schedule = build_schedule(name, ranks=ranks, micro_batches=2 * ranks + (0 if name == "interleaved_1f1b" else 2))
    lists = [list(items) for items in lower(schedule)]
    assert [[i for i in items if not isinstance(i, Transfer)] for items in lists] == list(map(list, schedule.actions))
    here = [set() for _ in range(ranks)]
    partner = {"send F": ("receive F", 1), "send B": ("receive B", -1)}
    while any(lists):
        before = sum(map(len, lists))
        for rank, items in enumerate(lists):
            while items and not isinstance(items[0], Transfer):
                action = items.pop(0)
                assert all(result in here[rank] for result in needs(action, schedule.stages))
                for part in action.parts():
                    here[rank].add(("F" if part.kind == "F" else "B", part.direction, part.stage, part.micro_batch))
            if items and items[0].kind in partner:
                send, (kind, step) = items[0], partner[items[0].kind]
                other = schedule.rank_of[send.direction, send.stage + step]
                wanted = Transfer(kind, send.stage + step, send.micro_batch, send.direction)
                result = (kind[-1], send.direction, send.stage, send.micro_batch)
                assert result in here[rank]
                if lists[other] and lists[other][0] == wanted:
                    items.pop(0), lists[other].pop(0)
                    here[other].add(result)
        assert sum(map(len, lists)) < before, "all ranks wait"


REFUSED = [
    ({"pipeline": "dualpipe"}, {"num_hidden_layers": 6}, 4,
     "num_hidden_layers=6 does not divide into 4 stages.*multiple of 4"),
    ({"pipeline": "zbv"}, {"num_hidden_layers": 4}, 4, "does not divide into 8 stages"),
    ({"pipeline": "1f1b", "pipeline_layers": (1, 1, 1)}, {}, 4, "allowed are 4 numbers that sum to num_hidden_layers=4"),
    ({"pipeline": "1f1b", "pipeline_layers": (2, 0, 1, 1)}, {}, 4, "at least 1 each"),
    ({"pipeline": "1f1b"}, {}, 3, "WORLD_SIZE=3.*even number of at least 2"),
    ({"pipeline": "1f1b"}, {}, 1, "WORLD_SIZE=1"),
    ({"pipeline": "1f1b", "balance": ("noisy",)}, {}, 4, "noisy has weights of its own"),
    ({"pipeline": "dualpipe", "pipeline_chunks": 2}, {}, 4, "chunks is for interleaved_1f1b alone"),
    ({"pipeline": "dualpipe", "recipe": RecipeConfig(batch=4, batch_start=4)}, {}, 4,
     "global batch of 4 sequences.*multiple of 8"),
    ({"pipeline": "dualpipe", "recipe": RecipeConfig(batch=16)}, {}, 4, "global batch of 3 sequences"),
]  # fmt: skip


@pytest.mark.parametrize("changes, model, ranks, message", REFUSED)
def test_what_cannot_work_is_refused_before_anything_starts(tmp_path, changes, model, ranks, message):
    fields = tuple(f"{key}={value}" for key, value in model.items())
    config = TrainConfig(model=fields, out=tmp_path / "run", **{"recipe": RecipeConfig(batch_start=8)} | changes)
    with pytest.raises(ValueError, match=message):
        check(config, ranks)
    assert not (tmp_path / "run").exists()


def test_a_resume_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        check(TrainConfig(pipeline="dualpipe", out=tmp_path, recipe=RecipeConfig(batch_start=8), resume=True), 4)


def test_what_can_work_is_not_refused(tmp_path):
    check(TrainConfig(pipeline="dualpipe", out=tmp_path / "run", recipe=RecipeConfig(batch_start=8)), 4)


@pytest.mark.parametrize("changes", [{"pipeline": "pipedream"}, {"pipeline_chunks": 2}, {"pipeline_layers": (1, 3)}])
def test_settings_refuse_what_no_pipeline_knows(changes):
    with pytest.raises(ValueError, match="pipeline"):
        TrainConfig(**changes)


def test_outside_torchrun_the_command_says_how_to_start(monkeypatch):
    from minids.train.trainer import train

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        train(TrainConfig(pipeline="dualpipe"))


@pytest.mark.parametrize("rows, micro_batch, wanted", [(8, 16, 8), (16, 16, 8), (64, 4, 16), (64, 2, 32), (10, 16, 10)])
def test_a_batch_is_cut_into_as_few_micro_batches_as_allowed(rows, micro_batch, wanted):
    assert choose_micro_batches(TrainConfig(pipeline="dualpipe", micro_batch=micro_batch), 4, rows) == wanted


def test_v3_on_sixteen_ranks():
    """61 layers do not divide by 16; four a rank but for the last, which also has the head and MTP, is a split."""
    cfg = ModelConfig.preset("v3")
    with pytest.raises(ValueError, match="num_hidden_layers=61 does not divide into 16 stages"):
        split_layers(cfg, 16)
    pieces = split_layers(cfg, 16, [4] * 15 + [1])
    assert pieces[-1].layer_indices(cfg) == [60, 61]
