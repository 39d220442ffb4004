"""Multi-head latent attention [V3 section 2.1.1].

The problem: a cache of keys and values for 128 heads is 40,960 numbers a token and layer. MLA keeps one latent vector
instead, from which every head's key and value can be rebuilt, and one rotated key that all heads share: 576 numbers.

    c_t = RMSNorm(W_DKV x_t)     (C)  the latent               k^R_t = RoPE(W_KR x_t)      (R)  the shared rotated key
    [k^N_t,h ; v_t,h] = W_UK,UV,h c_t      key and value of head h        q_t,h = [q^N ; RoPE(q^R)], itself of low rank
    score = (q^N . k^N + q^R . k^R) * scale,     out_t,h = sum_s softmax(score)_s v_s,h

Two ways to compute the same function. *Naive* rebuilds keys and values: few FLOPs a pair (N + R + V), right for training
and prefill. *Absorbed* moves W_UK into the query, q^N . W_UK c = (W_UK^T q^N) . c, and W_UV behind the sum, so that
the cache is read as it lies: more FLOPs a pair (2C + R) but no expansion of the past, right for decoding.

Shapes: B batch, T query tokens, S cached tokens, D hidden, H heads, N/R/V head dims without/with RoPE/of values,
C latent, Q query rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids import kernels
from minids.config import ModelConfig
from minids.kernels import uses_kernels
from minids.model import attention_decode, attention_pages
from minids.model.cache import LatentCache
from minids.model.layers import RMSNorm
from minids.model.linear import Linear
from minids.model.rope import apply_rope, softmax_scale


def causal_mask(t: int, s: int, device) -> Tensor:
    """(T, S) bool, True where the t-th of the last T tokens may see slot s: itself and what lies before."""
    return torch.ones(t, s, dtype=torch.bool, device=device).tril(s - t)


class _BlockAttention(torch.autograd.Function):
    """softmax(q k^T scale + bias) v on the CPU, by blocks of query rows. A causal block reads only the keys up to its own
    end, which spares up to half of the work; backward is written out so that blocks add to one gradient in place:

        dV = P^T dO,    dP = dO V^T,    dS = P (dP - rowsum(P dP)),    dQ = dS K scale,    dK = dS^T Q scale
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, causal: bool) -> Tensor:
        t, size = q.shape[1], max(64, q.shape[1] // 4) if causal else q.shape[1]
        out, ctx.weights = q.new_empty(*q.shape[:2], v.shape[-1]), []
        ctx.blocks = [(a, min(a + size, t), min(a + size, t) if causal else k.shape[1]) for a in range(0, t, size)]
        for a, b, end in ctx.blocks:
            scores = torch.baddbmm(bias[:, a:b, :end], q[:, a:b], k[:, :end].transpose(1, 2), alpha=scale)
            weights = scores.softmax(-1)
            torch.bmm(weights, v[:, :end], out=out[:, a:b])
            ctx.weights.append(weights)
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor):
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (a, b, end), weights in zip(ctx.blocks, ctx.weights, strict=True):
            d_block = d_out[:, a:b]
            d_weights = torch.bmm(d_block, v[:, :end].transpose(1, 2))
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            torch.bmm(d_scores, k[:, :end], out=dq[:, a:b])
            dk[:, :end].baddbmm_(d_scores.transpose(1, 2), q[:, a:b])
            dv[:, :end].baddbmm_(weights.transpose(1, 2), d_block)
        return dq, dk, dv, None, None, None


