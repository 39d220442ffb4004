"""Whether both sides of the training row compute the same, asked before anything is timed.

The mean loss would not tell two random models apart; logits do. But with random weights many experts are nearly as good as
each other: a rounding changes which are chosen, and that changes logits more than all roundings together. So:

BF16     Ours, transformers' and a float32 run choose freely (a peer's router cannot be told what to choose). Ours may not
         be further from float32 than the peer by more than a tenth.
FP8      The choices of the float32 run are given to the others, so that rounding alone is left.
         1. Ours in FP8 may be 20 times as far from float32 as ours in BF16. E4M3 has 4 significant bits, BF16 8, and small
            errors add up as they would one by one: 2^4 is what rounding alone explains (an H200 showed 14.7 twice), and
            numbers far below the largest of their tile have fewer bits.
         2. Layer by layer, on the float32 run's hidden states, tensor cores compute what the recipe's simulation does
            (`minids.fp8.products.Simulated`, which tests hold to loops over groups): the output and the gradients of the
            input and of every weight. What is left between them is the order of sums, and that the simulation multiplies in
            BF16 what q times its scale stands for: 2^-9 a number, which sends some per cent of what is quantised for a
            second product to the next number of E4M3, a sixteenth away.

Why by layers: through all twelve, the last bits of the first become a distance of 0.13 from simulated to real logits, 0.2
of gradients (0.25 of the worst weight's), with 0.18 and 0.26 from either to float32. That says little. A layer by itself
must stay below 0.2 (an H200 showed 0.09 at worst); a product that has another expert's rows or another token's scales is
at 1 and above.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from minids.model.block import Block, Context
from minids.model.transformer import Transformer

PEER = "transformers grouped_mm"
FURTHER = 1.1  # times the peer's distance from the float32 run, in BF16
COARSER = 20  # times our own distance in BF16, in FP8
SIMULATED = 0.2  # the distance of a layer's result from its simulation
UNRELATED = 1.0  # a distance from which it says nothing: another random model is about 1.4 away


def check_equal(model: nn.Module, twin: nn.Module, rows: Tensor, fp8: bool) -> dict[str, float]:
    """Relative distances of the first row's logits (in FP8 of layers' results too), and both sides' losses of that row.
    Raises RuntimeError, with all distances, if they are too far apart."""
    rows = rows[:1]
    with torch.device(rows.device):
        reference = Transformer(model.cfg).train()
    reference.load_state_dict(twin.state_dict())  # in float32; the twin has the weights before any FP8
    with torch.no_grad():
        exact, peer = reference(rows[:, :-1]), twin(input_ids=rows[:, :-1], use_cache=False).logits
        with autocast(model):
            ours = model(rows[:, :-1]).logits
    found = {"minids": distance(ours, exact.logits), PEER: distance(peer, exact.logits)}
    for name, logits in (("minids", ours), (PEER, peer)):
        found[f"loss of {name}"] = nn.functional.cross_entropy(logits[0].float(), rows[0, 1:]).item()
    if fp8:
        choices = [routing.indices for routing in exact.routing]
        found |= rounding_alone(model, reference, rows, exact.logits, choices)
        right = found["FP8, choices given"] < COARSER * found["BF16, choices given"]
        right = right and found["a layer, simulated"] < SIMULATED
    else:
        right = found["minids"] < FURTHER * found[PEER]
    if not (right and found["minids"] < UNRELATED):
        raise RuntimeError(f"not the same step, nothing timed: distances {found}")
    return found


def rounding_alone(
    model: nn.Module, reference: nn.Module, rows: Tensor, exact: Tensor, choices: Sequence[Tensor]
) -> dict[str, float]:
    """What is left between float32, BF16, FP8 and its simulation when all send each token to the same experts."""
    calls = []
    hooks = [layer.register_forward_pre_hook(lambda layer, args: calls.append(args)) for layer in reference.main_layers]
    with given(reference, choices), given(model, choices), torch.no_grad():
        reference(rows[:, :-1])
        for hook in hooks:
            hook.remove()
        with torch.autocast(rows.device.type, torch.bfloat16):
            bf16 = distance(reference(rows[:, :-1]).logits, exact)
        with autocast(model):
            fp8 = distance(model(rows[:, :-1]).logits, exact)
    with given(model, choices):
        apart = [apart_from_simulation(layer, *call) for layer, call in zip(model.main_layers, calls, strict=True)]
    return {"BF16, choices given": bf16, "FP8, choices given": fp8, "a layer, simulated": largest(apart)}


def apart_from_simulation(
    layer: Block, x: Tensor, context: Context, delta: Tensor | None = None, unsummed: bool = False
) -> float:
    """The largest distance of the layer's results, for the input that another was given, from their simulation."""
    x = x if delta is None else x + delta
    dy = torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(0), device=x.device)
    found = results(layer, x, context, dy)
    with simulated(layer):
        return largest(map(distance, found, results(layer, x, context, dy)))


def results(layer: Block, x: Tensor, context: Context, dy: Tensor) -> list[Tensor]:
    """What the layer adds to x, what it adds to x's gradient dy, and its weights' gradients."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        out = layer(x, context)[0]
    dx, *gradients = torch.autograd.grad(out, [x, *layer.parameters()], dy)
    return [out.detach() - x.detach(), dx - dy, *gradients]


@contextmanager
def given(model: nn.Module, choices: Sequence[Tensor]) -> Iterator[None]:
    """Inside, each router of a model in training chooses these experts, (N, K) a layer, for the rows that they are of."""
    routers = model.routers()
    before = [gate.assign for gate in routers]
    for gate, chosen in zip(routers, choices, strict=True):
        gate.assign = lambda gate, preference, chosen=chosen: (chosen, None)
    try:
        yield
    finally:
        for gate, assign in zip(routers, before, strict=True):
            gate.assign = assign


@contextmanager
def simulated(model: nn.Module) -> Iterator[None]:
    """Inside, FP8 layers compute their recipe by simulation."""
    layers = [module for module in model.modules() if hasattr(module, "recipe")]
    before = [layer.recipe for layer in layers]
    for layer in layers:
        layer.recipe = replace(layer.recipe, engine="simulated")
    try:
        yield
    finally:
        for layer, recipe in zip(layers, before, strict=True):
            layer.recipe = recipe


def autocast(model: nn.Module) -> torch.autocast:
    """BF16 where the weights are float32."""
    weight = model.lm_head.weight
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=weight.dtype == torch.float32)


def distance(x: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of ``expected``."""
    return ((x.float() - expected.float()).norm() / expected.float().norm()).item()


def largest(values: Iterable[float]) -> float:
    """The maximum, or NaN if there is one: Python's own would lose it."""
    return torch.tensor(list(values)).max().item()
