"""From a stream of tokens to text: whole characters only, and an end at stop strings.

Two problems. Tokens of a byte-level BPE are bytes, and a character may span several of them (an emoji has four bytes): a
token's text is given out only as far as its characters are complete. And a stop string may span several tokens too: text
that could be its beginning is held back until the next tokens decide.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # what decoding puts in place of bytes that are no (complete) character


class Decoder(Protocol):
    """All that is asked of a tokenizer here."""

    def decode(self, tokens: list[int]) -> str: ...


def check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    """The stop strings as a tuple. Raises TypeError or ValueError for what is no string, or empty."""
    if isinstance(stop, str) or not isinstance(stop, Iterable):
        raise TypeError(f"stop must be a sequence of strings, got {stop!r}")
    stop = tuple(stop)  # once: an iterator can be read a single time
    if not all(isinstance(text, str) for text in stop):
        raise TypeError(f"stop must be a sequence of strings, got {stop!r}")
    if not all(stop):
        raise ValueError(f"stop must hold no empty string, which every text contains: got {list(stop)!r}")
    return stop


class TextStream:
    """Turns a stream of tokens into pieces of text whose concatenation is the text of all tokens.

    A byte sequence that is still incomplete decodes to one U+FFFD at the end; it is held back until the next tokens
    complete it, or until `flush`. All earlier text is final: bytes that follow cannot change characters before the last
    one. (`tokenizers.decoders.DecodeStream` has no flush, and loses or refuses bytes that never become a character.)

    With ``stop`` strings the text ends before the first of them that appears; ``stopped`` says that one did.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, check_stop(stop)
        self.pending: list[int] = []  # tokens since the last point where the text was complete
        self.printed = 0  # characters of their text that were taken already
        self.held = ""  # complete text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Add one token; returns the text that became final, possibly none."""
        self.pending.append(token)
        text = self.tokenizer.decode(self.pending)
        final = text.removesuffix(REPLACEMENT)
        piece = final[self.printed :]
        self.printed = len(final)
        if final == text:
            self.pending, self.printed = [], 0
        return self._release(piece)

    def flush(self) -> str:
        """The text held back, with U+FFFD for what never became a character."""
        piece = self.tokenizer.decode(self.pending)[self.printed :] if self.pending else ""
        self.pending, self.printed = [], 0
        piece, self.held = self._release(piece) + self.held, ""
        return piece

    def _release(self, piece: str) -> str:
        """What of the text held and ``piece`` can go out: up to a stop string, or to what may become one."""
        if self.stopped:
            return ""
        text = self.held + piece
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if places:
            self.held, self.stopped = "", True
            return text[: min(places)]
        beginnings = [stop[:length] for stop in self.stop for length in range(1, len(stop))]
        keep = max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]
