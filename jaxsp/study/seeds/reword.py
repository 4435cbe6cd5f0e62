"""The longest sentence of a chunk, which is to be said in other words."""

from __future__ import annotations

from jaxsp.study.seeds.draft import Draft
from jaxsp.study.text import Chunk, Document, first_words

WEIGHT = 1


def drafts(document: Document, chunk: Chunk) -> list[Draft]:
    i = max(chunk.sentences, key=lambda i: len(document.sentences[i].text))
    first = first_words(document.sentences[i].text, 1 / 3)
    return [Draft(f'Say in your own words the sentence that begins with "{first}".', (i,))] if first else []
