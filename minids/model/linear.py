"""The linear layer without bias, which also knows the quick way to multiply one token on a CPU.

The problem: decoding one row multiplies every weight matrix with a single vector, y = W x. Each weight is used once, so
the time is that of reading W from memory; but the matrix-vector routine that such a product is given to waits for
memory, at 7 GB/s where a batch of products with the same bytes reaches 14. So W is cut into PARTS bands of rows,

    [y_1; ...; y_PARTS] = [W_1 x; ...; W_PARTS x],

which is a batch of PARTS small products; y is the same but for rounding. For two to FEW tokens, as when drafts are
verified, one product is quick, but only when it is written W x^T; x W^T takes twice the time and more if W comes from
memory. FP32 only: half precision goes to another library.

Shapes: N tokens, D inputs, F outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = 8
FEW = 4
LARGE = 1 << 15  # numbers of a weight from which reading it is most of a product for two to FEW tokens


class Linear(nn.Linear):
    """x W^T with ``weight`` (F, D): (..., D) -> (..., F)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > FEW * self.in_features or torch.is_grad_enabled() or not x.is_cpu or x.dtype != torch.float32:
            return F.linear(x, self.weight)
        return one_token(x, self.weight) if x.numel() == self.in_features else few_linear(x, self.weight)


def few_linear(x: Tensor, weight_FD: Tensor) -> Tensor:
    """x W^T, (..., D) -> (..., F), in float32 inference on the CPU."""
    tokens = x.numel() // weight_FD.shape[1]
    if tokens == 1:
        return one_token(x, weight_FD)
    if not 0 < tokens <= FEW or weight_FD.numel() < LARGE or weight_FD.dtype != x.dtype:
        return F.linear(x, weight_FD)
    return torch.mm(weight_FD, x.reshape(tokens, -1).t()).t().contiguous().view(*x.shape[:-1], -1)


def one_token(x: Tensor, weight_FD: Tensor) -> Tensor:
    """x W^T for x of shape (1, ..., 1, D), as a batch of bands of rows where F divides into them."""
    f, d = weight_FD.shape
    if f % PARTS or weight_FD.dtype != x.dtype:
        return F.linear(x, weight_FD)
    bands_PfD = weight_FD.view(PARTS, f // PARTS, d)
    x_PD1 = x.contiguous().as_strided((PARTS, d, 1), (0, 1, d))  # the same column for each band
    return torch.bmm(bands_PfD, x_PD1).view(*x.shape[:-1], f)
