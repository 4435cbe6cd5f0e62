"""The key facts of a part of the document: as a list, as JSON and as the rows of a table."""

from __future__ import annotations

from jaxsp.study.seeds.draft import Draft
from jaxsp.study.text import Chunk, Document

WEIGHT = 1

FORMS = ("a list", "JSON", "the rows of a table")


def drafts(document: Document, chunk: Chunk) -> list[Draft]:
    name = document.name_of(chunk)
    return [Draft(f"Give the key facts of {name} as {form}.", chunk.sentences) for form in FORMS]
