"""Training and prefill attention on CUDA: which of torch's kernels runs, and its values and gradients against float64."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from minids.model.attention import attend, causal_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def inputs(dtype):
    torch.manual_seed(0)
    sizes = ((2, 3, 130, 192), (2, 3, 130, 192), (2, 3, 130, 128))
    return [torch.randn(size, device="cuda").to(dtype).requires_grad_() for size in sizes]


def test_cudnn_is_chosen_on_hopper():
    """Keys of 192 and values of 128 numbers in BF16: flash refuses them, the memory-efficient one is four times slower."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    q, k, v = inputs(torch.bfloat16)
    assert torch._fused_sdp_choice(q, k, v, is_causal=True, scale=0.1) == SDPBackend.CUDNN_ATTENTION.value


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 8e-3), (torch.float32, 2e-3)])
def test_values_and_gradients(documents, dtype, limit):
    q, k, v = inputs(dtype)
    seen = causal_mask(130, 130, "cuda")
    if documents:
        ids = torch.arange(130, device="cuda") // 50
        seen = seen & (ids[:, None] == ids[None, :])
    dy = torch.randn(2, 3, 130, 128, device="cuda").to(dtype)
    found = attend(q, k, v, seen[None, None] if documents else None, 0.1)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = (wide[0] @ wide[1].mT * 0.1).masked_fill(~seen, -torch.inf)
    exact = scores.softmax(-1) @ wide[2]
    pairs = [(found, exact), *zip(torch.autograd.grad(found, (q, k, v), dy), torch.autograd.grad(exact, wide, dy.double()),
                                  strict=True)]  # fmt: skip
    for a, b in pairs:
        assert ((a.double() - b).norm() / b.norm()).item() < limit