def attend(q_BHTn: Tensor, k_BHSn: Tensor, v_BHSv: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T * scale, masked) v, (B, H, T, V). ``mask``: bool, True where t may see s; None is causal, the T
    queries being the last of the S tokens.

    On CUDA torch takes its best fused kernel: on Hopper in half precision cuDNN's, which alone reads keys and values of
    different widths at full speed (flash would need v padded), otherwise the memory-efficient one. A mask, as for
    documents, excludes flash and is read from memory; V3 trains without [section 4.1]. On CPU
    short rows are written out by blocks; long rows, whose scores would fill the memory, use the fused kernel, with v
    padded to the width of q and k, or it would not be fused.
    """
    (b, h, t, _), s, width = q_BHTn.shape, k_BHSn.shape[2], v_BHSv.shape[-1]
    causal = mask is None and t == s
    if mask is None and not (causal and q_BHTn.is_cuda):
        mask = causal_mask(t, s, q_BHTn.device)
    if q_BHTn.is_cpu and s <= 1024:
        bias = torch.zeros(mask.shape, dtype=q_BHTn.dtype).masked_fill_(~mask, -torch.inf)
        flat = [x.flatten(0, 1) for x in (q_BHTn, k_BHSn, v_BHSv, bias.expand(b, h, t, s))]
        return _BlockAttention.apply(*flat, scale, causal).unflatten(0, (b, h))
    if q_BHTn.is_cpu:
        v_BHSv = F.pad(v_BHSv, (0, q_BHTn.shape[-1] - width))
    mask = None if causal else mask
    out = F.scaled_dot_product_attention(q_BHTn, k_BHSn, v_BHSv, mask, is_causal=causal, scale=scale)
    return out[..., :width]


class MLA(nn.Module):
    """One layer's attention; parameter names are the published checkpoint's."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg, self.scale = cfg, softmax_scale(cfg)
        d, heads = cfg.hidden_size, cfg.num_attention_heads
        if cfg.q_lora_rank is None:
            self.q_proj = Linear(d, heads * cfg.qk_head_dim)
        else:
            self.q_a_proj = Linear(d, cfg.q_lora_rank)
            self.q_a_layernorm = RMSNorm(cfg.q_lora_rank, cfg.rms_norm_eps)
            self.q_b_proj = Linear(cfg.q_lora_rank, heads * cfg.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(d, cfg.latent_dim)
        self.kv_a_layernorm = RMSNorm(cfg.kv_lora_rank, cfg.rms_norm_eps)
        self.kv_b_proj = Linear(cfg.kv_lora_rank, heads * (cfg.qk_nope_head_dim + cfg.v_head_dim))
        self.o_proj = Linear(heads * cfg.v_head_dim, d)

    def projections(self) -> list[Tensor]:
        """The weights of all linear maps, the scale of the query's norm among them: all that can be folded."""
        low_rank = (self.q_a_proj, self.q_a_layernorm, self.q_b_proj) if self.cfg.q_lora_rank else (self.q_proj,)
        return [m.weight for m in (*low_rank, self.kv_a_proj_with_mqa, self.kv_b_proj, self.o_proj)]

    def down(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The compressed query (B, T, Q), or all of it where it is not compressed, and [latent ; k^R] (B, T, C + R)."""
        return (self.q_a_proj if self.cfg.q_lora_rank else self.q_proj)(x_BTD), self.kv_a_proj_with_mqa(x_BTD)

    def query(self, low_BTq: Tensor) -> tuple[Tensor, Tensor]:
        """q^N (B, T, H, N) and q^R (B, T, H, R), not rotated yet. The query is of low rank in inference too."""
        return self.query_heads(low_BTq).split([self.cfg.qk_nope_head_dim, self.cfg.qk_rope_head_dim], dim=-1)

    def query_heads(self, low_BTq: Tensor) -> Tensor:
        """(B, T, H, N + R), not rotated yet."""
        q = self.q_b_proj(self.q_a_layernorm(low_BTq)) if self.cfg.q_lora_rank else low_BTq
        return q.unflatten(-1, (self.cfg.num_attention_heads, -1))

    def latent(self, joint_BTc: Tensor) -> tuple[Tensor, Tensor]:
        """The normed latent c (B, T, C) and the one key k^R (B, T, R), not rotated yet."""
        c, k_rope = joint_BTc.split([self.cfg.kv_lora_rank, self.cfg.qk_rope_head_dim], dim=-1)
        return self.kv_a_layernorm(c), k_rope

    def naive(self, q_nope: Tensor, q_rope: Tensor, latent_BSc: Tensor, mask: Tensor | None) -> Tensor:
        """Rebuilds every head's key and value from the latent, then ordinary attention. (B, T, H * V)"""
        cfg = self.cfg
        c, k_rope = latent_BSc.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(c).unflatten(-1, (cfg.num_attention_heads, -1))
        k_nope, v = kv.split([cfg.qk_nope_head_dim, cfg.v_head_dim], dim=-1)
        k_rope = k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], -1)  # one key, seen by every head
        q, k = torch.cat([q_nope, q_rope], dim=-1), torch.cat([k_nope, k_rope], dim=-1)
        return self.attend(q, k, v, mask)

    def attend(self, q_BTHn: Tensor, k_BSHn: Tensor, v_BSHv: Tensor, mask: Tensor | None) -> Tensor:
        """`attend` of every head's query, key and value, (B, T, H * V)."""
        out = attend(q_BTHn.transpose(1, 2), k_BSHn.transpose(1, 2), v_BSHv.transpose(1, 2), mask, self.scale)
        return out.transpose(1, 2).flatten(-2)

    def naive_fused(self, low_BTq: Tensor, joint_BTc: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
        """`naive` without a cache where kernels run: rotation and joining in one pass. (B, T, H * V)"""
        cfg = self.cfg
        q = self.query_heads(low_BTq)
        c, k_rope = self.latent(joint_BTc)
        kv = self.kv_b_proj(c).unflatten(-1, (cfg.num_attention_heads, -1))
        q, k, v = kernels.rope_heads(q, kv, k_rope.to(q.dtype), rope.contiguous())  # MTP's is a part of the main model's
        return self.attend(q, k, v, mask)

    def up_weights(self) -> tuple[Tensor, Tensor]:
        """W_UK (H, N, C) and W_UV (H, V, C)."""
        cfg = self.cfg
        return self.kv_b_proj.weight.unflatten(0, (cfg.num_attention_heads, -1)).split(
            [cfg.qk_nope_head_dim, cfg.v_head_dim], dim=1)  # fmt: skip

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, latent_BSc: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over the latent itself: one key and value of C (+ R) numbers for all heads. (B, T, H * V)"""
        cfg, (w_uk, w_uv) = self.cfg, self.up_weights()
        b, t, heads, _ = q_nope.shape
        q_latent = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), w_uk).transpose(0, 1).view(b, t, heads, -1)
        q = torch.cat([q_latent, q_rope], dim=-1).flatten(1, 2) * self.scale
        scores = torch.bmm(q, latent_BSc.transpose(1, 2)).view(b, t, heads, -1)
        if mask is None and t > 1:
            mask = causal_mask(t, scores.shape[-1], scores.device)[None, None]
        if mask is not None:
            scores = scores.masked_fill(~mask.transpose(1, 2), -torch.inf)  # (B, 1, T, S) -> (B, T, 1, S)
        weights = scores.softmax(-1).flatten(1, 2)
        out = torch.bmm(weights, latent_BSc[..., : cfg.kv_lora_rank]).view(b * t, heads, -1).transpose(0, 1)
        return torch.bmm(out, w_uv.transpose(1, 2)).transpose(0, 1).reshape(b, t, -1)

    def forward(self, x_BTD: Tensor, rope: Tensor, mask: Tensor | None, cache: LatentCache | None = None,
                layer: int = 0, positions: Tensor | None = None, absorb: bool = False) -> Tensor:  # fmt: skip
        """(B, T, D) -> (B, T, D). ``rope`` from ``rope_table``; ``mask`` as in ``attend``; with a cache the new
        tokens are written to ``positions`` (B, T) of ``layer`` and all slots so far are attended."""
        if absorb and cache is not None and attention_decode.applies(self, x_BTD):
            return attention_decode.attend_few(self, x_BTD, rope, mask, cache, layer, positions)
        return self.o_proj(self.core(*self.down(x_BTD), rope, mask, cache, layer, positions, absorb))

    def core(self, low_BTq: Tensor, joint_BTc: Tensor, rope: Tensor, mask: Tensor | None, cache: LatentCache | None,
             layer: int, positions: Tensor | None, absorb: bool) -> Tensor:  # fmt: skip
        """What lies between the down-projections and o_proj: up-projections, rotation, attention. (B, T, H * V)"""
        if cache is None and not absorb and uses_kernels(joint_BTc):
            return self.naive_fused(low_BTq, joint_BTc, rope, mask)
        q_nope, q_rope = self.query(low_BTq)
        c, k_rope = self.latent(joint_BTc)
        # The shared key is rotated with the queries, as one more head.
        rotated = apply_rope(torch.cat([q_rope, k_rope.unsqueeze(-2)], dim=-2), rope)
        q_rope, k_rope = rotated[..., :-1, :], rotated[..., -1, :]
        latent = torch.cat([c, k_rope], dim=-1)  # all that is cached
        if absorb and cache is not None and attention_pages.applies(self, cache, latent):
            cache.store(layer, positions, latent)
            return attention_pages.attend(self, q_nope, q_rope, cache, layer)
        if cache is not None:
            latent = cache.write(layer, positions, latent)
        return (self.absorbed if absorb else self.naive)(q_nope, q_rope, latent, mask)
