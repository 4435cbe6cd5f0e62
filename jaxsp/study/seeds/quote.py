"""Sentences of the document, asked for by their first words."""

from __future__ import annotations

from jaxsp.study.seeds.draft import Draft
from jaxsp.study.text import Chunk, Document, first_words

WEIGHT = 1

PARTS = 1 / 3, 1 / 2, 2 / 3
"""Parts of a sentence that it may be asked for by: the first that begins no other one."""


def drafts(document: Document, chunk: Chunk) -> list[Draft]:
    found = []
    for i in chunk.sentences:
        sentence = document.sentences[i].text
        beginnings = (first_words(sentence, part) for part in PARTS)
        if first := next((text for text in beginnings if text and document.begins_one(text)), ""):
            found.append(Draft(f'Quote the sentence that begins with "{first}".', (i,), answer=sentence))
    return found
