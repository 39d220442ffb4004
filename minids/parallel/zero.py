"""ZeRO-1: each data rank keeps the optimizer's state of a slice of the weights [V3 section 3.2; 1910.02054].

The problem: AdamW's master weight and moments are 8 bytes a parameter in V3's formats (12 in FP32), the same on every data
rank. All ranks need all updated weights, but nobody needs more than a slice of the state, if each updates his slice alone:

    gradients    reduce-scatter:  rank r gets the sum over ranks of slice r             instead of an all-reduce
    AdamW        on slice r: elementwise, so slices are independent
    weights      all-gather of the slices                                               both together: an all-reduce's bytes

Tensors of one kind (weight decay, learning-rate factor, experts or not) are laid end to end in one flat bucket, filled up
to a multiple of the ranks, and cut into equal slices: tensors of any shapes balance. Buckets of experts are spread over the
DP / EP replicas of these experts, all others over the DP data ranks. The norm that clips is the root of the sum of squares
of all slices, each of which lies on exactly one data rank.

Why not `fully_shard` of torch: it averages gradients over its ranks, which is wrong for experts by the factor EP unless
told otherwise; and its state knows shards, where this one reads and writes what a single process would: a checkpoint can
be resumed on any number of ranks. The price: a flat copy of the gradients for a moment, and no overlap with backward.

Simplifications: a weight that never gets a gradient counts as one with gradient 0, so it decays. Writing a checkpoint
gathers the state on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minids.parallel.experts import is_expert, sum_gradients
from minids.parallel.mesh import Mesh
from minids.parallel.peers import Peers
from minids.train.optim import FULL, OptimConfig, Optimizer

MOMENT_NAMES = ("exp_avg", "exp_avg_sq")


class RankOptimizer(Optimizer):
    """AdamW of a model whose experts are spread, with the whole state on every rank: what ZeRO-1 is compared with."""

    def __init__(self, model: nn.Module, config: OptimConfig | None = None, layers: int = 1, *, mesh: Mesh):
        super().__init__(model, config, layers)
        self.mesh = mesh

    def own_gradient(self, name: str) -> Tensor:
        """What backward has left on this rank, before any sum over ranks."""
        master = self.masters[name]
        return torch.zeros_like(master) if master.grad is None else master.grad

    def step(self, lr: float, apply: bool = True) -> bool:
        """As `Optimizer.step`; all ranks call it together, and all move or none."""
        sum_gradients(self.masters.items(), self.mesh)
        return super().step(lr, apply)

    def total_norm(self) -> Tensor:
        """Of all gradients: each rank's experts are its own (replicas hold the same), all else is everywhere the same."""
        squares = [torch.zeros((), dtype=torch.float64, device=next(iter(self.masters.values())).device) for _ in "we"]
        for name, master in self.masters.items():
            squares[is_expert(name)] += torch.linalg.vector_norm(master.grad).double().square()
        return (squares[0] + self.mesh.peers["ep"].all_reduce(squares[1])).sqrt().float()


