"""Speculative decoding: the MTP modules guess some tokens ahead, one pass of the model checks them all [V3 section 5.4.3].

The problem: a decoding step reads all weights to write one token. MTP depth k has learnt to predict token i+k+1, so the
modules propose drafts d_1 ... d_n, and the main model runs [t, d_1, ..., d_n] at once: its logits after d_k say what it
would have written there. The drafts it agrees with are kept, and one more token is always gained:

    draft    depth k reads (t, d_1, ..., d_k-1) and depth k-1; each depth over its own cache (mtp_cached.py)
    verify   n + 1 tokens a row in one pass, causal among themselves
    accept   greedy: while d_k is the argmax; sampling: with probability min(1, p(d_k) / q(d_k))
    then     greedy: the argmax; sampling: rejected at k, from max(0, p - q) normalised; never rejected, from the last p

The rule draws exactly from p [Leviathan et al. 2023, arXiv 2211.17192, appendix A.1]: a token v is proposed and accepted
with min(q(v), p(v)), and what is missing to p(v) is max(0, p(v) - q(v)), the residual. p and q are the distributions
after temperature and top_p. Greedy text is equal token for token; sampled text is as probable as without drafts, but not
the same text for the same seed, since more random numbers are drawn.

What is easily wrong with more than one draft. Each row accepts its own number, so rows differ in length from the first
step on, and the mask goes by each row's positions. Rejected drafts lie behind the row's length: no mask shows them and the
next tokens overwrite them, in the MTP layers' caches too, whose entries are made anew from accepted tokens and the main
model's hidden states. Only then is depth k fed as it was in training.

Shapes: B rows, T tokens, n drafts, V vocabulary, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minids.infer.sampling import draw, greedy, probabilities, uniforms
from minids.model.cache import Slots
from minids.model.mtp_cached import mtp_depth, shift
from minids.model.transformer import Transformer


@dataclass
class SpeculationStats:
    """What speculation gained, counted over all rows' verification steps. Entry k-1 of a list belongs to draft k."""

    steps: int = 0  # verifications of a row
    tokens: int = 0  # tokens that they settled
    proposed: list[int] = field(default_factory=list)  # drafts at position k
    reached: list[int] = field(default_factory=list)  # of these, with all drafts before them accepted
    accepted: list[int] = field(default_factory=list)  # of those, accepted themselves

    def count(self, proposed: int, accepted: int) -> None:
        """One row's step: so many drafts, the first ``accepted`` of them kept, and one token more."""
        self.steps += 1
        self.tokens += accepted + 1
        reached = min(accepted + 1, proposed)
        for counts, number in ((self.proposed, proposed), (self.reached, reached), (self.accepted, accepted)):
            counts.extend([0] * (proposed - len(counts)))
            counts[:number] = [count + 1 for count in counts[:number]]

    @property
    def acceptance(self) -> list[float]:
        """Share of the drafts at position k that were kept, which needs all before them kept too."""
        return [a / p for a, p in zip(self.accepted, self.proposed, strict=True)]

    @property
    def conditional_acceptance(self) -> list[float]:
        """The same among the steps that kept all drafts before k. V3's 85-90% is the figure of k = 1, where both agree."""
        return [a / r if r else float("nan") for a, r in zip(self.accepted, self.reached, strict=True)]

    @property
    def tokens_per_step(self) -> float:
        """1 + the expected number of accepted drafts."""
        return self.tokens / self.steps if self.steps else float("nan")

    def __str__(self) -> str:
        shares = ", ".join(f"{share:.1%}" for share in self.acceptance) or "no drafts"
        return f"acceptance by position {shares}; {self.tokens_per_step:.2f} tokens a step ({self.steps} steps)"


@dataclass
class Row:
    """One text in progress. ``fresh``: its newest tokens, which no MTP module has read; the last of them is not in the
    main cache either. ``left`` (len(fresh), D): what depth 1 reads beside them, h^0 one token to the left of each."""

    length: int  # tokens in the main cache
    fresh: list[int]
    left: Tensor
    remaining: int  # tokens still wanted
    generator: torch.Generator
    temperature: float
    top_p: float
    n_drafts: int
    failed: bool = False

    @property
    def drafts_now(self) -> int:
        """Drafts worth making: with the token that is always gained, no more than are wanted. It never grows, so that an
        MTP module left out of a step is not needed later."""
        return max(0, min(self.n_drafts, self.remaining - 1))


@dataclass
class Drafts:
    """Proposals for B rows: ``tokens[b]``, as many as the row wanted; ``q`` (B, n, V) for sampled rows, else None."""

    tokens: list[list[int]]
    q_BnV: Tensor | None


def check_speculate(speculate: int | bool | None, model: Transformer) -> int:
    """How many drafts a step: True is all that the MTP modules can make. Raises TypeError or ValueError."""
    depths = len(model.mtp_modules)
    if speculate is None or speculate is False:
        return 0
    if not isinstance(speculate, int):
        raise TypeError(f"speculate must be an integer or a bool, got {speculate!r}")
    if speculate is True:
        speculate = max(depths, 1)
    if not 0 <= speculate <= depths:
        raise ValueError(f"speculate={speculate}: allowed is 0 to {depths}, one draft for each of this model's "
                         f"{depths} MTP modules (num_nextn_predict_layers)")  # fmt: skip
    return speculate


