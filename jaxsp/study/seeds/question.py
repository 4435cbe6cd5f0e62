"""Questions about a sentence, which the model writes; each is begun for it with a question word."""

from __future__ import annotations

from jaxsp.study.seeds.draft import Draft
from jaxsp.study.text import Chunk, Document

WEIGHT = 3

OPENINGS = ("What", "How", "Which", "When", "Who", "Where")
"""A begun question ends as one, also of a small model, and each word asks for something else."""
A_SENTENCE = 4


def drafts(document: Document, chunk: Chunk) -> list[Draft]:
    found = []
    for i in chunk.sentences:
        openings = [OPENINGS[(i * A_SENTENCE + n) % len(OPENINGS)] for n in range(A_SENTENCE)]
        begun = openings if document.is_english else [""] * A_SENTENCE
        found += [Draft(opening, (i,), document.with_heading(i)) for opening in begun]
    return found
