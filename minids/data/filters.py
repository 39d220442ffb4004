"""A small quality filter, all of it visible (V3 section 4.1: minimal redundancy, document quality).

Three reasons to drop a document, tested in this order, the first that applies being counted:

    binary      not text: bytes that were not UTF-8, a NUL, or more than 1% control and replacement characters
    short       fewer than `min_chars` characters once white space at both ends is taken off
    duplicate   the same text, character for character, as a document before it

Simplifications: V3's pipeline is not published; near-duplicates, language and content are not looked at here. There
is no limit on the length of a line: it would catch minified code, but a paragraph of prose is one line too.
"""

import re
from collections.abc import Iterable

from .corpus import Document

REASONS = ("binary", "short", "duplicate")
JUNK_SHARE = 0.01

# C0 and C1 controls but for tab, line feed, form feed and carriage return (sources use form feeds), and U+FFFD.
_JUNK = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufffd]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def filter_documents(documents: Iterable[Document], min_chars: int = 64) -> tuple[list[Document], dict[str, int]]:
    """Keep good documents, in their order. Returns them and how many were dropped for each of `REASONS`."""
    kept: list[Document] = []
    dropped = dict.fromkeys(REASONS, 0)
    seen: set[bytes] = set()
    for document in documents:
        if reason := _fault(document, min_chars, seen):
            dropped[reason] += 1
        else:
            seen.add(document.digest)
            kept.append(document)
    return kept, dropped


def _fault(document: Document, min_chars: int, seen: set[bytes]) -> str | None:
    if is_binary(document.text):
        return "binary"
    if len(document.text.strip()) < min_chars:
        return "short"
    return "duplicate" if document.digest in seen else None


def is_binary(text: str) -> bool:
    """Whether a text is junk: a lone surrogate (its bytes were no UTF-8), a NUL, or over 1% control characters."""
    if "\0" in text or _SURROGATE.search(text):
        return True
    return len(_JUNK.findall(text)) > JUNK_SHARE * len(text)
