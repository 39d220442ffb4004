"""The pre-training recipe as pure functions of the tokens seen so far.

Everything that changes during V3's pre-training is a function of one number, the tokens t seen so far: no counter to
keep, nothing to restore after a crash, and the same shape at any size. With V3's figures (T = 10^12, B = 10^9):

    lr(t)          0 -> 2.2e-4 in 2000 steps, 2.2e-4 up to 10T, cosine to 2.2e-5 over 4.3T, 2.2e-5 for 333B, 7.3e-6 for 167B
    batch_size(t)  3072 -> 15360 sequences, linearly over the first 469B, then constant
    gamma(t)       0.001 (speed of the balancing bias) up to 14.3T, then 0
    mtp_lambda(t)  0.3 (weight of the MTP loss) up to 10T, then 0.1

The warm-up is the one phase the report counts in steps, and the batch grows while it lasts, so a step is not a fixed
number of tokens. Taking a step as b(t) * S tokens (S = sequence length), the steps done after t tokens are

    n(t) = integral_0^t dt' / (S b(t')) = R / (S (b1 - b0)) * ln(b(t) / b0)      while t <= R, the ramp's length

and the warm-up is exactly `peak * n(t) / 2000`. For V3 it ends after 28.07B tokens, not after the 25.17B that 2000
steps of the first batch size would take; written as linear in tokens the rate would lag by up to 3% of the peak.

Simplifications: b(t) is rounded to whole sequences when a batch is drawn, n(t) uses the unrounded line (the two agree
to a fraction of a step over V3's warm-up). The report gives no shape for the batch ramp ("gradually"): linear here.

Source: DeepSeek-V3 Technical Report (arXiv 2412.19437), section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

V3_TOTAL = 14.8e12
# The phases of V3 as shares of its tokens: what `scaled` keeps.
CONSTANT_SHARE = 10e12 / V3_TOTAL
COSINE_SHARE = 14.3e12 / V3_TOTAL
FLOOR_SHARE = (14.3e12 + 333e9) / V3_TOTAL
RAMP_SHARE = 469e9 / V3_TOTAL


@dataclass(frozen=True)
class Recipe:
    """The schedule of one run. Lengths are in tokens, batches in sequences, `warmup_steps` in optimizer steps.

    Two conventions fix the boundaries: `lr(t)` is the rate of the step that *ends* at t (so the first step is not
    wasted at rate 0, and intervals are closed on the right); `batch_size`, `gamma` and `mtp_lambda` are asked with the
    tokens seen *before* the step (intervals closed on the left).
    """

    total_tokens: int
    sequence_length: int
    batch: int  # sequences, after the ramp
    batch_start: int  # sequences, at the first step
    ramp_until: float
    peak_lr: float
    floor_lr: float  # where the cosine ends
    final_lr: float  # the last phase
    warmup_steps: float
    constant_until: float
    cosine_until: float
    floor_until: float
    gamma_value: float = 1e-3
    gamma_until: float = math.inf
    lambda_early: float = 0.3
    lambda_late: float = 0.1
    lambda_until: float = math.inf

    def __post_init__(self) -> None:
        positive = ("total_tokens", "sequence_length", "batch", "batch_start")
        for field in fields(self):
            value = getattr(self, field.name)
            low = 1 if field.name in positive else 0
            if not value >= low:  # also catches NaN
                raise ValueError(f"Recipe.{field.name} = {value!r}: must be >= {low}")
            if value == math.inf and not field.name.endswith("_until"):
                raise ValueError(f"Recipe.{field.name} = {value!r}: must be finite")
        if self.batch_start > self.batch:
            raise ValueError(f"Recipe.batch_start = {self.batch_start}: must be at most batch = {self.batch}")
        order = ("constant_until", "cosine_until", "floor_until")
        values = [getattr(self, name) for name in order]
        if values != sorted(values):
            raise ValueError(f"Recipe: {', '.join(order)} = {values}: must not decrease")
        if self.tokens_after(self.warmup_steps) > self.constant_until:
            raise ValueError(f"Recipe.warmup_steps = {self.warmup_steps}: the warm-up ends after "
                             f"{self.tokens_after(self.warmup_steps):.4g} tokens, must be by constant_until = "
                             f"{self.constant_until:.4g}; lower warmup_steps or raise the token budget")

    @classmethod
    def v3(cls) -> Recipe:
        """DeepSeek-V3's own numbers."""
        return cls(total_tokens=14_800_000_000_000, sequence_length=4096, batch=15360, batch_start=3072,
                   ramp_until=469e9, peak_lr=2.2e-4, floor_lr=2.2e-5, final_lr=7.3e-6, warmup_steps=2000,
                   constant_until=10e12, cosine_until=14.3e12, floor_until=14.633e12,
                   gamma_value=1e-3, gamma_until=14.3e12, lambda_early=0.3, lambda_late=0.1, lambda_until=10e12)

    @classmethod
    def scaled(cls, total_tokens: int, *, sequence_length: int = 256, batch: int = 16, batch_start: int | None = None,
               peak_lr: float = 3e-3, warmup_steps: float = 20, gamma: float = 1e-3, lambda_early: float = 0.3,
               lambda_late: float = 0.1) -> Recipe:
        """V3's shape on `total_tokens`: every phase keeps its share of the tokens, and the rates their ratios.

        `batch_start` defaults to batch / 5 as in V3. `warmup_steps` stays a number of steps: a share of 0.8% of a toy
        run would be two or three steps, too few for Adam's second moment to mean anything.
        """
        return cls(total_tokens=total_tokens, sequence_length=sequence_length, batch=batch,
                   batch_start=max(1, round(batch / 5)) if batch_start is None else batch_start,
                   ramp_until=RAMP_SHARE * total_tokens, peak_lr=peak_lr, floor_lr=0.1 * peak_lr,
                   final_lr=peak_lr * 7.3e-6 / 2.2e-4, warmup_steps=warmup_steps,
                   constant_until=CONSTANT_SHARE * total_tokens, cosine_until=COSINE_SHARE * total_tokens,
                   floor_until=FLOOR_SHARE * total_tokens, gamma_value=gamma,
                   gamma_until=COSINE_SHARE * total_tokens, lambda_early=lambda_early, lambda_late=lambda_late,
                   lambda_until=CONSTANT_SHARE * total_tokens)

    def lr(self, tokens: float) -> float:
        """Learning rate of the step that ends at `tokens`."""
        steps = self.steps(tokens)
        if steps < self.warmup_steps:
            return self.peak_lr * steps / self.warmup_steps
        if tokens <= self.constant_until:
            return self.peak_lr
        if tokens <= self.cosine_until:
            done = (tokens - self.constant_until) / (self.cosine_until - self.constant_until)
            return self.floor_lr + (self.peak_lr - self.floor_lr) * 0.5 * (1 + math.cos(math.pi * done))
        return self.floor_lr if tokens <= self.floor_until else self.final_lr

    def _ramped_batch(self, tokens: float) -> float:
        if tokens >= self.ramp_until:
            return self.batch
        return self.batch_start + (self.batch - self.batch_start) * tokens / self.ramp_until

    def batch_size(self, tokens: float) -> int:
        """Sequences in the global batch that is drawn after `tokens`."""
        return round(self._ramped_batch(tokens))

    def gamma(self, tokens: float) -> float:
        """Step of the balancing bias after `tokens`."""
        return self.gamma_value if tokens < self.gamma_until else 0.0

    def mtp_lambda(self, tokens: float) -> float:
        """Weight of the MTP loss after `tokens`."""
        return self.lambda_early if tokens < self.lambda_until else self.lambda_late

    def steps(self, tokens: float) -> float:
        """Optimizer steps done after `tokens`: n(t) of the module docstring, a real number."""
        ramp = min(tokens, self.ramp_until)
        slope = (self.batch - self.batch_start) / self.ramp_until if self.ramp_until else 0.0
        if slope:
            n = math.log1p(slope * ramp / self.batch_start) / (self.sequence_length * slope)
        else:
            n = ramp / (self.sequence_length * self.batch_start)
        return n + (tokens - ramp) / (self.sequence_length * self.batch)

    def tokens_after(self, steps: float) -> float:
        """Tokens seen after `steps` optimizer steps: the inverse of `steps`."""
        slope = (self.batch - self.batch_start) / self.ramp_until if self.ramp_until else 0.0
        ramp_steps = self.steps(self.ramp_until)
        if steps >= ramp_steps:
            return self.ramp_until + (steps - ramp_steps) * self.sequence_length * self.batch
        if slope:
            return math.expm1(steps * self.sequence_length * slope) * self.batch_start / slope
        return steps * self.sequence_length * self.batch_start

    def next_batch(self, tokens: int) -> int:
        """Sequences of the step after `tokens`; 0 when the budget is used up, and the last batch is cut to fit it."""
        left = math.ceil((self.total_tokens - tokens) / self.sequence_length)
        return max(0, min(self.batch_size(tokens), left))

    def batches(self) -> Iterator[tuple[int, int]]:
        """(tokens before the step, sequences in the step) of every step of the run."""
        tokens = 0
        while size := self.next_batch(tokens):
            yield tokens, size
            tokens += size * self.sequence_length
