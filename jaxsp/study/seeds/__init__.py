"""Seeds of training queries: each describes a form and never a content, and is a file and a line here.

A seed has a function ``drafts(document, chunk)``, which gives its drafts of queries about a chunk, and a
``WEIGHT``: the times that a sentence is asked for by it, beside the other seeds.
"""

from __future__ import annotations

from typing import Protocol

from jaxsp.study.seeds import (
    about,
    complete,
    facts,
    mention,
    other_words,
    question,
    quote,
    reword,
    summary,
    true_or_false,
    use_case,
    what_is,
)
from jaxsp.study.seeds.draft import Draft as Draft
from jaxsp.study.text import Chunk, Document


class Seed(Protocol):
    """A form of queries."""

    @property
    def WEIGHT(self) -> int:
        """Times that a sentence is asked for by it, beside the other seeds."""
        ...

    def drafts(self, document: Document, chunk: Chunk) -> list[Draft]:
        """Drafts about a chunk of the document."""
        ...


SEEDS: dict[str, Seed] = {
    "question": question,
    "other_words": other_words,
    "what_is": what_is,
    "use_case": use_case,
    "quote": quote,
    "complete": complete,
    "mention": mention,
    "about": about,
    "reword": reword,
    "true_or_false": true_or_false,
    "facts": facts,
    "summary": summary,
}
