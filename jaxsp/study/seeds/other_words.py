"""The facts that ``question`` asks for, in other words: a request is begun, which the model writes on."""

from __future__ import annotations

from jaxsp.study.seeds.draft import Draft
from jaxsp.study.text import Chunk, Document

WEIGHT = 1

OPENINGS = ("Can you tell me", "Do you know")


def drafts(document: Document, chunk: Chunk) -> list[Draft]:
    found = []
    for i in chunk.sentences:
        opening = OPENINGS[i % len(OPENINGS)] if document.is_english else ""
        source = document.with_heading(i)
        found += [Draft(opening, (i,), source, expect=fact) for fact in document.facts_of(i)[:1]]
    return found
