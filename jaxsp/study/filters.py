"""Checks of queries to train on: that the text is sane and new, and the answer none that refuses."""

from __future__ import annotations

import collections
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable

from jaxsp.data.words import words
from jaxsp.study.text import ENGLISH, is_english

FEWEST_WORDS, MOST_WORDS = 3, 40

KNOWN = 0.3
"""Part of a query's words, at least, that the document has, or any question in English where it is English.
All of 1,682 questions that people asked about 45 documents have a third and more."""

ASKING = (
    "what", "which", "who", "whose", "when", "where", "why", "how", "does", "do", "did", "can", "there",
    "much", "many", "i",
)  # fmt: skip
"""Words by which questions in English are known, beside the commonest of the language."""

ALIKE = 0.75
"""Overlap of two queries' pairs of words from which one of them is left out."""

MATTERS = 5.0
"""KL of a whole answer without the document, in nats, from which the document matters to it. A sum, as a fact
may be one token of many."""

_REFUSAL = re.compile(
    r"\b(i'?m sorry|i am sorry|i can(?:'t|not)|as an ai|i do(?:n't| not) (?:know|have)|"
    r"(?:text|document|context|passage) does(?:n't| not) (?:say|mention|provide|specify|state|contain))",
    re.IGNORECASE,
)


class Seen:
    """The queries there are, to tell whether another one is new.

    Example:
      >>> seen = Seen(["How long is the cable?"])
      >>> seen.is_new("How long is the cable"), seen.is_new("How long is the warranty?")
      (False, True)
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._pairs: list[set[tuple[str, str]]] = []
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        self._pairs.append(_pairs(text))

    def is_new(self, text: str) -> bool:
        """Whether no query there is has nearly the same words in the same order."""
        own = _pairs(text)
        return all(len(own & other) < ALIKE * len(own | other) for other in self._pairs)


def _pairs(text: str) -> set[tuple[str, str]]:
    own = ["", *words(text), ""]
    return set(itertools.pairwise(own))


def is_sane(text: str, document: str) -> bool:
    """Whether a query has the length of one, and the language of the document as far as its words tell.

    Example:
      >>> text = "The cable is 90 centimetres long."
      >>> is_sane("How long is the cable?", text), is_sane("Wie lang ist das Kabel?", text), is_sane("", text)
      (True, False, False)
    """
    own, count = set(words(text)), len(words(text))
    long_enough = FEWEST_WORDS <= count <= MOST_WORDS or (count and not text.isascii())
    if not long_enough or not scripts(text) <= scripts(document) | {"LATIN"}:
        return False
    known, foreign = _vocabulary(document)
    if len(own & foreign) > 1:
        return False
    return len(own & known) >= KNOWN * len(own)


@functools.lru_cache(maxsize=8)
def _vocabulary(document: str) -> tuple[frozenset[str], frozenset[str]]:
    """The words that queries about a document may be expected to have, and those of English that it has not.

    The latter are those of another language: none, where the document is in English.
    """
    counts = collections.Counter(words(document))
    english = {*ENGLISH, *ASKING}
    if is_english(counts):
        return frozenset({*counts} | english), frozenset()
    return frozenset(counts), frozenset(english - {*counts})


def scripts(text: str) -> set[str]:
    """The scripts of a text's letters, by the first word of their names in Unicode."""
    return {unicodedata.name(letter, "?").split()[0] for letter in set(text) if letter.isalpha()}


def is_answer(text: str) -> bool:
    """Whether an answer says something, and doesn't refuse to.

    Example:
      >>> is_answer("It is 90 cm long."), is_answer("I'm sorry, but I can't say."), is_answer(" ")
      (True, False, False)
    """
    return bool(words(text)) and not _REFUSAL.search(text)
