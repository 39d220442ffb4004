"""From documents to full rows of tokens (V3 sections 4.1 and 4.2): split, shuffle, fill-in-the-middle, packing.

Legend: T sequence length, R rows, N tokens of a stream.

Split and shuffle. Documents are ordered by a hash of (seed, text), and validation takes whole documents until it has
its share; no document is in both.

A document becomes [bos] text [eos]. With probability `fim_rate` (V3: 0.1, at document level, before packing) a training
document is cut at two characters and written in the order prefix, suffix, middle (PSM):

    [bos] <fim_begin> prefix <fim_hole> suffix <fim_end> middle [eos]

The model still predicts left to right and learns to fill a hole from both sides. The cuts fall on characters and not
on tokens, because an editor's cursor does. The parts are encoded one by one, so prefix + middle + suffix is the text
again.

Packing. All documents of a split form one stream t_0 ... t_{N-1} without padding. Row r holds the T + 1 tokens from
r T to r T + T: inputs are the first T of them, labels the last T. Neighbouring rows share one token, the last label of
one being the first input of the next, so that each token of the stream but the first is a label exactly once. A long
document continues in the next row, where its beginning cannot be seen. The tokens after the last full row are dropped
and counted.

V3 lets attention cross documents in a row; `document_ids` are there for those who mask it. The first label after a
document's eos is the next document's bos, which is certain and costs nothing to learn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
from tqdm import tqdm

from .corpus import Document, draw
from .tokenizer import BytePairTokenizer, combined_tokens, split_combined

BATCH_CHARS = 1 << 20  # texts encoded at once; an encoding takes some hundred bytes a token until it is copied out


class PackingError(ValueError):
    """Documents that do not make the rows asked for."""


@dataclass
class Stream:
    """Encoded documents, end to end.

    tokens (N,) uint16, or uint32 for a vocabulary above 65536; starts (documents,) int64, where each document begins;
    fim_documents, how many are in PSM order.
    """

    tokens: np.ndarray
    starts: np.ndarray
    fim_documents: int


@dataclass
class PackedRows:
    """Rows of T + 1 tokens over a stream, and the order in which training reads them.

    tokens, starts: see `Stream`. sequence_length: T. seed: of the order of rows, a new one in every epoch.
    """

    tokens: np.ndarray
    starts: np.ndarray
    sequence_length: int
    seed: int = 0
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.sequence_length < 1:
            raise PackingError(f"sequence_length={self.sequence_length}: at least 1")
        if self.n_rows < 1:
            raise PackingError(
                f"{len(self.tokens)} tokens do not fill a row of sequence_length + 1 = {self.sequence_length + 1}: "
                "more text (max_bytes, for validation valid_fraction) or a smaller sequence_length"
            )

    @property
    def n_rows(self) -> int:
        return (len(self.tokens) - 1) // self.sequence_length

    @property
    def dropped_tokens(self) -> int:
        """Tokens at the end of the stream that fill no row."""
        return len(self.tokens) - 1 - self.n_rows * self.sequence_length

    def __len__(self) -> int:
        return self.n_rows

    def row(self, index: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and document ids of rows by place in the stream: index (...) -> two int64 arrays (..., T + 1)."""
        if np.size(index) and not 0 <= np.min(index) <= np.max(index) < self.n_rows:
            raise PackingError(f"row {index}: rows are 0 to {self.n_rows - 1}")
        places = np.asarray(index)[..., None] * self.sequence_length + np.arange(self.sequence_length + 1)
        document_ids = np.searchsorted(self.starts, places, side="right") - 1
        return self.tokens[places].astype(np.int64), document_ids.astype(np.int64)

    def batch(self, position: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `rows` rows after `position` rows have been read: tokens and document ids, int64 (rows, T + 1).

        A pure function of its arguments: a run that resumes needs to know one integer. Each epoch is a seeded
        permutation of all rows; a batch may end one epoch and begin the next. Document ids are unique in the whole
        stream.
        """
        if position < 0 or rows < 1:
            raise PackingError(f"position={position}, rows={rows}: position is at least 0, rows at least 1")
        places = np.arange(position, position + rows)
        epochs, steps = np.divmod(places, self.n_rows)
        index = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            index[here] = self._order(int(epoch))[steps[here]]
        return self.row(index)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # Raw bits of PCG64 are the same in every version of numpy; Generator.permutation does not promise that.
            bits = np.random.PCG64([self.seed, epoch]).random_raw(self.n_rows)
            if len(self._orders) > 1:  # a batch spans two epochs at its widest, but for toys
                self._orders.clear()
            self._orders[epoch] = np.argsort(bits, kind="stable")
        return self._orders[epoch]


def split_documents(
    documents: Sequence[Document], valid_fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Shuffle documents and split off validation: whole documents, at most `valid_fraction` of the bytes.

    A document that is too long for what is left of that share goes to training; the shortest one, if all are. Texts
    have to be distinct (`filter_documents` sees to it). Returns (train, valid).
    """
    if len(documents) < 2:
        raise PackingError(f"{len(documents)} document(s) after filtering (too short, no text, or a copy of another): "
                           "a split into train and validation needs 2")
    order = sorted(documents, key=lambda document: draw(seed, "shuffle", document.digest))
    left = valid_fraction * sum(document.n_bytes for document in documents)
    train: list[Document] = []
    valid: list[Document] = []
    for document in order:
        if document.n_bytes <= left:
            left -= document.n_bytes
            valid.append(document)
        else:
            train.append(document)
    if not valid:
        valid = [train.pop(min(range(len(train)), key=lambda i: train[i].n_bytes))]
    return train, valid


def fim_cut(document: Document, rate: float, seed: int) -> tuple[int, int] | None:
    """Where a document is cut for FIM: text[:a] prefix, text[a:b] middle, text[b:] suffix; None if it is not."""
    if draw(seed, "fim", document.digest) >= rate or len(document.text) < 2:
        return None
    cuts = [int(draw(seed, purpose, document.digest) * (len(document.text) + 1)) for purpose in ("cut 1", "cut 2")]
    return min(cuts), max(cuts)


def arrange(parts: list[list[int]], tokenizer: BytePairTokenizer) -> list[int]:
    """Ids of a document from its encoded parts: [text], or [prefix, middle, suffix] for PSM order."""
    if len(parts) == 1:
        return [tokenizer.bos_id, *parts[0], tokenizer.eos_id]
    prefix, middle, suffix = parts
    begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    return [tokenizer.bos_id, begin, *prefix, hole, *suffix, end, *middle, tokenizer.eos_id]


def encode_stream(
    documents: Sequence[Document],
    tokenizer: BytePairTokenizer,
    fim_rate: float = 0.0,
    split_rate: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> Stream:
    """Encode documents in the order given. `split_rate`: see `tokenizer.split_combined`."""
    if fim_rate and not tokenizer.has_fim:
        raise PackingError(f"fim_rate={fim_rate}: this tokenizer has no FIM tokens; set fim_rate to 0")
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    table = combined_tokens(tokenizer) if split_rate else {}
    pieces, lengths, n_fim = [np.empty(0, dtype)], [], 0
    bar = tqdm(
        total=sum(d.n_bytes for d in documents),
        unit="B",
        unit_scale=True,
        desc="encode",
        leave=False,
        disable=not progress,
    )
    for batch in _batches(documents):
        texts = [_parts(document, fim_rate, seed) for document in batch]
        encoded = iter(tokenizer.encode_batch([part for parts in texts for part in parts]))
        for document, parts in zip(batch, texts, strict=True):
            ids = arrange([next(encoded) for _ in parts], tokenizer)
            if table:
                ids = split_combined(ids, table, split_rate, Random(f"{seed}:split:{document.digest.hex()}"))
            pieces.append(np.array(ids, dtype))
            lengths.append(len(ids))
            n_fim += len(parts) == 3
            bar.update(document.n_bytes)
    bar.close()
    starts = np.cumsum([0, *lengths], dtype=np.int64)[:-1]
    return Stream(np.concatenate(pieces), starts, n_fim)


def _parts(document: Document, fim_rate: float, seed: int) -> list[str]:
    cut = fim_cut(document, fim_rate, seed)
    if cut is None:
        return [document.text]
    return [document.text[: cut[0]], document.text[cut[0] : cut[1]], document.text[cut[1] :]]


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
