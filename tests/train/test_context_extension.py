"""The toy of notebook 02: its text means what it says, its needles are the only ones, its readings are the model's."""

import math

import numpy as np
import pytest
import torch

from minids import Transformer
from minids.model.rope import rope_frequencies
from minids.train import context_extension as toy


def reread(tokens: list[int]) -> list[tuple[int, int]]:
    """What a row should score, token by token, read in the plain way: (kind, distance)."""
    latest, found = {}, []
    for i, token in enumerate(tokens):
        kind, distance = 0, 0
        if token < toy.WORDS:
            phrase = tokens[i - i % 4 : i - i % 4 + 4]
            if i % 4 >= 2:
                kind = toy.RHYTHM
                assert token == (5 * phrase[i % 4 - 2] + 3) % toy.WORDS
        elif token < toy.ASK:
            key, value = divmod(token - toy.NOTE, toy.VALUES)
            latest[key] = (value, i)
        elif token >= toy.ANSWER:
            value, where = latest[tokens[i - 1] - toy.ASK]
            assert token - toy.ANSWER == value
            kind, distance = toy.LEDGER, i - 1 - where
        found.append((kind, distance))
    return found


@pytest.mark.parametrize("length", [4, 64, 256])
def test_text_follows_its_own_rules(length):
    rows = toy.make_rows(8, length, seed=3)
    assert rows.tokens.shape == (8, length) and rows.tokens.max() < toy.VOCABULARY
    for tokens, kinds, distances in zip(rows.tokens, rows.scored, rows.distance, strict=True):
        assert reread(tokens.tolist()) == list(zip(kinds.tolist(), distances.tolist(), strict=True))
    labels = rows.labels()
    assert torch.equal(labels != toy.IGNORE, rows.scored[:, 1:] > 0)
    assert torch.equal(labels[labels >= 0], rows.tokens[:, 1:][rows.scored[:, 1:] > 0])


def test_the_rhythm_is_a_permutation_and_far_notes_occur():
    assert sorted(toy.follow(np.arange(toy.WORDS))) == list(range(toy.WORDS))
    distances = toy.make_rows(64, 512, seed=0).distance
    assert distances[distances > 0].min() <= 2 and distances.max() > 256


def test_rows_depend_on_the_seed_only():
    again = [toy.make_rows(4, 64, seed).tokens for seed in (5, 5, 6)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_needle_is_the_only_note_of_its_key(depth):
    tokens, answers = toy.make_needles(64, 128, depth, seed=1)
    for row, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
        key = row[-1] - toy.ASK
        assert 0 <= key < toy.KEYS and row.count(row[-1]) == 1
        notes = [i for i, t in enumerate(row) if toy.NOTE <= t < toy.ASK and (t - toy.NOTE) // toy.VALUES == key]
        assert notes == [round(depth * 126)]
        assert (row[notes[0]] - toy.NOTE) % toy.VALUES == answer - toy.ANSWER


def test_impossible_texts_are_refused():
    with pytest.raises(ValueError, match="length=63"):
        toy.make_rows(1, 63, seed=0)
    with pytest.raises(ValueError, match="depth=1.5"):
        toy.make_needles(1, 64, 1.5, seed=0)


def test_tokens_are_spelt():
    assert [toy.spell(t) for t in (0, toy.NOTE, toy.NOTE + 13, toy.ASK + 2, toy.ANSWER + 5)] == [
        "a", "A=0", "B=5", "C?", "5"]  # fmt: skip


def test_readings_are_the_transformer_under_its_config():
    torch.manual_seed(0)
    model = Transformer(toy.toy_config(initializer_range=0.3))
    tokens = toy.make_rows(2, 512, seed=2).tokens
    readings = toy.extensions(model)
    with torch.no_grad():
        for name, scaling in (("plain RoPE", None), ("YaRN", toy.YARN)):
            whole = Transformer(toy.toy_config(rope_scaling=scaling))
            whole.load_state_dict(model.state_dict())
            torch.testing.assert_close(readings[name](tokens), whole(tokens).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(8 * readings["interpolation"].frequencies, rope_frequencies(model.cfg))
        assert not torch.allclose(readings["interpolation"](tokens), readings["YaRN"](tokens), atol=1e-2)


def test_training_lowers_the_loss_and_tuning_leaves_its_reading_alone():
    torch.manual_seed(0)
    model = Transformer(toy.toy_config())
    losses = toy.fit(model, toy.make_rows(40 * 16, 64, seed=0), 16, 5e-3)
    assert len(losses) == 40 and losses[0] == pytest.approx(math.log(toy.VOCABULARY), abs=0.2)
    assert np.mean(losses[-5:]) < losses[0] - 1.5
    reading = toy.extensions(model)["YaRN"]
    before = {name: tensor.clone() for name, tensor in reading.state_dict().items()}
    tuned = toy.tune(reading, seed=0, steps=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in reading.state_dict().items())
    assert any(not torch.equal(before[name], tensor) for name, tensor in tuned.state_dict().items())


def test_means_by_position_and_distance():
    rows = toy.make_rows(16, 64, seed=4)
    losses = rows.distance.float()  # a loss equal to the distance makes the bins checkable
    near, far = toy.by_distance(losses, rows, (1, 8, 64))
    assert 1 <= near < 8 <= far < 64
    position = torch.arange(64.0).expand(16, 64)
    means = toy.by_position(position, rows, toy.RHYTHM, bins=4)
    assert all(16 * i < mean < 16 * (i + 1) for i, mean in enumerate(means))


def test_mistakes_are_told_apart():
    note, ask, answer = toy.NOTE, toy.ASK, toy.ANSWER
    tokens = torch.tensor([[note + 3, note + 1, ask, answer + 1],  # A=3 A=1 A? 1
                           [note + 8 + 6, note + 3, ask, answer + 3]])  # B=6 A=3 A? 3  # fmt: skip
    scored = torch.tensor([[0, 0, 0, toy.LEDGER]] * 2)
    rows = toy.Rows(tokens, scored, torch.zeros_like(scored))

    def says(*values):
        logits = torch.zeros(2, 3, toy.VOCABULARY)
        logits[[0, 1], 2, [answer + v for v in values]] = 1.0
        return lambda _: logits

    assert toy.older_values(says(3, 3), rows) == (1.0, pytest.approx(1 / 7))  # A=3 is older
    assert toy.older_values(says(6, 3), rows) == (0.0, pytest.approx(1 / 7))  # no note of A says 6
    assert toy.older_values(says(3, 6), rows) == (0.5, pytest.approx(1 / 14))  # B=6 is no older value of A
    for nothing in (toy.older_values(says(1, 3), rows), toy.older_values(says(3, 6), rows, start=4)):
        assert all(math.isnan(x) for x in nothing)
