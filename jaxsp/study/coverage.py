"""The sentences that queries depend on: without such a sentence the answer is another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxsp.data.packing import Packing
from jaxsp.data.words import words
from jaxsp.evaluation.metrics import at_positions
from jaxsp.models import decoder
from jaxsp.models.language_model import LanguageModel
from jaxsp.study.text import Document
from jaxsp.teacher.problem import Problem
from jaxsp.typing import ceil_div

CHANGED = 1.0
"""KL of an answer, in nats, by which the removal of a sentence it depends on changes it at least."""

GUESSES = 4
"""Sentences that a query of which only the text is known is tried on."""

TRIED = 3
"""Queries that a sentence is tried with, at most: one that depends on it is enough."""

MOST_TOKENS = 65536
"""Tokens to read, of documents with one sentence removed; where it takes more, and in documents of several
parts, the sentence that shares most with a query counts as covered by it."""


def candidates(document: Document, *texts: str) -> tuple[int, ...]:
    """Numbers of the sentences that share most with some texts, rare words counting most; the best first."""
    own = {word for text in texts for word in words(text)}
    shared = [sum(1 / document.count(w) for w in own & set(words(s.text))) for s in document.sentences]
    best = sorted(range(len(shared)), key=lambda i: -shared[i])[:GUESSES]
    return tuple(i for i in best if shared[i])


def covered(
    model: LanguageModel, document: Document, problem: Problem, about: Sequence[Sequence[int]]
) -> list[set[int]]:
    """The sentences that each query of a problem depends on, as far as they were tried.

    A document without a sentence is read from where it differs from the whole.

    Args:
      model: the frozen model.
      document: the document of the problem.
      problem: the queries with the teacher's answers.
      about: for each query, numbers of the sentences that it may depend on, the likeliest first.
    """
    asked: dict[int, list[tuple[int, int]]] = {}
    for query, some in enumerate(about):
        for rank, sentence in enumerate(some):
            asked.setdefault(sentence, []).append((rank, query))
    tried = {sentence: [query for _, query in sorted(some)[:TRIED]] for sentence, some in asked.items()}
    if len(problem.job.parts) > 1:
        return [set(some[:1]) for some in about]
    whole_ids, parts = problem.job.context_ids, {}
    for sentence in tried:
        here = document.sentences[sentence]
        ids = model.encode_context(document.text[: here.start] + document.text[here.end :])
        shortest = min(len(ids), len(whole_ids))
        differ = np.flatnonzero(ids[:shortest] != whole_ids[:shortest])
        first = int(differ[0]) if len(differ) else shortest
        parts[sentence] = first, ids[first:]
    if sum(len(rest) for _, rest in parts.values()) > MOST_TOKENS:
        return [set(some[:1]) for some in about]
    found: list[set[int]] = [set() for _ in about]
    if not tried:
        return found
    whole = decoder.read_long(model.params, model.config, whole_ids[None], problem.preamble)
    begin = problem.preamble.positions.shape[1]
    longest, whole_packing = problem.rows.lengths, problem.packing
    most = max(int(longest[queries].sum()) for queries in tried.values())
    packing = Packing(min(whole_packing.rows, ceil_div(most, whole_packing.length)), whole_packing.length)
    for sentence, queries in tried.items():
        first, rest = parts[sentence]
        prefix = decoder.read_again(model.params, model.config, rest[None], whole, begin + first)
        kl = at_positions(model, prefix, problem.rows.take(queries), packing, ("kl",))["kl"].sum(axis=1)
        for query in np.asarray(queries)[kl > CHANGED].tolist():
            found[query].add(sentence)
    return found
