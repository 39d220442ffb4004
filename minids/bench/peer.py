"""The model all CPU figures are measured on, and its peer: transformers' DeepseekV3 with the very same weights."""

import tempfile
from pathlib import Path

import torch

from minids.checkpoint import save
from minids.config import ModelConfig
from minids.model.transformer import Transformer


def benchmark_config(**overrides) -> ModelConfig:
    """The 19.7M model of all CPU figures: V3's shape (MLA, sigmoid router with bias and groups, shared expert), scaled
    down.

    Without MTP, which transformers' model leaves out, so that both sides do the same work.
    """
    shape = dict(
        vocab_size=4096, hidden_size=256, num_hidden_layers=6, first_k_dense_replace=1, intermediate_size=768,
        moe_intermediate_size=128, n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2, n_shared_experts=1,
        q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, num_attention_heads=4,
        max_position_embeddings=4096, rope_scaling=None, num_nextn_predict_layers=0, initializer_range=0.02,
    )  # fmt: skip
    return ModelConfig.from_dict({**shape, **overrides})


def benchmark_model(seed: int = 0, **overrides) -> Transformer:
    """A model with `benchmark_config`'s shape and random weights; router biases too, or no bias would alter any choice."""
    torch.manual_seed(seed)
    model = Transformer(benchmark_config(**overrides))
    for gate in model.routers():
        gate.e_score_correction_bias.uniform_(-0.05, 0.05)
    return model


def transformers_twin(model: Transformer, experts: str = "grouped_mm"):
    """transformers' model with the weights of `model`, in its dtype, handed over as a published checkpoint.

    experts: transformers' implementation of the experts, "grouped_mm" (the fastest on the CPU) or "eager". Raises
    RuntimeError if a weight did not arrive, since a randomly initialised one would be timed without anybody noticing.
    """
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        twin, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=model.lm_head.weight.dtype, experts_implementation=experts, output_loading_info=True
        )
    problems = {kind: keys for kind, keys in loading.items() if keys}
    if problems:
        raise RuntimeError(f"transformers did not take over every weight: {problems}")
    return twin