def write(model: Transformer, cache: Slots, rows: Sequence[Row], emit: Callable[[int, int], bool],
          stats: SpeculationStats | None = None) -> None:  # fmt: skip
    """Continue all rows of a cache to their end. Each knows its first new token, which was emitted already; those with
    ``remaining`` 0 are done. ``emit(row, token)`` takes a row's next token and returns whether it was the last."""
    live = list(range(len(rows)))
    while any(row.remaining for row in rows):
        going = [place for place, row in enumerate(live) if rows[row].remaining]
        if len(going) < len(live):
            cache.select(torch.tensor(going, device=cache.lengths.device))
            live = [live[place] for place in going]
        for row, new in zip(live, step(model, cache, [rows[row] for row in live], stats), strict=True):
            if rows[row].failed:
                raise FloatingPointError(f"the model's logits are not finite (NaN or infinity) in row {row}, at its token "
                                         f"{rows[row].length + 1}")  # fmt: skip
            if any(emit(row, token) for token in new):  # as far as the first that ends the row
                rows[row].remaining = 0


def step(model: Transformer, cache: Slots, rows: Sequence[Row], stats: SpeculationStats | None = None) -> list[list[int]]:
    """Draft, verify, accept: each row's new tokens, at least one; ``rows`` and the cache move on. A row whose logits are
    not finite gets none, and ``failed``; the others do not notice."""
    drafts = propose(model, cache, rows)
    fed = [[row.fresh[-1], *tokens] for row, tokens in zip(rows, drafts.tokens, strict=True)]
    out = model(torch.tensor(pad(fed, max(map(len, fed))), device=cache.lengths.device), cache=cache)
    fail(out.logits, rows)
    found = settle(out.logits, rows, drafts)
    for place, (row, new) in enumerate(zip(rows, found, strict=True)):
        if row.failed:
            new.clear()
            continue
        row.fresh, row.left = new, out.mtp_input[place, : len(new)]
        row.length += len(new)
        row.remaining -= len(new)
    cache.set_lengths([row.length for row in rows])
    if stats is not None:
        for tokens, new in zip(drafts.tokens, found, strict=True):
            if new:
                stats.count(len(tokens), len(new) - 1)
    return found


def fail(logits_BTV: Tensor, rows: Sequence[Row]) -> None:
    """Mark the rows with a NaN or infinity, and put zeros in place of their logits."""
    sums_B = logits_BTV.flatten(1).sum(1, dtype=torch.float32)  # one pass; a sum is finite only if all its terms are
    if not torch.isfinite(sums_B.sum()):
        for place in (~torch.isfinite(sums_B)).nonzero().flatten().tolist():
            rows[place].failed, logits_BTV[place] = True, 0


def propose(model: Transformer, cache: Slots, rows: Sequence[Row]) -> Drafts:
    """Run the MTP modules over each row's fresh tokens, and on over its drafts."""
    wanted, counts = [row.drafts_now for row in rows], [len(row.fresh) for row in rows]
    drafts, q = Drafts([[] for _ in rows], None), []
    if not any(wanted):
        return drafts
    device, index = cache.lengths.device, torch.arange(len(rows), device=cache.lengths.device)
    start = [row.length + 1 - count for row, count in zip(rows, counts, strict=True)]  # the slot of a row's first
    start_B, counts_B = torch.tensor(start, device=device), torch.tensor(counts, device=device)
    left_BTD = pad_sequence([row.left for row in rows], batch_first=True)
    for depth in range(1, max(wanted) + 1):
        texts = [row.fresh + drafted for row, drafted in zip(rows, drafts.tokens, strict=True)]
        tokens_BT = torch.tensor(pad(texts, left_BTD.shape[1]), device=device)
        end = max(first + len(text) for first, text in zip(start, texts, strict=True))
        hidden_BTD, normed_BTD, _ = mtp_depth(model, depth, cache, tokens_BT, left_BTD, start_B, end, absorb=True)
        logits_BV = model.lm_head(normed_BTD[index, counts_B + depth - 2])  # after the row's last token or draft
        q.append(choose(logits_BV, rows, wanted, depth, drafts.tokens))
        if depth < max(wanted):
            left_BTD = shift(cache.carry[depth], hidden_BTD)
            cache.carry[depth] = left_BTD[index, counts_B]  # what the next fresh token will find on its left
    drafts.q_BnV = torch.stack(q, dim=1) if q[0] is not None else None
    return drafts


