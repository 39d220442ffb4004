"""Routing beside transformers': 4096 tokens to 8 of 256 experts in 4 of 8 groups, as V3 does it.

What is compared. The whole way from a token's vector to gate values and expert indices: scores, bias, groups, top-k,
normalised gates. Both routers hold the same weights and bias, and must choose the same experts with the same gates before
anything is timed. Ours also counts the load of every expert.

V3's hidden size is 7168; at that size nearly all of the time is the one product of x with the weights, the same on both
sides. It is HIDDEN here, and the rows "routing alone" leave the product out: both sides are handed the same logits.
"""

from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.bench.common import Report, interleaved, median, ratio
from minids.config import ModelConfig
from minids.model.router import Gate

TOKENS, HIDDEN = 4096, 512
TARGET = 1.0  # times transformers' speed


def contestants(hidden: int = HIDDEN, seed: int = 0) -> tuple[Gate, torch.nn.Module, Tensor]:
    """Our gate, transformers' with the same weights and bias, and the tokens (N, D)."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    torch.manual_seed(seed)
    cfg = ModelConfig.preset("v3", hidden_size=hidden)
    gate = Gate(cfg)
    gate.weight.data.normal_(0, hidden**-0.5)
    gate.e_score_correction_bias.uniform_(-0.05, 0.05)
    twin = DeepseekV3TopkRouter(DeepseekV3Config(hidden_size=hidden))
    twin.load_state_dict({"weight": gate.weight.detach(), "e_score_correction_bias": gate.e_score_correction_bias})
    return gate, twin, torch.randn(TOKENS, hidden)


def check_equal(gate: Gate, twin: torch.nn.Module, x: Tensor) -> None:
    """The same experts for every token, and gate values within 1e-6, or RuntimeError."""
    with torch.no_grad():
        ours, (_, weights, indices) = gate(x), twin(x)
    dense = [torch.zeros(len(x), gate.cfg.n_routed_experts).scatter_(1, i, w)
             for i, w in ((ours.indices, ours.weights), (indices, weights))]  # fmt: skip
    same = torch.equal(ours.indices.sort().values, indices.sort().values)
    if not (same and torch.allclose(*dense, rtol=0, atol=1e-6)):
        raise RuntimeError("the two routers differ; nothing was timed")


def inference(call: Callable[[], object]) -> Callable[[], object]:
    def timed():
        with torch.no_grad():
            call()

    return timed


def given_logits(call: Callable[[], object], logits: Tensor) -> Callable[[], object]:
    """The same call with F.linear, which both sides look up there, replaced by logits that are ready."""
    def timed():
        with patch.object(F, "linear", lambda *_: logits):
            call()

    return timed


def run(rounds: int) -> Report:
    """Forward with and without the product, and forward with backward. A round is five calls a side."""
    gate, twin, x = contestants()
    check_equal(gate, twin, x)
    with torch.no_grad():
        logits = F.linear(x, gate.weight)
    leaf, upstream = logits.clone().requires_grad_(), torch.randn(TOKENS, gate.cfg.num_experts_per_tok)

    def train(weights: Callable[[], Tensor]) -> Callable[[], object]:
        return given_logits(lambda: weights().backward(upstream), leaf)

    cases = {
        "forward": (inference(lambda: gate(x)), inference(lambda: twin(x))),
        "routing alone": tuple(inference(given_logits(call, logits)) for call in (lambda: gate(x), lambda: twin(x))),
        "routing alone, forward + backward": (train(lambda: gate(x).weights), train(lambda: twin(x)[1])),
    }
    report = Report(f"Router, {TOKENS} tokens to 8 of 256 experts in 4 of 8 groups, hidden {HIDDEN}, FP32, one thread",
                    ["what", "minids ms", "transformers ms", "x peer"], [])  # fmt: skip
    for name, sides in cases.items():
        five = {side: (lambda call=call: [call() for _ in range(5)])
                for side, call in zip(("minids", "transformers"), sides, strict=True)}  # fmt: skip
        times = interleaved(five, rounds)
        faster = ratio(times, slow="transformers", fast="minids")
        report.rows.append([name, *(median(times[side]) / 5 * 1e3 for side in five), faster])
        report.data[name] = {"ratio": faster, "target": TARGET, "seconds_of_five": times}
        if faster < TARGET:
            report.missed.append(f"{name}: {faster:.2f} times transformers, wanted {TARGET}")
    report.notes.append("x peer: median of the ratios within a round, target 1.0 in every row. Ours counts the load too.")
    return report
