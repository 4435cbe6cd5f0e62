"""The sentences that queries depend on: without such a sentence the answer is another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxsp.data.packing import Packing
from jaxsp.evaluation.facts import words
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

MOST_TOKENS = 65536
"""Tokens to read, of documents with one sentence removed; where it takes more, and in documents of several
parts, what a query was made from counts as covered."""


def candidates(document: Document, *texts: str) -> tuple[int, ...]:
    """Numbers of the sentences that share most with some texts, rare words counting most."""
    own = {word for text in texts for word in words(text)}
    shared = [sum(1 / document.count(w) for w in own & set(words(s.text))) for s in document.sentences]
    best = sorted(range(len(shared)), key=lambda i: -shared[i])[:GUESSES]
    return tuple(sorted(i for i in best if shared[i]))


def covered(
    model: LanguageModel, document: Document, problem: Problem, about: Sequence[Sequence[int]]
) -> list[set[int]]:
    """The sentences that each query of a problem depends on.

    Args:
      model: the frozen model.
      document: the document of the problem.
      problem: the queries with the teacher's answers.
      about: for each query, numbers of the sentences that it may depend on.
    """
    asked: dict[int, list[int]] = {}
    for query, some in enumerate(about):
        for sentence in some:
            asked.setdefault(sentence, []).append(query)
    if len(problem.job.parts) > 1 or len(asked) * len(problem.job.context_ids) > MOST_TOKENS:
        return [set(some) for some in about]
    found: list[set[int]] = [set() for _ in about]
    lengths, whole = problem.rows.lengths, problem.packing
    most = max((int(lengths[queries].sum()) for queries in asked.values()), default=1)
    packing = Packing(min(whole.rows, ceil_div(most, whole.length)), whole.length)  # for a sentence's queries
    for sentence, queries in asked.items():
        here = document.sentences[sentence]
        without = model.encode_context(document.text[: here.start] + document.text[here.end :])
        prefix = decoder.read_long(model.params, model.config, without[None], problem.preamble)
        kl = at_positions(model, prefix, problem.rows.take(queries), packing, ("kl",))["kl"].sum(axis=1)
        for query in np.asarray(queries)[kl > CHANGED].tolist():
            found[query].add(sentence)
    return found
