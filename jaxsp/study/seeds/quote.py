"""Sentences of the document, asked for by their first words."""

from __future__ import annotations

from jaxsp.study.seeds.draft import Draft
from jaxsp.study.text import Chunk, Document, first_words

WEIGHT = 1


def drafts(document: Document, chunk: Chunk) -> list[Draft]:
    found = []
    for i in chunk.sentences:
        sentence = document.sentences[i].text
        if first := first_words(sentence, 1 / 3):
            found.append(Draft(f'Quote the sentence that begins with "{first}".', (i,), answer=sentence))
    return found
