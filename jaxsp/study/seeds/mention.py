"""Sentences of the document, asked for by a word that stands in them and hardly anywhere else."""

from __future__ import annotations

from jaxsp.study.seeds.draft import Draft
from jaxsp.study.text import Chunk, Document

WEIGHT = 1


def drafts(document: Document, chunk: Chunk) -> list[Draft]:
    found = []
    for i in chunk.sentences:
        sentence = document.sentences[i].text
        for word in document.rare_words(i)[:2]:
            found.append(Draft(f'Which sentence has the word "{word}"?', (i,), answer=sentence))
    return found
