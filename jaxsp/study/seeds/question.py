"""Questions about a sentence, which the model writes.

Some are for a fact of the sentence: the answer is chosen before the question (Alberti et al. 2019,
arXiv:1906.05416). The others are begun with a question word, and each word asks for something else.
"""

from __future__ import annotations

from jaxsp.study.seeds.draft import Draft
from jaxsp.study.text import Chunk, Document

WEIGHT = 3

OPENINGS = ("What", "How", "Which", "When", "Who", "Where")
"""A begun question ends as one, also of a small model."""
FACTS, OPENED = 2, 3
"""Questions of each kind for a sentence."""


def drafts(document: Document, chunk: Chunk) -> list[Draft]:
    found = []
    for i in chunk.sentences:
        source = document.with_heading(i)
        found += [Draft("", (i,), source, expect=fact) for fact in document.facts_of(i)[:FACTS]]
        openings = [OPENINGS[(i * OPENED + n) % len(OPENINGS)] for n in range(OPENED)]
        begun = openings if document.is_english else [""] * OPENED
        found += [Draft(opening, (i,), source) for opening in begun]
    return found
