"""A question about a word that stands in a chunk and nowhere else."""

from __future__ import annotations

from jaxsp.study.seeds.draft import Draft
from jaxsp.study.text import Chunk, Document

WEIGHT = 1


def drafts(document: Document, chunk: Chunk) -> list[Draft]:
    rare = [(word, i) for i in chunk.sentences for word in document.rare_words(i)[:1]]
    if not rare:
        return []
    word, i = max(rare, key=lambda pair: len(pair[0]))
    return [Draft(f'What does the text say about "{word}"?', (i,))]
