"""Questions for what a sentence names: what stands after a colon, after "is" or in a cell of a table."""

from __future__ import annotations

import re

from jaxsp.study.seeds.draft import Draft
from jaxsp.study.text import Chunk, Document

WEIGHT = 2

LABEL = r"(?P<name>[^:.!?]{3,60}):\s+(?P<fact>\S.*?)[.;]?"
STATEMENT = (
    r"(?:The|An?|Its|Our|Your)\s+(?P<name>(?:(?!,|that |which ).){3,60}?)\s+(?:is|are|was|were)\s+"
    r"(?P<fact>\S.*?)\."
)


def drafts(document: Document, chunk: Chunk) -> list[Draft]:
    found = []
    for i in chunk.sentences:
        here = document.sentences[i]
        if here.columns:
            heads, cells = (row.split(" | ") for row in (here.columns, here.text))
            pairs = zip(heads[1:], cells[1:], strict=False)
            named = [(f"{_as_word(head)} of {cells[0]}", cell) for head, cell in pairs if head and cell]
        else:
            match = re.fullmatch(LABEL, here.text) or re.fullmatch(STATEMENT, here.text)
            named = [(_as_word(match["name"]), match["fact"])] if match else []
        found += [
            Draft(f"What is the {name}?", (i,), expect=_fact(document, i, fact)) for name, fact in named
        ]
    return found


def _fact(document: Document, sentence: int, text: str) -> str:
    """Words that the answer must have: the first fact of the sentence that stands in this part of it."""
    return next((fact for fact in document.facts_of(sentence) if fact in text), text)


def _as_word(name: str) -> str:
    """A name as it is written in the midst of a sentence."""
    first, *_ = name.split(maxsplit=1)
    return name[0].lower() + name[1:] if first[1:].islower() else name
