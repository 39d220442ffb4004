"""Byte-level BPE (V3 section 4.1), trained here or loaded from a published tokenizer.json.

BPE starts from the 256 bytes and adds one token at a time: the pair of adjacent tokens that is most frequent in the
corpus. Since every byte is a token, every text can be encoded and decode(encode(text)) == text, whatever the script.
Merges never cross the pieces that `PIECES` cuts a text into.

V3's pre-tokenizer lets punctuation and the line breaks after it share a token, as `PIECES` does. The report names the
price, token boundary bias: a prompt that ends in `)` without the line break was never seen in training, where `)` +
newline is one token. V3 therefore splits a random share of such combined tokens during training; `split_combined`
does it (the report gives no rate; a rate of 0, the default everywhere here, is off).

Special tokens are written as DeepSeek writes them (full-width bars, U+2581 for spaces) and are only ever placed by
id. Text that contains the spelling of one, as the sources of any tokenizer do, is encoded as the characters it is
made of.

Simplifications: one regular expression for all scripts; bos and eos are ids 0 and 1 as in V3, but the FIM ids follow
them directly (V3 keeps them at 128800 to 128802).
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .cache import write_atomically

# Role -> spellings in published tokenizers, DeepSeek's first. Families that name FIM parts by what follows
# (fim_prefix, ...) fill the same three places: before the prefix, before the suffix, before the middle.
SPECIAL_NAMES = {
    "bos": ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>", "<|endoftext|>"),
    "eos": ("<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>"),
    "fim_begin": ("<｜fim▁begin｜>", "<|fim_begin|>", "<|fim_prefix|>", "<fim_prefix>"),
    "fim_hole": ("<｜fim▁hole｜>", "<|fim_hole|>", "<|fim_suffix|>", "<fim_suffix>"),
    "fim_end": ("<｜fim▁end｜>", "<|fim_end|>", "<|fim_middle|>", "<fim_middle>"),
}
MIN_VOCAB_SIZE = 256 + len(SPECIAL_NAMES)

PIECES = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",  # a word, with the one space or sign before it
        r"\p{N}{1,3}",  # digits in groups of three at most
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation, with the line breaks after it
        r"\s*[\r\n]+",  # empty lines
        r"\s+(?!\S)",  # indentation, but for the one space that goes with the next word
        r"\s+",
    )
)


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained or loaded."""


class BytePairTokenizer:
    """A thin wrapper over `tokenizers.Tokenizer` that keeps text and special tokens apart.

    Attributes: vocab_size (largest id + 1), bos_id, eos_id; fim_begin_id, fim_hole_id, fim_end_id (None where a
    published tokenizer has no FIM tokens); backend, the `tokenizers.Tokenizer` itself (for `decoders.DecodeStream`,
    say).
    """

    def __init__(self, backend: Tokenizer):
        self.backend = backend
        self._plain = _blind_to_control_tokens(backend)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        ids = {role: _find_id(backend, role) for role in SPECIAL_NAMES}
        self.bos_id, self.eos_id = ids["bos"], ids["eos"]
        self.fim_begin_id, self.fim_hole_id, self.fim_end_id = ids["fim_begin"], ids["fim_hole"], ids["fim_end"]

    @property
    def has_fim(self) -> bool:
        return None not in (self.fim_begin_id, self.fim_hole_id, self.fim_end_id)

    def encode(self, text: str) -> list[int]:
        """Text to ids; no bos or eos is added and no control token ever comes out."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """As `encode`, for many texts at once on all cores."""
        with all_cores():
            return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, tokens: Iterable[int], skip_special: bool = False) -> str:
        """Ids to text. Special tokens are spelled out unless `skip_special`; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode([int(token) for token in tokens], skip_special_tokens=skip_special)

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, the format that `transformers` and `tokenizers` load; atomically."""
        text = self.backend.to_str(pretty=True)
        write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> "BytePairTokenizer":
        """Read a tokenizer.json, or the one in a folder. TokenizerError if missing, broken or without bos or eos."""
        path = Path(path).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise TokenizerError(
                f"tokenizer={str(path)!r}: no such file; a tokenizer.json, or a folder with one, is expected"
            )
        try:
            backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(f"tokenizer={str(path)!r}: not a tokenizer.json ({error})") from None
        try:
            return cls(backend)
        except TokenizerError as error:
            raise TokenizerError(f"tokenizer={str(path)!r}: {error}") from None


def train_tokenizer(texts: Iterable[str], vocab_size: int, progress: bool = False) -> BytePairTokenizer:
    """Train byte-level BPE on texts. The result does not depend on their order.

    The vocabulary has `vocab_size` tokens, or fewer when no pair that occurs twice is left to merge (a very small
    corpus).
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise TokenizerError(f"vocab_size={vocab_size}: at least {MIN_VOCAB_SIZE} (256 bytes and the special tokens)")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=progress,
        special_tokens=[names[0] for names in SPECIAL_NAMES.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    with all_cores():
        backend.train_from_iterator(texts, trainer=trainer)
    return BytePairTokenizer(backend)


def combined_tokens(tokenizer: BytePairTokenizer) -> dict[int, list[int]]:
    """Tokens that join punctuation and line breaks -> the ids of the two parts, e.g. `)\\n` -> [`)`, `\\n`]."""
    table = {}
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token])
        sign = text.rstrip("\r\n")
        if sign.strip() and sign != text and "\ufffd" not in text:
            table[token] = tokenizer.encode(sign) + tokenizer.encode(text[len(sign) :])
    return table


def split_combined(tokens: list[int], table: dict[int, list[int]], rate: float, generator: Random) -> list[int]:
    """Replace each token of `table` by its parts with probability `rate`. The decoded text stays the same."""
    result: list[int] = []
    for token in tokens:
        result.extend(table[token] if token in table and generator.random() < rate else (token,))
    return result


@contextmanager
def all_cores() -> Iterator[None]:
    """Let `tokenizers` use threads inside this block only.

    Afterwards threads are off: a process that forks later would otherwise print a warning, or hang in the child.
    A user's own TOKENIZERS_PARALLELISM is respected.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ.setdefault(name, "true")
    try:
        yield
    finally:
        os.environ[name] = before or "false"


def _find_id(backend: Tokenizer, role: str) -> int | None:
    added = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
    for name in SPECIAL_NAMES[role]:
        if name in added:
            return added[name]
    if role in ("bos", "eos"):
        raise TokenizerError(f"no {role} token; one of these is expected: {' '.join(SPECIAL_NAMES[role])}")
    return None


def _is_control(token: dict) -> bool:
    # Published files mark some control tokens (DeepSeek's FIM and role tokens) as ordinary ones; their spelling gives
    # them away.
    spelling = token["content"]
    named = any(spelling in names for names in SPECIAL_NAMES.values())
    return token["special"] or named or (spelling[:2] in ("<｜", "<|") and spelling[-2:] in ("｜>", "|>"))


def _blind_to_control_tokens(backend: Tokenizer) -> Tokenizer:
    description = json.loads(backend.to_str())
    for token in description["added_tokens"]:  # they stay in the list, or the ids of those after them would shift
        token["special"] = _is_control(token)
    plain = Tokenizer.from_str(json.dumps(description))
    plain.encode_special_tokens = True  # as text: the library's name for "do not look for special tokens"
    return plain
