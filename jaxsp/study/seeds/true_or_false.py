"""A sentence of a chunk, as it is and with another figure in it: is it true?"""

from __future__ import annotations

from jaxsp.study.seeds.draft import Draft
from jaxsp.study.text import Chunk, Document

WEIGHT = 1


def drafts(document: Document, chunk: Chunk) -> list[Draft]:
    i = next((i for i in chunk.sentences if document.false_variant(i)), chunk.sentences[0])
    texts = filter(None, [document.sentences[i].text, document.false_variant(i)])
    return [Draft(f'Is this true, and if not, what is? "{text}"', (i,)) for text in texts]
