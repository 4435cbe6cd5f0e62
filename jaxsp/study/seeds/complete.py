"""Sentences of the document that are to be continued from their first half."""

from __future__ import annotations

from jaxsp.study.seeds.draft import Draft
from jaxsp.study.text import Chunk, Document, first_words

WEIGHT = 1


def drafts(document: Document, chunk: Chunk) -> list[Draft]:
    found = []
    for i in chunk.sentences:
        sentence = document.sentences[i].text
        if first := first_words(sentence, 1 / 2):
            rest = sentence[len(first) :].strip()
            found.append(Draft(f'Continue as in the text: "{first}', (i,), answer=rest))
    return found
