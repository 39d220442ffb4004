"""What a training step keeps in memory, part by part, measured beside the formula (V3 sections 3.2.3 and 3.3.3).

Measured: autograd is given hooks that see every tensor kept for backward, and a note of which layer is at work. A storage
counts once, for the layer that kept it first; parameters do not count, they are there anyway. So the figures are bytes
that exist, neither more nor less, of one forward pass.

The formula, bytes a token and layer with b bytes a number (BF16: 2) and scales of 4 bytes for every 128 numbers:

    part                        plain, b each                           V3's FP8
    inputs of q_a, kv_a         D                                       0 (the norm's input is kept, and run again)
    core of attention           H (2 (N + R) + V), output, statistics   Q + C + R in b bytes (up-projections run again)
    input of o_proj             H V                                     1.5 H V + scales (E5M6)
    dense and shared            2 D (x, for gate and for up), 3 F       2 F + scales (z in FP8; h is made again)
    routed experts, a slot      D (x), 2 F (z), F (h)                   2 F + scales

and of the state, bytes a parameter: weight 4, gradient 4, moments 2 x 4 or, in BF16, 2 x 2; a copy of each linear's weight
for backward, 2 in BF16 (autocast's) or 1 and a scale a block.

    python -m minids.fp8.memory --preset toy        prints the table

Simplifications: on the CPU the core of attention runs again too; norms keep their inputs in the residual stream's FP32.

Shapes: D hidden, H heads, N/R/V head dims, Q query rank, C latent, F width of a feed-forward.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from minids.config import ModelConfig
from minids.fp8.convert import to_fp8
from minids.fp8.products import Simulated
from minids.fp8.recipe import Fp8Recipe
from minids.model.attention import MLA
from minids.model.layers import MLP, RMSNorm
from minids.model.linear import Linear
from minids.model.moe import Experts
from minids.model.router import Gate
from minids.model.transformer import Transformer

PARTS = ("norms", "inputs of projections", "core of attention", "input of o_proj", "dense and shared", "routed experts",
         "router", "weights' copies", "everything else")  # fmt: skip


def part_of(name: str, module: nn.Module) -> str | None:
    """The part of the table that a module belongs to; None: its parent's."""
    if isinstance(module, RMSNorm):
        return "norms"
    if isinstance(module, Linear):
        inside_mlp = name.rpartition(".")[2] in ("gate_proj", "up_proj", "down_proj")
        if inside_mlp or name.endswith(("lm_head", "eh_proj")):
            return None
        return "input of o_proj" if name.endswith("o_proj") else "inputs of projections"
    kinds = {MLA: "core of attention", MLP: "dense and shared", Experts: "routed experts", Gate: "router"}
    return next((part for kind, part in kinds.items() if isinstance(module, kind)), None)


@contextmanager
def weights_noted() -> Iterator[dict[int, Tensor]]:
    """All FP8 weights and their scales that the simulated engine makes, by address; held, so that none comes twice."""
    seen: dict[int, Tensor] = {}

    def noting(function):
        def wrapped(*args):
            pair = function(*args)
            seen.update({t.untyped_storage().data_ptr(): t for operand in pair for t in (operand.q, operand.scale_inv)})
            return pair

        return wrapped

    functions = {name: getattr(Simulated, name) for name in ("weight", "joined_weight")}
    try:
        for name, function in functions.items():
            setattr(Simulated, name, noting(function))
        yield seen
    finally:
        for name, function in functions.items():
            setattr(Simulated, name, function)


