"""Generation: a batch of prompts in, their continuations out, with every past token kept as one latent vector.

The problem. Token t+1 depends on all tokens before it, so writing n tokens by running the whole text each time costs
O(n^2) forwards of a token. MLA keeps, per token and layer, only the latent c^KV and the shared rotated key k^R (576
numbers in V3), and a step then runs one token:

    prefill   all prompts at once, naive attention (compute-bound: many queries share each expanded key)
    decode    one token a row and step, absorbed attention (byte-bound: the latent is read, never expanded)

Prompts of different lengths share a batch by right padding: row b's tokens take positions 0 .. n_valid[b]-1, padding is
never attended and the next token overwrites it. A row's text is therefore the one it would have alone: rows share
weights, never values.

Simplifications: all prompts start together and the cache is one contiguous block a row; engine.py and paged.py do without
both. Rows that finish early run on unheeded until half of the batch has finished, then the batch is compacted: each copy
of the cache is at most half the one before, so that all copies together cost less than one full cache.

Shapes: B batch rows, T prompt tokens, V vocabulary.
Source: DeepSeek-V3, section 2.1.1 (what is cached); DeepSeek-V2, appendix C (absorption).
"""

from collections.abc import Callable, Iterable, Sequence
from operator import index

import torch
from torch import Tensor

from minids.infer.sampling import check_finite, check_sampling, row_generators, sample
from minids.infer.speculate import Row, SpeculationStats, check_speculate, write
from minids.model.cache import LatentCache
from minids.model.transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    eos_token_id: int | Iterable[int] | None = None,
    on_token: Callable[[int, int], object] | None = None,
    speculate: int | bool = 0,
    stats: SpeculationStats | None = None,
) -> list[list[int]]:
    """Continue each prompt by up to `max_new_tokens` tokens; returns each one's new tokens, a final eos included.

    prompts: token lists of any lengths >= 1. temperature 0 is greedy, else see `minids.infer.sampling`. seed: one
    integer s, and row r then draws from its own generator seeded s + r; or one a prompt. eos_token_id: token or tokens
    that end a row, None for none. on_token(row, token) is called as each token is chosen; True ends the row there. The
    result for a prompt (with its seed) does not depend on the other prompts, up to the rounding of matrix products of
    different sizes.

    speculate: drafts a step by the MTP modules, 0 to as many as there are, True for all (speculate.py). Greedy text is the
    same; sampled text is distributed the same. stats, an empty `SpeculationStats`, is filled with what they gained.

    Raises ValueError or TypeError before any work for an empty prompt, a token outside the vocabulary, more tokens than
    max_position_embeddings, or impossible knobs; FloatingPointError if the model's logits are not finite.
    """
    prompts = check_prompts(prompts, max_new_tokens, model.cfg.vocab_size, model.cfg.max_position_embeddings)
    check_sampling(temperature, top_p)
    generators = row_generators(row_seeds(seed, len(prompts)))
    stop = stop_tokens(eos_token_id, model.cfg.vocab_size)
    n_drafts = check_speculate(speculate, model)
    outputs: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return outputs

    def emit(row: int, token: int) -> bool:
        outputs[row].append(token)
        ended = on_token is not None and on_token(row, token) is True
        return ended or token in stop or len(outputs[row]) == max_new_tokens

    logits_BV, cache = prefill(model, prompts, max_new_tokens, mtp=n_drafts > 0)
    check_finite(logits_BV, "at new token 0")
    tokens = sample(logits_BV, temperature, top_p, generators)
    done = [emit(row, token) for row, token in enumerate(tokens.tolist())]
    if n_drafts:
        rows = [Row(len(prompt), [token], cache.carry[0][row : row + 1], 0 if done[row] else max_new_tokens - 1,
                    generators[row], temperature, top_p, n_drafts)
                for row, (prompt, token) in enumerate(zip(prompts, tokens.tolist(), strict=True))]  # fmt: skip
        write(model, cache, rows, emit, stats)
    else:
        decode(model, cache, tokens, done, lambda logits, slots: sample(
            logits, temperature, top_p, [generators[row] for row in slots]), emit)  # fmt: skip
    return outputs