@dataclass
class Bucket:
    """Tensors end to end, cut into equal slices for ``peers``; mine is ``piece``."""

    names: list[str]
    shapes: list[torch.Size]
    peers: Peers
    piece: nn.Parameter | None = None

    @property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    @property
    def length(self) -> int:
        """Numbers in all, filled up to a multiple of the peers."""
        return -(-sum(self.sizes) // self.peers.size) * self.peers.size

    def flatten(self, tensors: list[Tensor]) -> Tensor:
        """(length,): the tensors end to end, zeros behind."""
        fill = tensors[0].new_zeros(self.length - sum(self.sizes))
        return torch.cat([*(tensor.detach().reshape(-1) for tensor in tensors), fill])

    def mine(self, tensors: list[Tensor]) -> Tensor:
        """(length / peers,): my slice of the tensors."""
        return self.flatten(tensors).chunk(self.peers.size)[self.peers.rank].clone()

    def gather(self, piece: Tensor) -> dict[str, Tensor]:
        """Name -> tensor, from everybody's slice."""
        pieces = self.peers.all_gather(piece.detach())[: sum(self.sizes)].split(self.sizes)
        return {n: flat.view(shape) for n, flat, shape in zip(self.names, pieces, self.shapes, strict=True)}


class ZeroOptimizer(Optimizer):
    """AdamW whose masters and moments are slices; otherwise as `Optimizer`. All ranks make every call together."""

    def __init__(self, model: nn.Module, config: OptimConfig | None = None, layers: int = 1, *, mesh: Mesh):
        super().__init__(model, config, layers)
        self.mesh, self.sums, self.buckets = mesh, {}, []
        names = {id(master): name for name, master in self.masters.items()}
        for group in self.adamw.param_groups:
            found: dict[Peers, Bucket] = {}
            for name in (names[id(master)] for master in group["params"]):
                peers = self.peers_of(name)
                bucket = found.setdefault(peers, Bucket([], [], peers))
                bucket.names.append(name)
                bucket.shapes.append(self.masters[name].shape)
            for bucket in found.values():
                bucket.piece = nn.Parameter(bucket.mine([self.masters[name] for name in bucket.names]))
            group["params"] = [bucket.piece for bucket in found.values()]
            self.buckets += found.values()
        self.buckets.sort(key=lambda bucket: bucket.names[0])  # all that share a bucket come to it in one common order
        self.masters = {f"slice {i}": bucket.piece for i, bucket in enumerate(self.buckets)}

    def peers_of(self, name: str) -> Peers:
        """The ranks that hold the parameter ``name``: they add up its gradient, and share its optimizer's state."""
        return self.mesh.peers["replica" if is_expert(name) else "data"]

    @property
    def owns_gradients(self) -> bool:
        return all(p.dtype in FULL for p in self.params.values())

    def accumulate(self) -> None:
        """After each backward pass: add low-precision gradients up in FP32."""
        for name, p in self.params.items():
            if p.dtype not in FULL and p.grad is not None:
                grad, p.grad = p.grad.float(), None
                self.sums[name] = grad if name not in self.sums else self.sums[name].add_(grad)

    def zero_grad(self) -> None:
        super().zero_grad()
        self.sums.clear()

    def step(self, lr: float, apply: bool = True) -> bool:
        """As `Optimizer.step`, on the slices."""
        for bucket in self.buckets:
            gradients = [self.own_gradient(name) for name in bucket.names]
            bucket.piece.grad = bucket.peers.reduce_scatter(bucket.flatten(gradients))
        return super().step(lr, apply)

    def own_gradient(self, name: str) -> Tensor:
        """What backward has left on this rank, before any sum over ranks."""
        p = self.params[name]
        found = p.grad if p.dtype in FULL else self.sums.get(name)
        return found if found is not None else torch.zeros_like(p, dtype=p.dtype if p.dtype in FULL else torch.float32)

    def total_norm(self) -> Tensor:
        norm = nn.utils.get_total_norm([bucket.piece.grad for bucket in self.buckets])
        return self.mesh.peers["world"].all_reduce(norm.double().square()).sqrt().float()

    @torch.no_grad()
    def _write_back(self) -> None:
        for bucket in self.buckets:
            for name, value in bucket.gather(bucket.piece).items():
                self.params[name].copy_(value)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """As `Optimizer.state`, of this rank's parameters whole: gathered from all slices."""
        tensors = {}
        for bucket in self.buckets:
            state = self.adamw.state[bucket.piece]
            if state:
                tensors |= {f"step/{name}": state["step"].clone() for name in bucket.names}
                for key in MOMENT_NAMES:
                    tensors |= {f"{key}/{name}": value for name, value in bucket.gather(state[key]).items()}
            low = [name for name in bucket.names if self.params[name].dtype not in FULL]
            if low:
                masters = bucket.gather(bucket.piece)
                tensors |= {f"master/{name}": masters[name] for name in low}
        return tensors, {"scale": self.scaler.scale, "good_steps": self.scaler.good_steps}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], values: dict) -> None:
        """Takes over what `state` returned, here or in one process, of this rank's parameters (experts: its slice); the
        model's own weights must have been loaded before."""
        self._check(tensors)
        for bucket in self.buckets:
            weights = [tensors.get(f"master/{name}", self.params[name]) for name in bucket.names]
            bucket.piece.copy_(bucket.mine([weight.to(bucket.piece) for weight in weights]))
            self._load_moments(bucket, tensors)
        self.scaler.scale, self.scaler.good_steps = float(values["scale"]), int(values["good_steps"])

    def _load_moments(self, bucket: Bucket, tensors: dict[str, Tensor]) -> None:
        self.adamw.state.pop(bucket.piece, None)
        steps = [tensors[f"step/{name}"] for name in bucket.names if f"step/{name}" in tensors]
        if not steps:  # of a run's first moments
            return
        device = bucket.piece.device
        at = "cpu" if self.config.moments == "bf16" else device
        state = {"step": torch.stack([step.cpu() for step in steps]).max().to(at)}
        for key in MOMENT_NAMES:
            found = [tensors.get(f"{key}/{name}") for name in bucket.names]
            whole = [torch.zeros(s, dtype=self.moments_of(n), device=device) if one is None else one.to(device)
                     for n, one, s in zip(bucket.names, found, bucket.shapes, strict=True)]  # fmt: skip
            state[key] = bucket.mine(whole)
        self.adamw.state[bucket.piece] = state

    def _check(self, tensors: dict[str, Tensor]) -> None:
        wanted = {f"master/{n}" for n, p in self.params.items() if p.dtype not in FULL}
        known = wanted | {f"{key}/{n}" for n in self.params for key in ("step", *MOMENT_NAMES)}
        missing, unknown = wanted - tensors.keys(), tensors.keys() - known
        if missing or unknown:
            raise ValueError(f"optimizer state does not fit the model: missing {sorted(missing)}, "
                             f"unexpected {sorted(unknown)}")  # fmt: skip
        for key, tensor in tensors.items():
            kind, name = key.split("/", 1)
            expected = self.moments_of(name) if kind in MOMENT_NAMES else torch.float32
            if tensor.dtype != expected or (kind != "step" and tensor.shape != self.params[name].shape):
                raise ValueError(f"optimizer state {key}: got {tensor.dtype} {tuple(tensor.shape)}, expected {expected} "
                                 f"{tuple(self.params[name].shape)} (OptimConfig.moments = {self.config.moments!r})")