def measure(model: Transformer, rows: Tensor) -> tuple[dict[str, int], Tensor]:
    """Bytes kept for backward by one forward pass with BF16 autocast over ``rows`` (B, T + 1) int64, by part; and the
    loss, on which backward may be called."""
    given = (*model.parameters(), *model.buffers(), rows)
    own = {t.untyped_storage().data_ptr() for t in given}
    shapes = {p.shape for p in model.parameters() if p.ndim > 1}
    shapes |= {(*shape[:-2], shape[-1], shape[-2]) for shape in shapes}  # products keep a weight's transpose
    tokens = rows[:, 1:].numel()
    if any(shape[0] == tokens for shape in shapes):
        raise ValueError(f"rows: got {tokens} tokens, as many as a weight has rows, expected another number")
    stack, seen, handles = ["everything else"], {}, []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in own and address not in seen:
            cast = tensor.dtype == torch.bfloat16 and tensor.shape in shapes  # autocast's
            part = "weights' copies" if cast or address in weights else stack[-1]
            seen[address] = (part, storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    for name, module in model.named_modules():
        part = part_of(name, module)
        if part is not None:
            handles.append(module.register_forward_pre_hook(lambda *_, part=part: stack.append(part)))
            handles.append(module.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        autocast = torch.autocast(rows.device.type, torch.bfloat16)
        with weights_noted() as weights, saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
            out = model(rows[:, :-1], labels=rows[:, 1:])
    finally:
        for handle in handles:
            handle.remove()
    found = dict.fromkeys(PARTS, 0)
    for part, size, _ in seen.values():
        found[part] += size
    return found, out.loss if out.mtp_loss is None else out.loss + out.mtp_loss


def formula(cfg: ModelConfig, tokens: int, slots: int, layers: tuple[int, int], fp8: bool) -> dict[str, float]:
    """Bytes by the table of the module docstring, b = 2, for ``layers`` = (dense, MoE) layers of ``tokens`` tokens each,
    which fill ``slots`` slots of experts in all layers together: the parts that FP8 changes."""
    dense, moe = layers
    out = cfg.num_attention_heads * cfg.v_head_dim
    query = cfg.q_lora_rank or cfg.num_attention_heads * cfg.qk_head_dim
    widths = [cfg.intermediate_size] * dense + [cfg.moe_intermediate_size * cfg.n_shared_experts] * moe
    scaled = lambda n: n + 4 * ceil(n / 128)  # noqa: E731 - one byte a number and the scales
    routed = 2 * cfg.moe_intermediate_size
    if fp8:
        found = {"core of attention": 2 * (query + cfg.latent_dim), "input of o_proj": out / 2 + scaled(out)}
        feed = {"dense and shared": sum(map(scaled, (2 * w for w in widths))), "routed experts": scaled(routed)}
    else:
        found = {"input of o_proj": 2 * out}
        feed = {"dense and shared": 2 * sum(2 * cfg.hidden_size + 3 * w for w in widths),
                "routed experts": 2 * (cfg.hidden_size + 3 * cfg.moe_intermediate_size)}  # fmt: skip
    found = {part: (dense + moe) * tokens * size for part, size in found.items()}
    return found | {"dense and shared": tokens * feed["dense and shared"],
                    "routed experts": slots * (feed["routed experts"] + 2 + 8)}  # gate value, index  # fmt: skip


def state_bytes(model: nn.Module, optimizer: Any) -> dict[str, int]:
    """Bytes of weights, gradients and moments that exist at this moment; ``optimizer``: minids.train.optim's."""
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    moments = [t for key, t in optimizer.state()[0].items() if key.startswith("exp_avg")]
    return {"weights": size(model.parameters()), "moments": size(moments),
            "gradients": size(p.grad for p in model.parameters() if p.grad is not None)}  # fmt: skip


def compare(cfg: ModelConfig, rows: int = 4, length: int = 256, seed: int = 0) -> list[tuple[str, int, int]]:
    """(part, bytes with BF16 products and FP32 moments, bytes with V3's recipe), measured in one training step of each, on
    random tokens."""
    from minids.train.optim import OptimConfig, Optimizer  # train stands to the right of fp8

    torch.manual_seed(seed)
    plain = Transformer(cfg)
    tokens = torch.randint(0, cfg.vocab_size, (rows, length + 1))
    columns = []
    for model, moments in ((plain, "fp32"), (to_fp8(copy.deepcopy(plain), Fp8Recipe.named("v3")), "bf16")):
        optimizer = Optimizer(model, OptimConfig(moments=moments))
        found, loss = measure(model, tokens)
        loss.backward()
        gradients = state_bytes(model, optimizer)["gradients"]
        optimizer.step(0.0)
        columns.append({**found, **state_bytes(model, optimizer), "gradients": gradients})
    return [(part, columns[0][part], columns[1][part]) for part in columns[0]]


def table(lines: list[tuple[str, int, int]]) -> str:
    """Markdown, in KiB; the sum of all activations below theirs."""
    kib = lambda n: f"{n / 1024:,.0f}"  # noqa: E731
    kept = [line for line in lines if line[0] in PARTS]
    total = ("all that is kept for backward", sum(line[1] for line in kept), sum(line[2] for line in kept))
    shown = [*kept, total, *lines[len(kept) :]]
    rows = [f"| {part} | {kib(a)} | {kib(b)} | {f'{b / a:.2f}' if a else '-'} |" for part, a, b in shown]
    return "\n".join(["| part | BF16, KiB | V3's FP8, KiB | ratio |", "|---|--:|--:|--:|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minids.fp8.memory",
                                     description="What a training step keeps, measured.")  # fmt: skip
    parser.add_argument("--preset", default="toy", help="toy, small, v2_lite or v3")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    options = parser.parse_args()
    if min(options.rows, options.length) < 1:
        parser.error(f"--rows {options.rows} --length {options.length}: must be at least 1")
    print(table(compare(ModelConfig.preset(options.preset), options.rows, options.length)))


if __name__ == "__main__":
    main()
