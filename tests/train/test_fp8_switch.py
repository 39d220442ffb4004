"""The trainer's --fp8: what it changes, and what it refuses."""

import pytest

from minids.fp8.feedforward import Fp8Experts
from minids.fp8.linear import Fp8Linear
from minids.train.metrics import read_metrics
from minids.train.trainer import Trainer, train


def test_the_default_is_no_fp8_and_a_recipe_reaches_every_layer(tiny, tmp_path):
    plain = Trainer.start(tiny(out=tmp_path / "plain"))
    assert not any(isinstance(m, Fp8Linear) for m in plain.model.modules())
    fp8 = Trainer.start(tiny(out=tmp_path / "fp8", fp8="v3_ue8m0"))
    assert all(isinstance(e, Fp8Experts) and e.recipe.name == "v3_ue8m0" for e in fp8.model.experts())
    assert [n for n, _ in fp8.model.named_parameters()] == [n for n, _ in plain.model.named_parameters()]
    assert len(fp8.model.experts()) == 2  # the MTP module's too
    for trainer in (plain, fp8):
        trainer.log.close()


def test_a_run_in_fp8_trains_evaluates_and_writes_a_sample(tiny, tmp_path):
    runs = {name: train(tiny(out=tmp_path / name, fp8=name)) for name in ("none", "v3")}
    losses = {name: [record["loss"] for record in read_metrics(tmp_path / name)] for name in runs}
    assert losses["v3"] != losses["none"]
    assert all(abs(a / b - 1) < 0.02 for a, b in zip(losses["v3"], losses["none"], strict=True))
    assert runs["v3"]["skipped"] == 0 and runs["v3"]["sample"] and runs["v3"]["valid_loss"] < losses["v3"][0]


@pytest.mark.parametrize("changes, message", [
    ({"fp8": "v4"}, "fp8 = 'v4': must be none or one of v3, v3_ue8m0, tensor, no_promotion, mx"),
    ({"fp8": "v3", "precision": "bf16"}, "precision = 'bf16' with fp8 = 'v3': must be auto, fp32 or bf16-autocast"),
    ({"fp8": "mx", "precision": "fp16"}, "precision = 'fp16' with fp8 = 'mx'"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(tiny, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_resume_in_another_precision(tiny):
    trainer = Trainer.start(tiny(fp8="v3"))
    trainer.step()
    trainer.save()
    trainer.log.close()
    with pytest.raises(ValueError, match="fp8"):
        Trainer.start(tiny(fp8="none", resume=True))
