"""Balance of a placement by loops, the bound, and loads measured from a trained model over text."""

import numpy as np
import pytest
import torch

from minids import ModelConfig, Transformer, plots
from minids.parallel.eplb import rebalance_experts
from minids.parallel.loads import balance_of, balance_table, balance_without_replicas, measure_loads


def skewed(layers=2, experts=16, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).lognormal(0, 1.5, (layers, experts)))


def test_balance_equals_loops():
    load = skewed()
    slot_to_expert, _, replicas = rebalance_experts(load, 24, 4, 2, 8)
    found = balance_of(load, slot_to_expert, 8)
    for layer in range(2):
        gpus = [0.0] * 8
        for slot, expert in enumerate(slot_to_expert[layer].tolist()):
            gpus[slot // 3] += float(load[layer, expert] / replicas[layer, expert])
        mean, heaviest = sum(gpus) / 8, float((load[layer] / replicas[layer]).max())
        assert found.gpu_loads[layer].tolist() == pytest.approx(gpus, rel=1e-12)
        assert float(found.imbalance[layer]) == pytest.approx(max(gpus) / mean, rel=1e-12)
        assert float(found.bound[layer]) == pytest.approx(max(mean, heaviest), rel=1e-12)
        assert float(found.reached[layer]) == pytest.approx(max(mean, heaviest) / max(gpus), rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_beats_the_bound_and_replicas_help(seed):
    load = skewed(seed=seed)
    before = balance_without_replicas(load, 8)
    after = balance_of(load, rebalance_experts(load, 24, 1, 1, 8)[0], 8)
    for one in (before, after):
        assert (one.reached <= 1 + 1e-12).all() and (one.imbalance >= 1 - 1e-12).all()
        assert one.gpu_loads.sum(1).tolist() == pytest.approx(load.sum(1).tolist(), rel=1e-12)
    assert (after.imbalance < before.imbalance).all()
    assert (after.reached > 0.9).all()


def test_before_by_hand_with_gpus_that_do_not_divide_experts():
    found = balance_without_replicas(torch.tensor([[1, 2, 3, 4, 5, 6]]), 4)
    assert found.gpu_loads.tolist() == [[3, 3, 9, 6]]  # experts 0 1 | 2 | 3 4 | 5
    assert found.bound.tolist() == [6] and found.reached.tolist() == [6 / 9]


def test_a_layer_without_load_is_balanced():
    found = balance_without_replicas(torch.zeros(1, 4), 2)
    assert found.imbalance.tolist() == [1] and found.reached.tolist() == [1]


def test_table_has_the_figures_of_each_layer():
    load = torch.tensor([[4, 1, 2, 1]])
    after = balance_of(load, rebalance_experts(load, 6, 1, 1, 2)[0], 2)
    lines = balance_table(balance_without_replicas(load, 2), after).splitlines()
    assert lines[1].split() == ["0", "1.25", "1.00", "80.0%", "1.00", "1.00", "100.0%"]


@pytest.mark.parametrize("slots, n_gpus, message", [
    ([[0, 1, 2]], 2, "slot_to_expert has shape"),
    ([[0, 1, 2, 3], [0, 1, 2, 3]], 2, "slot_to_expert has shape"),
    ([[0, 1, 2, 4]], 2, "slot_to_expert holds 0 to 4: allowed are experts 0 to 3"),
    ([[0, 1, 2, 2]], 2, r"slot_to_expert\[0\] lacks expert 3"),
    ([[0, 1, 2, 3]], 0, "n_gpus=0"),
])  # fmt: skip
def test_bad_placement_is_named(slots, n_gpus, message):
    with pytest.raises(ValueError, match=message):
        balance_of(torch.ones(1, 4), torch.tensor(slots), n_gpus)


@pytest.fixture(scope="module")
def trained():
    """A toy trained for a moment on bytes of its own test file, without balancing: its experts have uneven loads."""
    torch.manual_seed(0)
    cfg = ModelConfig.preset("toy", vocab_size=256, hidden_size=64, num_hidden_layers=2, topk_group=4)
    model = Transformer(cfg)
    with open(__file__, "rb") as file:
        text = torch.tensor(list(file.read()))
    rows = text[: len(text) // 65 * 65].view(-1, 65)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(30):
        batch = rows[torch.arange(8) + 8 * step % (len(rows) - 8)]
        loss = model(batch[:, :-1], labels=batch[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 3.5
    return model, [rows[i : i + 8, :-1] for i in range(0, 40, 8)]


def test_loads_measured_from_a_trained_model(trained):
    model, batches = trained
    model.train()
    loads = measure_loads(model, iter(batches))
    assert model.training, "measuring leaves the model's mode alone"
    tokens, cfg = sum(batch.numel() for batch in batches), model.cfg
    assert loads.shape == (len(model.routers()), cfg.n_routed_experts) and loads.dtype == torch.int64
    assert loads.sum(1)[0] == tokens * cfg.num_experts_per_tok  # no token is dropped
    one_by_one = sum(measure_loads(model, [row[None]]) for batch in batches for row in batch)
    assert (loads - one_by_one).abs().sum() <= 0.001 * loads.sum()  # a tie may break otherwise in another batch
    with pytest.raises(ValueError, match="batches is empty"):
        measure_loads(model, [])


def test_trained_model_to_balanced_gpus(trained):
    """The whole way: text -> loads -> placement -> balance, with replicas placed on loads of earlier text."""
    model, batches = trained
    earlier, later = measure_loads(model, batches[:3]), measure_loads(model, batches[3:])
    before = balance_without_replicas(earlier, 8)
    placement = rebalance_experts(earlier, 24, 4, 1, 8)[0]
    assert (balance_of(earlier, placement, 8).imbalance < before.imbalance).all()
    assert (balance_of(earlier, placement, 8).reached > 0.9).all()
    assert balance_of(later, placement, 8).imbalance.mean() < balance_without_replicas(later, 8).imbalance.mean()


def test_figures_show_their_data():
    fig = plots.gpu_load_bars([4, 2], [3, 3], 3.0)
    assert [[bar.get_height() for bar in ax.patches] for ax in fig.axes] == [[4, 2], [3, 3]]
    assert "1.33" in fig.axes[0].get_title() and "1.00" in fig.axes[1].get_title()
    fig = plots.nodes_reached_bars({"limited": [0, 0.5, 0.5], "free": [0, 0.25, 0.75]})
    assert [bar.get_height() for bar in fig.axes[0].patches] == [50, 50, 25, 75]
    assert [text.get_text() for text in fig.axes[0].get_legend().get_texts()] == [
        "limited: 1.50 on average", "free: 1.75 on average"]  # fmt: skip
