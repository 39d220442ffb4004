"""Continuous batching: requests come and go, each step runs all that are there [Orca, OSDI 2022; V3 section 3.4].

The problem: texts end at different times. A batch that waits for its longest text leaves most rows idle, and a newcomer
waits for the batch. Here a batch lives for one step only:

    admit     the oldest waiting request, while a row and the pages for its whole text are free (paged.py)
    prefill   newcomers' prompts, a chunk of each a step, so that a long prompt does not hold up those who write
    decode    one token a row, or drafts and their verification (speculate.py), for all who write
    end       at a stop token, a stop string, the last token wanted, `cancel`, or logits that are not finite: the pages are
              free at once

A request's tokens are those that `generate` gives it alone, with its seed, but for the rounding of matrix products of other
sizes. Simplifications: first come, first served; one process; prompts do not share pages.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from minids.infer.generate import check_max_new_tokens, check_prompt, stop_tokens
from minids.infer.paged import PagedCache
from minids.infer.sampling import check_sampling, check_seed, sample
from minids.infer.speculate import Row, SpeculationStats, check_speculate, fail, step
from minids.infer.text import Decoder, TextStream, check_stop
from minids.model.transformer import Transformer

Finish = Literal["length", "stop", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """What to write. ``stop_tokens`` end the text and belong to it; ``stop`` strings end it and do not."""

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: Sequence[int] = ()
    stop: Sequence[str] = ()


@dataclass(frozen=True)
class Event:
    """What a step did to one request: new tokens, the text that became final (with a tokenizer), and how it ended."""

    id: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    finish: Finish | None = None


@dataclass
class Job:
    """A request on its way."""

    id: int
    request: Request
    prompt: list[int]
    stop_tokens: frozenset[int]
    text: TextStream | None
    place: int = -1  # its row in the cache
    read: int = 0  # prompt tokens in the cache
    row: Row | None = None  # once it writes
    tokens: list[int] = field(default_factory=list)

    @property
    def slots(self) -> int:
        """All that it can ever fill: the last new token is only read out."""
        return len(self.prompt) + self.request.max_new_tokens - 1


class Engine:
    """Runs requests over one model. `submit` and `cancel` at any time between steps; `step` does the work.

    max_rows: requests that run at once. pages, page_size: the cache, in slots of one token. speculate: drafts a step, as in
    `generate`. tokenizer: for texts and stop strings. prefill_tokens: the most tokens of one prompt read in a step.
    ``stats``: what speculation gained.
    """

    def __init__(self, model: Transformer, max_rows: int = 16, pages: int = 256, page_size: int = 64,
                 speculate: int | bool = 0, tokenizer: Decoder | None = None, prefill_tokens: int = 512):  # fmt: skip
        self.n_drafts = check_speculate(speculate, model)
        if isinstance(prefill_tokens, bool) or not isinstance(prefill_tokens, int) or prefill_tokens < 1:
            raise ValueError(f"prefill_tokens={prefill_tokens!r}: allowed is a positive integer")
        self.model, self.tokenizer, self.prefill_tokens = model, tokenizer, prefill_tokens
        weight = model.lm_head.weight
        self.cache = PagedCache(model.cfg, max_rows, pages, page_size, weight.device, weight.dtype, mtp=self.n_drafts > 0)
        self.waiting: deque[Job] = deque()
        self.running: dict[int, Job] = {}  # by place
        self.events: list[Event] = []
        self.stats = SpeculationStats()
        self.submitted = 0

    # ---- requests ------------------------------------------------------------------------------------------------
    def submit(self, request: Request) -> int:
        """Queue a request; returns its id. Raises ValueError or TypeError, before anything changes, for a request that
        `generate` would refuse, for stop strings without a tokenizer, and for one that the whole cache cannot hold."""
        cfg = self.model.cfg
        check_max_new_tokens(request.max_new_tokens)
        prompt = check_prompt("prompt", request.prompt, request.max_new_tokens, cfg.vocab_size, cfg.max_position_embeddings)
        check_sampling(request.temperature, request.top_p)
        check_seed(request.seed)
        stop, tokens = check_stop(request.stop), stop_tokens(request.stop_tokens, cfg.vocab_size, "stop_tokens")
        if stop and self.tokenizer is None:
            raise ValueError(f"stop={list(stop)} needs an Engine with a tokenizer")
        text = None if self.tokenizer is None else TextStream(self.tokenizer, stop)
        job = Job(self.submitted, request, prompt, tokens, text)
        if (need := self.cache.pages_for(job.slots)) > self.cache.pages:
            raise ValueError(f"the request can fill {job.slots} slots, {need} pages of {self.cache.page_size}: "
                             f"allowed is pages={self.cache.pages}")  # fmt: skip
        self.submitted += 1
        self.waiting.append(job)
        return job.id

    def cancel(self, id: int) -> None:
        """End a request, waiting or running; its last event says "cancelled". Raises ValueError for an id that is unknown
        or has ended."""
        for job in (*self.waiting, *self.running.values()):
            if job.id == id and type(id) is int:
                return self._end(job, "cancelled")
        known = type(id) is int and 0 <= id < self.submitted
        raise ValueError(f"id={id!r}: " + ("this request has ended" if known else "no such request was submitted"))

    @property
    def busy(self) -> bool:
        """Whether a step has something to do or to tell."""
        return bool(self.waiting or self.running or self.events)

    # ---- work ----------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Admit, prefill, decode once. Returns what happened since the last step, at most a token event and an end a
        request. Should the model raise, all running requests end with "error" first, and their pages are free."""
        try:
            self._admit()
            writing = [job for job in self.running.values() if job.row is not None]
            reading = [job for job in self.running.values() if job.row is None]
            if reading:
                self._prefill(reading)
            if writing:
                self._decode(writing)
        except BaseException:
            for job in list(self.running.values()):
                self._end(job, "error")
            raise
        events, self.events = self.events, []
        return events

    def stream(self) -> Iterator[Event]:
        """Step until nothing is left to do."""
        while self.busy:
            yield from self.step()

    def _admit(self) -> None:
        places = [place for place in range(self.cache.max_rows) if place not in self.running]
        for place in places:
            if not self.waiting or not self.cache.take(place, self.waiting[0].slots):
                return
            job = self.waiting.popleft()
            job.place, self.running[place] = place, job

    def _prefill(self, jobs: list[Job]) -> None:
        """Read the next chunk of each prompt; a prompt read to its end gives its first new token."""
        chunks = [job.prompt[job.read : job.read + self.prefill_tokens] for job in jobs]
        width, view = max(map(len, chunks)), self.cache.view([job.place for job in jobs])
        tokens_BT = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks], device=view.lengths.device)
        n_valid = torch.tensor([len(chunk) for chunk in chunks], device=view.lengths.device)
        logits_BTV = self.model(tokens_BT, cache=view, n_valid=n_valid, last_only=True, mtp=self.n_drafts > 0,
                                absorb=False).logits  # fmt: skip
        view.keep()
        for i, (job, chunk) in enumerate(zip(jobs, chunks, strict=True)):
            job.read += len(chunk)
            if job.read == len(job.prompt):
                left = view.carry[0][i : i + 1] if self.n_drafts else logits_BTV.new_empty(1, 0)
                self._begin(job, logits_BTV[i : i + 1], left)

    def _begin(self, job: Job, logits_1TV: torch.Tensor, left: torch.Tensor) -> None:
        """The prompt is read: choose the first token."""
        request, generator = job.request, torch.Generator().manual_seed(job.request.seed)
        job.row = Row(len(job.prompt), [], left, request.max_new_tokens - 1, generator, float(request.temperature),
                      float(request.top_p), self.n_drafts)  # fmt: skip
        fail(logits_1TV, [job.row])
        if not job.row.failed:
            job.row.fresh = sample(logits_1TV[:, -1], request.temperature, request.top_p, [generator]).tolist()
        self._emit(job, job.row.fresh)

    def _decode(self, jobs: list[Job]) -> None:
        view = self.cache.view([job.place for job in jobs])
        found = step(self.model, view, [job.row for job in jobs], self.stats)
        view.keep()
        for job, new in zip(jobs, found, strict=True):
            self._emit(job, new)

    def _emit(self, job: Job, new: list[int]) -> None:
        """Hand out new tokens as far as the one that ends the request."""
        tokens, text, finish = [], "", "error" if job.row.failed else None
        for token in new if finish is None else ():
            tokens.append(token)
            job.tokens.append(token)
            text += job.text.push(token) if job.text and token not in job.stop_tokens else ""
            if token in job.stop_tokens or (job.text and job.text.stopped):
                finish = "stop"
            elif len(job.tokens) == job.request.max_new_tokens:
                finish = "length"
            if finish:
                break
        if tokens:
            self.events.append(Event(job.id, tuple(tokens), text))
        if finish:
            self._end(job, finish)

    def _end(self, job: Job, finish: Finish) -> None:
        """The request's last event; its row and pages are free."""
        if job.place in self.running and self.running[job.place] is job:
            del self.running[job.place]
            self.cache.give_back(job.place, clean=finish == "error")
        else:
            self.waiting.remove(job)
        self.events.append(Event(job.id, (), job.text.flush() if job.text else "", finish))
