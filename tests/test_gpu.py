"""The same model on CUDA: values and gradients of the CPU, decoding, and a training run. Needs a CUDA device."""

import pytest
import torch

from minids import ModelConfig, Transformer
from minids.checkpoint import load, save
from minids.infer import generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CFG = ModelConfig.preset("toy", vocab_size=512, initializer_range=0.05)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(CFG)


def step(model, rows, ids):
    model.zero_grad()
    out = model(rows[:, :-1], labels=rows[:, 1:], document_ids=ids)
    (out.loss + 0.3 * out.mtp_loss).backward()
    return out, {name: p.grad.float().cpu().clone() for name, p in model.named_parameters()}


def test_fp32_step_equals_the_cpu(model):
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = torch.randint(0, 512, (4, 65))
    ids = (torch.arange(65) // 20).expand(4, 65)
    cpu, cpu_grads = step(model, rows, ids)
    gpu, gpu_grads = step(model.cuda(), rows.cuda(), ids.cuda())
    assert torch.equal(cpu.loads(), gpu.loads().cpu())
    torch.testing.assert_close(gpu.loss.cpu(), cpu.loss, atol=1e-5, rtol=1e-5)
    errors = {name: ((gpu_grads[name] - grad).norm() / grad.norm()).item() for name, grad in cpu_grads.items()}
    assert max(errors.values()) < 1e-4, sorted(errors.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_step_is_near_float32(model, autocast):
    rows = torch.randint(0, 512, (4, 129))
    full, _ = step(model, rows, None)
    gpu = model.cuda() if autocast else model.cuda().to(torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        out, grads = step(gpu, rows.cuda(), None)
    assert abs(out.loss.item() - full.loss.item()) < 0.02
    assert all(grad.isfinite().all() for grad in grads.values())


def test_greedy_tokens_equal_the_cpu(model):
    prompts = [[1, 2, 3], [4] * 9, [7, 8]]
    model.eval()
    assert generate(model.cuda(), prompts, max_new_tokens=12) == generate(model.cpu(), prompts, max_new_tokens=12)


def test_checkpoint_onto_the_device(model, tmp_path):
    save(model, tmp_path / "x")
    loaded = load(tmp_path / "x", device="cuda")
    tokens = torch.randint(0, 512, (1, 9))
    torch.testing.assert_close(loaded(tokens.cuda()).logits.cpu(), model(tokens).logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("precision", ["bf16-autocast", "bf16", "fp16", "fp32"])
def test_training_on_the_device(tmp_path, precision):
    from minids.data import DataConfig
    from minids.train.settings import RecipeConfig, TrainConfig
    from minids.train.trainer import train

    corpus = tmp_path / "text"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"{i}.txt").write_text(f"number {i}: " + "the quick brown fox jumps over the lazy dog. " * 30)
    summary = train(TrainConfig(
        out=tmp_path / "run", device="cuda", precision=precision, sample_tokens=0, eval_every=0,
        data=DataConfig(corpus="folder", path=corpus, vocab_size=512, cache_dir=tmp_path / "cache"),
        recipe=RecipeConfig(tokens=60_000, sequence_length=64, batch=16, warmup_steps=5)))
    assert summary["loss"] < 2.0 and summary["skipped"] <= (5 if precision == "fp16" else 0)
