"""All balancing strategies by name, and those of a run put together.

    balancer = Balancer.install(model, ("bias", "sequence:alpha=1e-4"))      # what V3 does, and the default of a run
    balancer = Balancer.install(model, ("switch:alpha=0.01", "capacity:factor=1.25,priority=score"))
    balancer = Balancer.install(model, ())                                   # no balancing at all

A strategy is text, NAME or NAME:FIELD=VALUE,FIELD=VALUE, so that a command line and a JSON file can hold it. What cannot
work is refused with the reason, before any training: the bias where there is none, device losses on one device, expert
choice beside a capacity.

State: the bias is a buffer of the gate and W_noise a parameter of it. A published checkpoint stores the bias and knows
no W_noise, which inference does not need; ``Balancer.state`` gives it to the trainer to save beside the moments.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from minids.config import ModelConfig
from minids.model import assignment, auxiliary, balance
from minids.model.balance import Strategy
from minids.model.router import Gate, Routing
from minids.model.transformer import Transformer

STRATEGIES: dict[str, type[Strategy]] = {
    "bias": balance.SignBias,
    "proportional_bias": balance.ProportionalBias,
    "sequence": balance.SequenceWise,
    "batch": auxiliary.BatchWise,
    "noisy": auxiliary.NoisyTopK,
    "importance": auxiliary.ImportanceLoss,
    "load": auxiliary.LoadLoss,
    "gshard": auxiliary.GShardLoss,
    "switch": auxiliary.SwitchLoss,
    "z": auxiliary.ZLoss,
    "expert_level": auxiliary.ExpertLevel,
    "device_level": auxiliary.DeviceLevel,
    "communication": auxiliary.Communication,
    "capacity": assignment.Capacity,
    "buffer": assignment.Buffer,
    "expert_choice": assignment.ExpertChoice,
}


def parse(text: str) -> Strategy:
    """"switch:alpha=0.01" -> SwitchLoss(alpha=0.01). Raises ValueError naming the strategy, field and value."""
    name, _, rest = text.partition(":")
    if name not in STRATEGIES:
        raise ValueError(f"balance={text!r}: allowed are {', '.join(STRATEGIES)}")
    kind = STRATEGIES[name]
    known = {field.name: field for field in fields(kind)}
    values = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if key not in known or not equals:
            allowed = ", ".join(f"{key}=..." for key in known) or "no field"
            raise ValueError(f"balance={text!r}: {pair!r} is not understood, allowed for {name} is {allowed}")
        try:
            values[key] = value if known[key].type in (str, "str") else float(value)
        except ValueError:
            raise ValueError(f"balance={text!r}: {key}={value!r}, allowed is a number") from None
    return kind(**values)


def parse_all(texts: Sequence[str] | None, cfg: ModelConfig) -> tuple[Strategy, ...]:
    """Strategies of a run, each checked against the config and the others. Raises ValueError with the reason. None is what
    V3 does, bias and sequence-wise loss; where the router has no bias, the loss alone."""
    if texts is None:
        texts = ("bias", "sequence") if cfg.topk_method == "noaux_tc" else ("sequence",)
    strategies = tuple(map(parse, texts))
    kinds = [type(strategy) for strategy in strategies]
    for text, strategy in zip(texts, strategies, strict=True):
        if kinds.count(type(strategy)) > 1:
            raise ValueError(f"balance={text!r}: given twice, allowed is once")
        if reason := strategy.refusal(cfg, kinds):
            raise ValueError(f"balance={text!r} does not fit: {reason}")
    if balance.SignBias in kinds and balance.ProportionalBias in kinds:
        raise ValueError("balance: bias and proportional_bias move the same bias, allowed is one of them")
    return strategies


@dataclass
class Balancer:
    """The strategies of a run, installed in the gates of its model."""

    strategies: tuple[Strategy, ...]
    gates: list[Gate]
    cfg: ModelConfig

    @classmethod
    def install(cls, model: Transformer, texts: Sequence[str] | None = None) -> "Balancer":
        """Make ``model`` train with these strategies (``parse_all``); before its optimizer is built."""
        strategies, gates = parse_all(texts, model.cfg), model.routers()
        for gate in gates:
            for strategy in strategies:
                strategy.install(gate)
        return cls(strategies, gates, model.cfg)

    def loss(self, routings: Sequence[Routing], batch: int) -> Tensor | float:
        """Sum of all losses over all layers, 0.0 if there is none; ``batch`` sequences were routed."""
        found = (strategy.loss(routing, batch, self.cfg) for routing in routings for strategy in self.strategies)
        return sum((loss for loss in found if loss is not None), 0.0)

    def update(self, loads_LE: Tensor, gamma: float) -> None:
        """After an optimizer step that was applied; ``loads`` (L, E) int64 of the whole global batch."""
        for strategy in self.strategies:
            strategy.update(self.gates, loads_LE, gamma)

    def state(self) -> dict[str, Tensor]:
        """Tensors that a published checkpoint has no place for."""
        return {f"{layer}.{name}": parameter.detach() for layer, gate in enumerate(self.gates)
                for name, parameter in gate.named_parameters() if name != "weight"}  # fmt: skip

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``state`` returned. Raises ValueError if it is of other strategies."""
        own = self.state()
        if own.keys() != tensors.keys():
            raise ValueError(f"balancing state {sorted(tensors)} does not fit the strategies, which have {sorted(own)}")
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