def choose(logits_BV: Tensor, rows: Sequence[Row], wanted: list[int], depth: int, tokens: list[list[int]]) -> Tensor | None:
    """Add draft ``depth`` to the rows that want it: the argmax, or drawn from q by the row's own generator. Returns q
    (B, V), None if all rows are greedy."""
    best, q_BV = greedy(logits_BV).tolist(), None
    for members, temperature, top_p in alike(rows):
        if temperature == 0:
            for row in members:
                if depth <= wanted[row]:
                    tokens[row].append(best[row])
            continue
        q_BV = torch.zeros_like(logits_BV, dtype=torch.float32) if q_BV is None else q_BV
        logits = torch.nan_to_num(at(logits_BV, members), 0.0, 0.0, 0.0)  # a draft may be anything: the model judges it
        q_BV[members] = probabilities(logits, temperature, top_p)
        drawing = [row for row in members if depth <= wanted[row]]
        if drawing:
            drawn = draw(q_BV[drawing], uniforms([rows[row].generator for row in drawing])).tolist()
            for row, token in zip(drawing, drawn, strict=True):
                tokens[row].append(token)
    return q_BV


def settle(logits_BTV: Tensor, rows: Sequence[Row], drafts: Drafts) -> list[list[int]]:
    """Each row's accepted drafts and the one token more. ``logits`` (B, n + 1, V) are the main model's."""
    found: list[list[int]] = [[] for _ in rows]
    for members, temperature, top_p in alike(rows):
        if temperature == 0:
            best = greedy(at(logits_BTV, members)).tolist()
            new = [accept_greedy(row_best, drafts.tokens[row]) for row, row_best in zip(members, best, strict=True)]
        else:
            p_BTV = probabilities(at(logits_BTV, members), temperature, top_p)
            q_BnV = at(drafts.q_BnV, members) if drafts.q_BnV is not None else p_BTV[:, :0]
            tokens = [drafts.tokens[row] for row in members]
            # As many numbers as the row has drafts, and one: a row's draws never depend on the other rows.
            u = [torch.rand(len(drafts.tokens[row]) + 1, generator=rows[row].generator, dtype=torch.float64)
                 for row in members]  # fmt: skip
            new = accept(p_BTV, q_BnV, tokens, u)
        for row, tokens in zip(members, new, strict=True):
            found[row] = tokens
    return found


def accept_greedy(best: list[int], drafts: list[int]) -> list[int]:
    """Drafts as far as they are what the model would have written, ``best``, and its token after them."""
    agreed = 0
    while agreed < len(drafts) and drafts[agreed] == best[agreed]:
        agreed += 1
    return best[: agreed + 1]


def accept(p_BTV: Tensor, q_BnV: Tensor, drafts: list[list[int]], u: list[Tensor]) -> list[list[int]]:
    """The rejection rule: each row's accepted drafts and the token after them.

    p (B, n + 1, V), q (B, n, V): the model's and the drafts' distributions at each position. Row b has proposed
    ``drafts[b]``, up to n tokens, and brings u[b], one float64 uniform in [0, 1) a draft and one for its last token.
    """
    device, n = p_BTV.device, q_BnV.shape[1]
    drafts_Bn = torch.tensor(pad(drafts, n), dtype=torch.int64, device=device).view(len(drafts), n)
    u_Bn = torch.stack([F.pad(row[:-1], (0, n + 1 - len(row))) for row in u]).to(device)
    p_Bn, q_Bn = (x[:, :n].gather(-1, drafts_Bn.unsqueeze(-1)).squeeze(-1).double() for x in (p_BTV, q_BnV))
    proposed = torch.arange(n, device=device) < torch.tensor([[len(row)] for row in drafts], device=device)
    kept_B = ((u_Bn * q_Bn < p_Bn) & proposed).long().cumprod(1).sum(1)  # u < p / q, up to the first that is not
    index, counts = torch.arange(len(drafts), device=device), kept_B.tolist()
    rest_BV = p_BTV[index, kept_B]
    for row, (count, tokens) in enumerate(zip(counts, drafts, strict=True)):
        if count < len(tokens):
            residual_V = (p_BTV[row, count] - q_BnV[row, count]).clamp_min(0)
            rest_BV[row] = residual_V if residual_V.any() else rest_BV[row]  # all 0: p = q but for rounding
    last = draw(rest_BV, torch.stack([row[-1] for row in u])).tolist()
    return [[*tokens[:count], token] for tokens, count, token in zip(drafts, counts, last, strict=True)]


def alike(rows: Sequence[Row]) -> list[tuple[list[int], float, float]]:
    """Places of the rows that share temperature and top_p: (places, temperature, top_p)."""
    groups: dict[tuple[float, float], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault((row.temperature, row.top_p if row.temperature else 1.0), []).append(place)
    return [(places, *knobs) for knobs, places in groups.items()]


def at(x_B: Tensor, places: list[int]) -> Tensor:
    """The rows at ``places``, in order; all of them without a copy."""
    return x_B if len(places) == len(x_B) else x_B[places]


def pad(texts: Sequence[list[int]], width: int) -> list[list[int]]:
    """Texts filled with token 0 on the right; what runs there is never attended."""
    return [text + [0] * (width - len(text)) for text in texts]
