"""Requests of somebody who needs a sentence of the document, which the model writes."""

from __future__ import annotations

from jaxsp.study.seeds.draft import Draft
from jaxsp.study.text import Chunk, Document

WEIGHT = 1

OPENINGS = ("How can I", "I would like to know")


def drafts(document: Document, chunk: Chunk) -> list[Draft]:
    openings = OPENINGS if document.is_english else ("",)
    return [
        Draft(opening, (i,), document.with_heading(i), expect=fact)
        for opening, i in zip(openings, chunk.sentences, strict=False)
        for fact in document.facts_of(i)[:1]
    ]
