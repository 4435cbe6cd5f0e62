"""A document in parts, each of which a model's window has room for, and the part that a query is about.

A query is taught by one part: what only two parts together answer can't be taught.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxsp.data.words import words
from jaxsp.typing import Int, UserError, ceil_div

Encode = Callable[[str], Int[np.ndarray, " c"]]

MOST_CHARACTERS = 2**24
"""Longest document, in characters: some 4 million tokens, hundreds of windows. Its tokens are counted several
times, at about a megabyte a second, before anything else is done."""

OVERLAP = 8
"""A part begins about an eighth (one part in so many) of its length before the end of the one before it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A part of a document; the whole, if that fits.

    Attributes:
      start: where it begins in the document.
      end: where it ends.
      text: its text, without spaces and empty lines at its ends.
      ids: token ids ``[C]``.
    """

    start: int
    end: int
    text: str
    ids: Int[np.ndarray, " c"]

    def shared(self, span: tuple[int, int]) -> int:
        """The number of characters that it has of a stretch of the document."""
        return max(0, min(self.end, span[1]) - max(self.start, span[0]))


def check_length(document: str) -> None:
    """Refuses a document that is longer than any run can teach, before its tokens are counted.

    Args:
      document: the text.

    Raises:
      UserError: it has more than ``MOST_CHARACTERS``.

    Example:
      >>> check_length("The cable is long.")
    """
    if len(document) > MOST_CHARACTERS:
        raise UserError(
            f"The document has {len(document):,} characters, more than the {MOST_CHARACTERS:,} that a run"
            " reads in parts. Give the part of it that the queries are about."
        )


def cut(document: str, most: int, encode: Encode) -> list[Part]:
    """The document in parts that overlap, as few as can be, and about equally long.

    They end where a line or a sentence does, if one does in reach.

    Args:
      document: the text.
      most: tokens of a part at most.
      encode: the token ids of a text.

    Example:
      >>> text = "One is red. Two is green. Three is blue. Four is pink."
      >>> parts = cut(text, 8, lambda text: np.arange(len(text.split())))
      >>> [part.text for part in parts]
      ['One is red. Two is green.', 'Three is blue. Four is pink.']
    """
    pieces = list(_pieces(document, most, lambda text: len(encode(text))))
    ends = np.cumsum([len(text) for text, _ in pieces]).tolist()
    counts, limit = [count for _, count in pieces], most
    while True:
        found = []
        for first, last in _balanced(counts, limit):
            start, end = ends[first - 1] if first else 0, ends[last - 1]
            if text := document[start:end].strip():
                found.append(Part(start, end, text, encode(text)))
        # Tokens are counted piece by piece; together they may be more.
        excess = max(len(part.ids) for part in found) - most
        if excess <= 0:
            return found
        limit -= excess


def _pieces(document: str, most: int, count: Callable[[str], int]) -> Iterator[tuple[str, int]]:
    """Lines with their numbers of tokens; long ones sentence by sentence, and long sentences in halves."""
    for line in document.splitlines(keepends=True):
        whole = count(line)
        if whole <= most // OVERLAP:
            yield line, whole
            continue
        for sentence in _sentences(line):
            yield from _halves(sentence, most // 2, count)


def _sentences(line: str) -> list[str]:
    import sentencex

    found = sentencex.segment("en", line)  # pyright: ignore[reportAttributeAccessIssue]
    return found if "".join(found) == line else [line]


def _halves(text: str, most: int, count: Callable[[str], int]) -> Iterator[tuple[str, int]]:
    """The text in pieces of so many tokens at most, between words if it has spaces."""
    whole = count(text)
    if whole <= most or len(text) < 2:
        yield text, whole
        return
    middle = len(text) // 2
    spaces = [found.end() for found in re.finditer(r"\s+", text) if 0 < found.end() < len(text)]
    at = min(spaces, key=lambda place: abs(place - middle), default=middle)
    yield from _halves(text[:at], most, count)
    yield from _halves(text[at:], most, count)


def _balanced(counts: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Stretches of pieces, first and last (not included): no more of them than need be, of like size."""
    found = _stretches(counts, most, most // OVERLAP)
    even = ceil_div(sum(counts), len(found))
    for limit in range(even, most, max(1, most // 32)):
        evener = _stretches(counts, limit, most // OVERLAP)
        if len(evener) == len(found):
            return evener
    return found


def _stretches(counts: Sequence[int], most: int, overlap: int) -> list[tuple[int, int]]:
    found, first = [], 0
    while True:
        last, size = first, 0
        while last < len(counts) and (size + counts[last] <= most or last == first):
            size += counts[last]
            last += 1
        found.append((first, last))
        if last == len(counts):
            return found
        back = last
        while back - 1 > first and sum(counts[back - 1 : last]) <= overlap:
            back -= 1
        if back == last and last - 1 > first and counts[last - 1] <= 2 * overlap:
            back -= 1  # one piece at least, where it is not too long
        goes_on = sum(counts[back : last + 1]) <= most
        first = back if goes_on else last


def search(texts: Sequence[str], queries: Sequence[str]) -> Int[np.ndarray, " n"]:
    """The number of the text, for each query, that shares most words with it, rare ones counting most.

    Of several that are equally good it is the first.

    Example:
      >>> search(["The tank is red.", "The cable is long."], ["How long is the cable?", "Why?"]).tolist()
      [1, 0]

    Reference:
      Robertson & Zaragoza 2009, The Probabilistic Relevance Framework: BM25 and Beyond.
    """
    bags = [collections.Counter(words(text)) for text in texts]
    sizes = np.array([max(1, bag.total()) for bag in bags])
    known = collections.Counter(word for bag in bags for word in bag)

    def scores(query: str) -> np.ndarray:
        total = np.zeros(len(bags))
        for word in sorted(set(words(query)) & known.keys()):
            rarity = math.log(1 + (len(bags) - known[word] + 0.5) / (known[word] + 0.5))
            times = np.array([bag[word] for bag in bags])
            total += rarity * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * sizes / sizes.mean()))
        return total

    return np.array([int(np.argmax(scores(query))) for query in queries], np.int64)
