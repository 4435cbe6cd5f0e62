"""Questions for a fact of a sentence, which the model writes.

The answer is chosen before the question, and kept is a question to which the model, with the whole document,
gives that answer: round-trip consistency (Alberti et al. 2019, arXiv:1906.05416).
"""

from __future__ import annotations

from jaxsp.study.seeds.draft import Draft
from jaxsp.study.text import Chunk, Document

WEIGHT = 3

A_SENTENCE = 3


def drafts(document: Document, chunk: Chunk) -> list[Draft]:
    return [
        Draft("", (i,), document.with_heading(i), expect=fact)
        for i in chunk.sentences
        for fact in document.facts_of(i)[:A_SENTENCE]
    ]
