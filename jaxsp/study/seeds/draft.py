"""``Draft``: a query to be, as seeds make them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Draft:
    """A query to be: complete, or the first words of one that the model is to write about a text.

    Attributes:
      text: the query, or its first words.
      sentences: numbers of the sentences that it may be about.
      source: the text that the rest is to be written about; empty if the query is complete.
      expect: words of the document that it asks for: the query doesn't have them, and the best answers do.
      answer: the answer, where the document itself gives it; else the model answers.
    """

    text: str
    sentences: tuple[int, ...]
    source: str = ""
    expect: str = ""
    answer: str | None = None
