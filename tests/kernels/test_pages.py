"""Decoding over both caches through `kernels.mla_decode`: an MLA layer against itself in float32, and whole texts."""

import pytest
import torch
from numbers_ import error

from minids.config import ModelConfig
from minids.infer import generate
from minids.infer.engine import Engine, Request
from minids.infer.paged import PagedCache
from minids.model import attention_pages
from minids.model.attention import MLA
from minids.model.cache import LatentCache
from minids.model.transformer import Transformer

# Without experts: a token whose router chooses another one by rounding differs by a whole standard deviation of the logits
# (1.2 in the median where BF16 flips a choice, 0.06 where it does not), which would hide what attention rounds.
CFG = ModelConfig.preset("toy").replace(
    num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0, kv_lora_rank=32, qk_rope_head_dim=16,
    num_attention_heads=4, initializer_range=0.2,
)  # fmt: skip
LENGTHS = [70, 1, 128]  # tokens before


@pytest.fixture
def seen(monkeypatch):
    """How often the kernel's way was taken."""
    calls, real = [], attention_pages.attend
    monkeypatch.setattr(attention_pages, "attend", lambda *args: (calls.append(1), real(*args))[1])
    return calls


def filled(kind, cfg, latent, device, dtype):
    """A cache of three rows that hold LENGTHS tokens of ``latent`` (layers, rows, slots, C + R)."""
    if kind == "rows":
        cache = LatentCache(cfg, 3, 200, device, dtype)
        cache.data[:, :, : latent.shape[2]] = latent.to(device, dtype)
    else:
        pool = PagedCache(cfg, 3, 12, 64, device, dtype)
        for row, pages in enumerate((2, 3, 3)):
            assert pool.take(row, pages * 64)
            for j in range(LENGTHS[row]):
                pool.data[:, pool.owned[row][j // 64], j % 64] = latent[:, row, j].to(device, dtype)
        cache = pool.view([0, 1, 2])
    cache.set_lengths(LENGTHS)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rows", "pages"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_one_layer(kernel, seen, monkeypatch, kind, tokens):
    torch.manual_seed(0)
    mla = MLA(CFG).eval()
    for p in mla.parameters():
        p.normal_(std=0.1) if p.ndim == 2 else p.uniform_(0.5, 1.5)
        p.copy_(p.bfloat16())
    x, latent = torch.randn(3, tokens, CFG.hidden_size).bfloat16(), torch.randn(2, 3, 200, CFG.latent_dim).bfloat16()

    def run(device, dtype, kernels):
        monkeypatch.setenv("MINIDS_KERNELS", kernels)
        cache = filled(kind, CFG, latent, device, dtype)
        positions, rope, mask = cache.place(tokens)
        out = mla.to(device, dtype)(x.to(device, dtype), rope, mask, cache, 1, positions, absorb=True)
        stored = cache.data[1] if kind == "rows" else cache.pool.data[1]
        return out.float().cpu(), stored.float().cpu()

    exact, exact_cache = run("cpu", torch.float32, "torch")
    plain, _ = run(kernel, torch.bfloat16, "torch")
    assert not seen
    out, stored = run(kernel, torch.bfloat16, "triton")
    assert len(seen) == 1
    assert error(out, exact.double()) < max(1.2 * error(plain, exact.double()), 6e-3)
    rows = (slice(None), slice(exact_cache.shape[1])) if kind == "rows" else ...
    assert (stored[rows] - exact_cache).abs().max() < 0.05  # the new tokens lie where they should


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_texts_on_cuda(seen):
    """Greedy texts of `generate` and `Engine` on kernels: every token is the float32 model's choice, or within twice what
    BF16 rounds of it, where two words are as good as equal."""
    torch.manual_seed(0)
    model, prompts = Transformer(CFG).eval(), [[1, 2, 3, 4, 5], [7, 8], [9, 3] * 40]
    model.to(torch.bfloat16).to(torch.float32)
    texts = generate(model.to("cuda", torch.bfloat16), prompts, max_new_tokens=12)
    steps = len(seen)
    engine = Engine(model, max_rows=2, pages=8)
    ids = [engine.submit(Request(prompt, 12)) for prompt in prompts]
    written = {id: [] for id in ids}
    for event in engine.stream():
        written[event.id] += event.tokens
    assert steps == 2 * 11 and len(seen) > 2 * steps  # layers x tokens after the first; the engine's rows come and go
    for prompt, text, other in zip(prompts, texts, written.values(), strict=True):
        new = text[-12:]
        for tokens in (new, other[-12:]):
            row = torch.tensor([prompt + tokens])
            with torch.no_grad():
                rounded = model.to("cuda", torch.bfloat16)(row.cuda()).logits[0, len(prompt) - 1 : -1].float().cpu()
                exact = model.to("cpu", torch.float32)(row).logits[0, len(prompt) - 1 : -1]
            margin = 2 * (rounded - exact).abs().max()
            assert margin < exact.std() / 2  # 0.14 to 0.18 on the CPU
            chosen = exact.gather(1, row[0, len(prompt) :, None])[:, 0]
            assert (exact.amax(1) - chosen <= margin).all()