def decode(model: Transformer, cache: LatentCache, tokens_B: Tensor, done: list[bool],
           choose: Callable[[Tensor, list[int]], Tensor], emit: Callable[[int, int], bool]) -> None:  # fmt: skip
    """One token a row and step until all are done, from each row's first new token. ``choose(logits, rows)`` -> tokens;
    ``emit(row, token)`` takes a row's token and returns whether it was the last."""
    slots, step = list(range(len(done))), 0  # slots: place in the batch -> row
    while not all(done):
        slots, tokens_B = compact(slots, done, tokens_B, cache)
        logits_BV, step = model(tokens_B.unsqueeze(1), cache=cache, last_only=True).logits[:, 0], step + 1
        check_finite(logits_BV, f"at new token {step}")
        tokens_B = choose(logits_BV, slots)
        for row, token in zip(slots, tokens_B.tolist(), strict=True):
            done[row] = done[row] or emit(row, token)


def prefill(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int,
            mtp: bool = False) -> tuple[Tensor, LatentCache]:  # fmt: skip
    """Run all prompts, right-padded, into a new cache: (logits (B, V) after each prompt's last token, the cache).

    The cache has room for every token that is ever fed: the last new token is only read out. mtp: run the MTP modules too.
    """
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    tokens_BT = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    n_valid = None if min(lengths) == longest else torch.tensor(lengths, device=device)
    cache = LatentCache(model.cfg, batch=len(prompts), max_length=longest + max_new_tokens - 1, device=device,
                        dtype=dtype, mtp=mtp)  # fmt: skip
    return model(tokens_BT, cache=cache, n_valid=n_valid, last_only=True, mtp=mtp).logits[:, 0], cache


def compact(slots: list[int], done: list[bool], tokens_B: Tensor, cache: LatentCache) -> tuple[list[int], Tensor]:
    """Drop finished rows once they are half of the batch: the slots and tokens that stay; the cache is changed in place."""
    keep = [slot for slot, row in enumerate(slots) if not done[row]]
    if 2 * len(keep) > len(slots):
        return slots, tokens_B
    keep_B = torch.tensor(keep, device=tokens_B.device)
    cache.select(keep_B)
    return [slots[slot] for slot in keep], tokens_B[keep_B]


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, vocab_size: int, limit: int) -> list[list[int]]:
    """The prompts as lists of plain integers. Raises if one is empty, too long, or outside the vocabulary."""
    check_max_new_tokens(max_new_tokens)
    return [check_prompt(f"prompts[{row}]", prompt, max_new_tokens, vocab_size, limit)
            for row, prompt in enumerate(prompts)]  # fmt: skip


def check_max_new_tokens(max_new_tokens: int) -> None:
    """Raises TypeError or ValueError unless it is a positive integer."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        raise TypeError(f"max_new_tokens must be an integer, got {max_new_tokens!r}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


def check_prompt(name: str, prompt: Sequence[int], max_new_tokens: int, vocab_size: int, limit: int) -> list[int]:
    """One prompt of `check_prompts`, which errors call ``name``."""
    try:
        tokens = [index(token) for token in prompt]
    except TypeError:
        raise TypeError(f"{name} must be a sequence of token ids, got {prompt!r}") from None
    if not tokens:
        raise ValueError(f"{name} is empty; a prompt needs at least one token (for example the bos token)")
    for position, token in enumerate(tokens):
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name}[{position}] is token {token}; allowed are 0 to {vocab_size - 1} (vocab_size)")
    if len(tokens) + max_new_tokens > limit:
        raise ValueError(
            f"{name} has {len(tokens)} tokens; with max_new_tokens={max_new_tokens} that is "
            f"{len(tokens) + max_new_tokens}, but max_position_embeddings is {limit}"
        )
    return tokens


def row_seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    """One seed a row: s, s+1, ... for an integer, else the given ones, which must be as many as the rows."""
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != rows:
            raise ValueError(f"seed must be one integer or one a prompt: got {len(seed)} seeds for {rows} prompts")
        return list(seed)
    if isinstance(seed, bool) or not isinstance(seed, int):
        return [seed]  # which is refused as it stands
    return [seed + row for row in range(rows)]


def stop_tokens(tokens: int | Iterable[int] | None, vocab_size: int, name: str = "eos_token_id") -> frozenset[int]:
    """The set of tokens that end a row. Raises TypeError for what is no token, ValueError for one outside the vocabulary,
    which could never be reached; errors call them ``name``."""
    if tokens is None:
        return frozenset()
    try:
        stop = frozenset(index(token) for token in ([tokens] if isinstance(tokens, int) else tokens))
    except TypeError:
        raise TypeError(f"{name} must be one or several token ids, got {tokens!r}") from None
    for token in sorted(stop):
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name} must be in 0 to {vocab_size - 1} (vocab_size), got {token}")
    return stop
