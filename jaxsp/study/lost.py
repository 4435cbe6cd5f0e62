"""The document with the sentences marked that lost answers most likely stand in, and those not asked for."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsp.data.words import words
from jaxsp.evaluation.page import Passage
from jaxsp.study.text import ENGLISH, sentences

SHARED = 0.5
"""Weight of the words that a sentence shares with a lost answer at least: one that two sentences have."""

MOST_TEXT, KEPT = 100_000, 300
"""Characters of a document beyond which what is not marked is cut, and those kept at both ends of a cut."""


def lost(queries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The held-out queries of a report to which σ's answer lacks what the context decides."""
    return [query for query in queries if query["split"] == "held_out" and not query["captured"]]


def passages(
    document: str, queries: Sequence[Mapping[str, Any]], study: Mapping[str, Any] | None = None
) -> list[Passage]:
    """A document in passages, each with the lost queries whose answer most likely stands there.

    That is the sentence that shares most with the query and with what σ's answer lacks of the full
    context's, by words; rare ones count most. A query that shares too little with all has none.

    Args:
      document: the text.
      queries: ``lost`` queries of a report.
      study: the report's part of that name: sentences that no query to train on asks for are then passages of
        their own, too.

    Example:
      >>> asked = {"query": "How long is the cable?", "answer_prompt": "It is long.",
      ...          "answer_full_context": "It is 90 cm long."}
      >>> passages("The tank is blue. The cable has 90 cm.", [asked])
      [Passage(text='The tank is blue. ', lost=(), asked=True),
       Passage(text='The cable has 90 cm.', lost=(0,), asked=True)]
    """
    found = sentences(document)
    own = [set(words(sentence.text)) for sentence in found]
    counts = collections.Counter(word for some in own for word in some)
    marked: dict[int, list[int]] = {}
    for number, query in enumerate(queries):
        lacking = set(words(query["answer_full_context"])) - set(words(query["answer_prompt"]))
        asked = (set(words(query["query"])) | lacking) - set(ENGLISH)
        shared = [sum(1 / counts[word] for word in sorted(some & asked)) for some in own]
        if shared and max(shared) >= SHARED:
            marked.setdefault(shared.index(max(shared)), []).append(number)
    unasked = set[int]()
    if study is not None and study["sentences"] == [sentence.text for sentence in found]:
        unasked |= set(range(len(found))) - set(study["asked"])
    pieces, end = list[Passage](), 0
    for i in sorted(unasked | set(marked)):
        numbers = marked.get(i, ())
        text = document[found[i].start : found[i].end]
        start = found[i].start + len(text) - len(text.lstrip())
        if start < end:  # a part of the one before
            pieces[-1] = pieces[-1]._replace(lost=(*pieces[-1].lost, *numbers))
            continue
        pieces.append(Passage(document[end:start], ()))
        end = start + len(text.strip())
        pieces.append(Passage(document[start:end], tuple(numbers), asked=i not in unasked))
    pieces.append(Passage(document[end:], ()))
    if len(document) > MOST_TEXT:
        kept = (piece.lost or not piece.asked for piece in pieces)
        pieces = [p if whole else Passage(_cut(p.text), ()) for p, whole in zip(pieces, kept, strict=True)]
    return [piece for piece in pieces if piece.text]


def _cut(text: str) -> str:
    """A text with its middle left out."""
    return text if len(text) <= 2 * KEPT else f"{text[:KEPT]} […] {text[-KEPT:]}"
