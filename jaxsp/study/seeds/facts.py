"""The key facts of a part of the document: as a list, as JSON or as the rows of a table, by turns."""

from __future__ import annotations

from jaxsp.study.seeds.draft import Draft
from jaxsp.study.text import Chunk, Document

WEIGHT = 1

FORMS = ("a list", "JSON", "the rows of a table")


def drafts(document: Document, chunk: Chunk) -> list[Draft]:
    form = FORMS[document.chunks.index(chunk) % len(FORMS)]
    return [Draft(f"Give the key facts of {document.name_of(chunk)} as {form}.", chunk.sentences)]
