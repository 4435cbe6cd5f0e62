"""A summary of a part of the document."""

from __future__ import annotations

from jaxsp.study.seeds.draft import Draft
from jaxsp.study.text import Chunk, Document

WEIGHT = 1


def drafts(document: Document, chunk: Chunk) -> list[Draft]:
    return [Draft(f"Summarise {document.name_of(chunk)} in one sentence.", chunk.sentences)]
