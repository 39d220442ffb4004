"""One configuration for every size, from a toy to the 671B model [V3 section 4.2].

The field names are those of the published ``config.json``, so a published file is read as it is and a saved one is
readable by other software. The same numbers give, in closed form, what the paper reports of the model: parameters in
total and activated, FP8 scales, FLOPs a token and bytes of cache a token (``ModelConfig.count``). Nothing here needs
torch: counting 671 billion parameters is arithmetic.

Notation: D hidden_size, H heads, N/R qk_nope/qk_rope_head_dim, V v_head_dim, C kv_lora_rank, Q q_lora_rank,
E n_routed_experts, K num_experts_per_tok, F moe_intermediate_size.
"""

import copy
import dataclasses
import difflib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

FP8_BLOCK = 128  # the published weight_block_size is [128, 128]
V3_YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
# What a V2 config.json means by a key that it leaves out; transformers, whose V2 knows nothing else, writes none of these.
V2_DEFAULTS = {
    "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0, "aux_loss_alpha": 0.001,
}  # fmt: skip
YARN_KEYS = set(V3_YARN) | {"truncate", "attention_factor"}


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one model; the defaults are DeepSeek-V3's.

    Built by ``preset``, ``from_json``, ``from_dict`` or ``replace``. Every way in validates and raises ``ValueError``
    that names the field, the value received and what is allowed. Keys we do not know are kept in ``extra`` and written
    back by ``to_dict``.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None  # MLA has one key and value a query head; None means the same number
    q_lora_rank: int | None = 1536  # None: one plain q_proj, as in V2-Lite
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    num_nextn_predict_layers: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    max_position_embeddings: int = 163840
    initializer_range: float = 0.006  # [V3 4.2]; the released config.json says 0.02, a leftover that only training reads
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float = 0.0
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1
    aux_loss_alpha: float = 1e-4  # sequence-wise balance loss [V3 2.1.2]; released V3 configs miss the key
    seq_aux: bool = True
    mtp_hidden_norm: bool = True  # MTP reads the hidden state after (True) or before (False) the norm that feeds the head
    quantization_config: dict | None = None
    model_type: str = "deepseek_v3"
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", dict(self.rope_scaling))
        validate(self)

    # ---- ways in and out -----------------------------------------------------------------------------------------
    @classmethod
    def preset(cls, name: str, **overrides) -> "ModelConfig":
        """``toy``, ``small``, ``v2_lite`` or ``v3``, with fields replaced by ``overrides``."""
        if name not in PRESETS:
            raise ValueError(f"preset={name!r}: allowed are {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> "ModelConfig":
        """Reads a ``config.json``, published or saved by us. Raises ``ValueError`` naming the file."""
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"config file {path} does not exist") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"config file {path} cannot be read as JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"config file {path} holds a JSON {type(values).__name__}, allowed is an object")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        """From the keys of a ``config.json``: the older ``rope_theta`` + ``rope_scaling`` or ``rope_parameters``."""
        values = _unify_rope(dict(values))
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        if values.get("rope_interleave") is False:  # transformers' switch for weights laid out otherwise
            raise ValueError("rope_interleave=False: allowed is true, the published layout of neighbouring pairs")
        extra = {**values.pop("extra", {}), **{k: v for k, v in values.items() if k not in known}}
        if "transformers_version" in extra:  # as transformers does: null stands for "not set" in its own files
            values = {k: v for k, v in values.items() if v is not None or k in ("q_lora_rank", "rope_scaling")}
        if values.get("model_type") == "deepseek_v2":
            values = {**V2_DEFAULTS, **values}
        return cls(**{k: v for k, v in values.items() if k in known}, extra=extra)

    def to_dict(self) -> dict:
        """The published ``config.json`` as a dict; ``from_dict(to_dict())`` is the same config."""
        values = {f.name: copy.deepcopy(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "extra"}
        v2 = self.model_type == "deepseek_v2"
        values["architectures"] = ["DeepseekV2ForCausalLM" if v2 else "DeepseekV3ForCausalLM"]
        return {**values, **self.extra}

    def to_json(self, path: str | os.PathLike) -> None:
        """Writes ``to_dict`` to ``path``, under a temporary name first."""
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def replace(self, **changes) -> "ModelConfig":
        """A copy with some fields changed, validated again."""
        unknown = set(changes) - {f.name for f in dataclasses.fields(self)}
        if unknown:
            names = [f.name for f in dataclasses.fields(self)]
            like = [near for name in sorted(unknown) for near in difflib.get_close_matches(name, names, n=1)]
            hint = f"; did you mean {', '.join(like)}?" if like else ""
            raise ValueError(f"ModelConfig has no field {', '.join(sorted(unknown))}{hint}")
        if "num_attention_heads" in changes and "num_key_value_heads" not in changes:
            changes["num_key_value_heads"] = None
        return dataclasses.replace(self, **changes)

    # ---- derived shapes ------------------------------------------------------------------------------------------
    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """What the cache holds a token and layer: the normed latent and the one rotated key, C + R."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_moe_layer(self, index: int) -> bool:
        """Layers from ``first_k_dense_replace`` on are MoE; MTP modules (index >= num_hidden_layers) always are."""
        if index >= self.num_hidden_layers:
            return self.n_routed_experts > 0
        return index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0

    # ---- exact counts --------------------------------------------------------------------------------------------
    def linears(self, moe: bool) -> dict[str, tuple[int, int, int]]:
        """The matrices of one layer that are FP8 on disk: name -> (copies, out features, in features)."""
        d, heads = self.hidden_size, self.num_attention_heads
        q_out = heads * self.qk_head_dim
        found = {"q_proj": (1, q_out, d)}
        if self.q_lora_rank is not None:
            found = {"q_a_proj": (1, self.q_lora_rank, d), "q_b_proj": (1, q_out, self.q_lora_rank)}
        found["kv_a_proj_with_mqa"] = (1, self.latent_dim, d)
        found["kv_b_proj"] = (1, heads * (self.qk_nope_head_dim + self.v_head_dim), self.kv_lora_rank)
        found["o_proj"] = (1, d, heads * self.v_head_dim)
        if not moe:
            return found | _swiglu("mlp", 1, d, self.intermediate_size)
        found |= _swiglu("experts", self.n_routed_experts, d, self.moe_intermediate_size)
        if self.n_shared_experts:
            found |= _swiglu("shared_experts", 1, d, self.moe_intermediate_size * self.n_shared_experts)
        return found

    def layer_parameters(self, moe: bool, activated: bool = False) -> int:
        """Parameters of one layer, norms included; with ``activated`` only those that one token uses."""
        total = 2 * self.hidden_size + self.kv_lora_rank + (self.q_lora_rank or 0)
        for name, (copies, rows, columns) in self.linears(moe).items():
            routed = activated and name.startswith("experts.")
            total += (self.num_experts_per_tok if routed else copies) * rows * columns
        if moe:
            total += self.n_routed_experts * self.hidden_size
            total += self.n_routed_experts if self.topk_method == "noaux_tc" else 0  # e_score_correction_bias
        return total

    def layer_fp8_scales(self, moe: bool) -> int:
        """``weight_scale_inv`` elements of one layer: one a 128 x 128 block, cut blocks count."""
        return sum(n * _blocks(rows) * _blocks(columns) for n, rows, columns in self.linears(moe).values())

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Cache bytes a token, all layers; BF16 by default [V3 2.1.1]."""
        return self.num_hidden_layers * self.latent_dim * bytes_per_element

    def flops_per_token(self, length: int = 4096) -> int:
        """Training FLOPs a token: 6 a parameter that is multiplied, plus causal attention over ``length`` tokens.

        A token at position t attends to t others, length / 2 on average; scores and values cost 2 x (qk + v) FLOPs
        a pair and head, and backward costs twice forward. MTP is not counted. [ISCA section 2.2: 250 GFLOP at 4096]
        """
        if length < 1:
            raise ValueError(f"length={length}: allowed is a positive number of tokens")
        pair = 2 * self.num_attention_heads * (self.qk_head_dim + self.v_head_dim)
        return 6 * self.count()["activated_without_embedding"] + 3 * self.num_hidden_layers * pair * length // 2

    def count(self) -> dict[str, int]:
        """Every parameter count of the paper and the checkpoint, in closed form. Units: parameters, except
        ``fp8_scales`` (float32 elements) and ``kv_bytes_per_token`` (bytes)."""
        moe_layers = sum(self.is_moe_layer(i) for i in range(self.num_hidden_layers))
        dense_layers = self.num_hidden_layers - moe_layers
        embedding, d, depth = self.vocab_size * self.hidden_size, self.hidden_size, self.num_nextn_predict_layers
        head = 0 if self.tie_word_embeddings else embedding

        def layers(of):
            return dense_layers * of(False) + (moe_layers * of(True) if moe_layers else 0)

        main = embedding + head + d + layers(self.layer_parameters)
        mtp_moe = self.is_moe_layer(self.num_hidden_layers)
        mtp = depth * (self.layer_parameters(mtp_moe) + 2 * d * d + 3 * d)  # eh_proj; enorm, hnorm, shared_head.norm
        activated = embedding + embedding + d + layers(lambda moe: self.layer_parameters(moe, activated=True))
        return {
            "main": main,
            "dense_layer": self.layer_parameters(False),
            "moe_layer": self.layer_parameters(True) if moe_layers else 0,
            "dense_layers": dense_layers,
            "moe_layers": moe_layers,
            "embedding": embedding,
            "head": head,
            "mtp": mtp,
            "on_disk": main + mtp + depth * 2 * embedding,  # each MTP layer is stored with its copies of both
            "activated": activated,
            "activated_without_embedding": activated - embedding,
            "fp8_scales": layers(self.layer_fp8_scales) + depth * self.layer_fp8_scales(mtp_moe),
            "kv_bytes_per_token": self.kv_bytes_per_token(),
        }


def _swiglu(prefix: str, copies: int, d: int, f: int) -> dict[str, tuple[int, int, int]]:
    shapes = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    return {f"{prefix}.{name}": (copies, *shape) for name, shape in shapes.items()}


def _blocks(size: int) -> int:
    return -(-size // FP8_BLOCK)


def _unify_rope(values: dict) -> dict:
    """Folds the newer ``rope_parameters`` into ``rope_theta`` and ``rope_scaling``; 'rope_type' becomes 'type'."""
    found = values.pop("rope_parameters", None) or values.get("rope_scaling") or {}
    if not isinstance(found, dict):
        return {**values, "rope_scaling": found}  # refused by the rules
    merged = dict(found)
    if "rope_theta" in merged:
        values["rope_theta"] = merged.pop("rope_theta")
    kind = merged.pop("rope_type", None) or merged.get("type")
    if kind is None and "factor" in merged:  # scaling that says not which: refused by the rules, never dropped
        return {**values, "rope_scaling": merged}
    values["rope_scaling"] = None if kind in (None, "default") else {**merged, "type": kind}
    return values


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _rules(c: ModelConfig):
    """(holds, field, what is allowed) for every requirement on a config."""
    sizes = [
        "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "moe_intermediate_size",
        "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
        "moe_layer_freq", "max_position_embeddings",
    ]  # fmt: skip
    counts = ["n_routed_experts", "n_shared_experts", "num_experts_per_tok", "num_nextn_predict_layers",
              "first_k_dense_replace"]  # fmt: skip
    for name in sizes + counts + ["n_group", "topk_group"]:
        low = 0 if name in counts else 1
        value = getattr(c, name)
        yield type(value) is int and value >= low, name, f"an integer of at least {low}"
    for name, low in (("rms_norm_eps", 0), ("rope_theta", 1), ("routed_scaling_factor", 0), ("initializer_range", 0)):
        value = getattr(c, name)
        yield _is_number(value) and value > low, name, f"a finite number above {low}"
    for name in ("norm_topk_prob", "tie_word_embeddings", "seq_aux", "mtp_hidden_norm"):
        yield isinstance(getattr(c, name), bool), name, "true or false"
    yield c.quantization_config is None or isinstance(c.quantization_config, dict), "quantization_config", (
        "null or an object")
    yield c.q_lora_rank is None or (type(c.q_lora_rank) is int and c.q_lora_rank > 0), "q_lora_rank", "null or above 0"
    yield c.num_key_value_heads == c.num_attention_heads, "num_key_value_heads", (
        f"num_attention_heads={c.num_attention_heads}: MLA expands one key and one value for each query head")
    yield c.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "an even number: RoPE rotates pairs"
    yield c.first_k_dense_replace <= c.num_hidden_layers, "first_k_dense_replace", (
        f"0 to num_hidden_layers={c.num_hidden_layers}")
    yield c.scoring_func in ("sigmoid", "softmax"), "scoring_func", "sigmoid or softmax"
    yield c.topk_method in ("noaux_tc", "greedy", "group_limited_greedy"), "topk_method", (
        "noaux_tc, greedy or group_limited_greedy")
    yield c.hidden_act == "silu", "hidden_act", "silu"
    yield c.attention_bias is False, "attention_bias", "false: no published model of this family has one"
    yield c.attention_dropout == 0, "attention_dropout", "0: no published model of this family uses it"
    yield _is_number(c.aux_loss_alpha) and c.aux_loss_alpha >= 0, "aux_loss_alpha", "a finite number, 0 or above"
    yield c.model_type in ("deepseek_v3", "deepseek_v2"), "model_type", "deepseek_v3 or deepseek_v2"
    moe = c.num_nextn_predict_layers or any(c.is_moe_layer(i) for i in range(c.num_hidden_layers))
    if c.n_routed_experts == 0:
        yield not moe or not any(c.is_moe_layer(i) for i in range(c.num_hidden_layers)), "n_routed_experts", (
            "above 0 when there are MoE layers (first_k_dense_replace < num_hidden_layers)")
    else:
        yield from _router_rules(c)
    if c.rope_scaling is not None:
        yield from _yarn_rules(c)


def _router_rules(c: ModelConfig):
    grouped = c.topk_method != "greedy"
    yield c.num_experts_per_tok >= 1, "num_experts_per_tok", "at least 1"
    yield c.n_routed_experts % c.n_group == 0, "n_group", f"a divisor of n_routed_experts={c.n_routed_experts}"
    yield c.topk_group <= c.n_group, "topk_group", f"1 to n_group={c.n_group}"
    reach = c.n_routed_experts // c.n_group * c.topk_group if grouped else c.n_routed_experts
    yield c.num_experts_per_tok <= reach, "num_experts_per_tok", (
        f"at most {reach}, the experts in topk_group={c.topk_group} of n_group={c.n_group} groups"
        f" of n_routed_experts={c.n_routed_experts}")
    if c.topk_method == "noaux_tc":  # a group's score is the sum of its two best
        yield c.n_routed_experts // c.n_group >= 2, "n_group", (
            f"at most {c.n_routed_experts // 2}: at least two experts a group, n_routed_experts={c.n_routed_experts}")


def _yarn_rules(c: ModelConfig):
    scaling = c.rope_scaling
    yield isinstance(scaling, dict), "rope_scaling", "null or an object"
    yield scaling.get("type") == "yarn", "rope_scaling", "null or type 'yarn'"
    yield set(scaling) <= YARN_KEYS, "rope_scaling", f"the keys {', '.join(sorted(YARN_KEYS))}"
    yield _is_number(scaling.get("factor")) and scaling["factor"] >= 1, "rope_scaling", "a finite factor of at least 1"
    length = scaling.get("original_max_position_embeddings")
    yield type(length) is int and length > 0, "rope_scaling", "original_max_position_embeddings, a positive integer"
    optional = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
    yield all(_is_number(scaling.get(name) or 0) for name in optional), "rope_scaling", f"{', '.join(optional)}: numbers"
    fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
    yield fast >= slow > 0, "rope_scaling", "beta_fast >= beta_slow > 0"


def validate(config: ModelConfig) -> None:
    """Raises ``ValueError`` for the first rule that does not hold: field, value received, what is allowed."""
    for holds, name, allowed in _rules(config):
        if not holds:
            raise ValueError(f"{name}={getattr(config, name)!r}: allowed is {allowed}")


PRESETS: dict[str, dict] = {
    # A few million parameters: trains in minutes on two CPU cores, every mechanism of V3 switched on.
    "toy": dict(
        vocab_size=4096, hidden_size=128, num_hidden_layers=4, first_k_dense_replace=1, intermediate_size=384,
        moe_intermediate_size=64, num_attention_heads=4, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=32,
        qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, n_group=4,
        topk_group=2, max_position_embeddings=2048, initializer_range=0.04,  # 0.006 x sqrt(7168 / 128), about
    ),
    # One GPU: about 0.3B parameters activated of 1.7B.
    "small": dict(
        vocab_size=32768, hidden_size=1024, num_hidden_layers=16, first_k_dense_replace=1, intermediate_size=2816,
        moe_intermediate_size=512, num_attention_heads=16, q_lora_rank=384, kv_lora_rank=256, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=64, n_shared_experts=1, num_experts_per_tok=8, n_group=8,
        topk_group=4, max_position_embeddings=4096, initializer_range=0.016,  # 0.006 x sqrt(7168 / 1024)
    ),
    "v2_lite": dict(
        vocab_size=102400, hidden_size=2048, num_hidden_layers=27, first_k_dense_replace=1, intermediate_size=10944,
        moe_intermediate_size=1408, num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
        n_group=1, topk_group=1, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False,
        routed_scaling_factor=1.0, num_nextn_predict_layers=0, aux_loss_alpha=0.001, initializer_range=0.02,
        bos_token_id=100000, eos_token_id=100001, model_type="deepseek_v2",
        rope_scaling={**V3_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "v3": dict(rope_scaling=V3_YARN, quantization_config={
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}),
}  # fmt: skip
