"""A policy small enough to be trained by RL on a laptop: minids' own model, MLA and MoE with bias balancing, and all.

The problem is the start. V3 draws every weight with a standard deviation of 0.006 and has 14.8 trillion tokens to leave
that point; with a million, in a model of 64 dimensions, the signal is lost in the first layers. So embeddings begin at the
scale of what the norms make of them, each matrix keeps its input's scale (1/sqrt(inputs)), and every branch that adds to
the residual begins at zero: the model starts as its embedding and head, and each layer earns its place.
"""

import torch

from minids.config import ModelConfig
from minids.data.tokenizer import BytePairTokenizer
from minids.model.transformer import Transformer

EMBEDDING_STD = 0.7
RESIDUAL = ("o_proj.weight", "down_proj.weight", "experts.down_proj")  # what adds to the residual


def tiny_config(tokenizer: BytePairTokenizer, **changes) -> ModelConfig:
    """Three layers of 64, eight experts, two a token: 0.2M parameters. ``changes`` replace fields."""
    sizes = {
        "vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
        "hidden_size": 64, "num_hidden_layers": 3, "first_k_dense_replace": 1, "intermediate_size": 192,
        "num_attention_heads": 4, "q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0, "max_position_embeddings": 256,
    }  # fmt: skip
    return ModelConfig(**{**sizes, **changes})


def new_policy(cfg: ModelConfig, seed: int) -> Transformer:
    """A model with the weights described above, drawn by a generator of its own."""
    model = Transformer(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                continue
            if name.endswith(RESIDUAL):
                weight.zero_()
                continue
            std = EMBEDDING_STD if "embed_tokens" in name else weight.shape[-1] ** -0.5
            weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))
    return model
