"""The sentences that queries depend on: the answer has words of theirs, or is another one without them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxsp.data.packing import Packing
from jaxsp.data.words import words
from jaxsp.evaluation.metrics import at_positions
from jaxsp.models import decoder
from jaxsp.models.language_model import LanguageModel
from jaxsp.study.text import Document, terms
from jaxsp.teacher.problem import Problem
from jaxsp.typing import ceil_div

CHANGED = 1.0
"""KL of an answer, in nats, by which the removal of a sentence it depends on changes it at least."""

GUESSES = 4
"""Sentences that a query of which only the text is known is tried on."""

TRIED = 3
"""Queries that a sentence is tried with, at most: one that depends on it is enough."""

MOST_TOKENS = 65536
"""Tokens to read at most, about, of documents with one sentence removed and of the queries after them."""


@dataclasses.dataclass(frozen=True)
class Coverage:
    """The sentences that queries depend on.

    Attributes:
      depends: for each query, the numbers of its sentences.
      guessed: those of them that were not taken away, as that would be too much to read: each is the one that
        shares most words with a query.
    """

    depends: list[set[int]]
    guessed: set[int]


def candidates(document: Document, *texts: str) -> tuple[int, ...]:
    """Numbers of the sentences that share most with some texts, rare words counting most; the best first."""
    shared = collections.defaultdict[int, float](float)
    for word in sorted({word for text in texts for word in words(text)}):
        for sentence in document.having(word):
            shared[sentence] += 1 / document.count(word)
    return tuple(sorted(shared, key=lambda i: (-shared[i], i))[:GUESSES])


def by_words(document: Document, asked: Sequence[tuple[str, str]]) -> list[set[int]]:
    """The sentences that alone have a word of an answer: a figure, a name or a long word, not in its query.

    The model reads nothing for that. A sentence that stands there several times is one.

    Args:
      document: the document.
      asked: the texts of queries, each with its answer's.

    Example:
      >>> text = "The tank holds 1.2 litres. The cable is made of rubber. The lid is red."
      >>> document = Document.of(text, len)
      >>> by_words(document, [("How much does it hold?", "1.2 l."), ("Is it rubber?", "Yes, rubber.")])
      [{0}, set()]
    """
    found = []
    for query, answer in asked:
        said = set(terms(answer)) - set(terms(query))
        found.append(set().union(*(document.telling.get(term, ()) for term in said)))
    return found


def covered(
    model: LanguageModel,
    document: Document,
    problem: Problem,
    asked: Sequence[tuple[str, str]],
    *,
    most_tokens: int = MOST_TOKENS,
    spare: int = 0,
) -> Coverage:
    """The sentences that each query of a problem depends on: by words, and by removal where words don't tell.

    Args:
      model: the frozen model.
      document: the document of the problem.
      problem: the queries with the teacher's answers.
      asked: the texts of the queries, each with its answer's.
      most_tokens: tokens to read at most. Beyond them, and in documents of several parts, that sentence
        counts which shares most with a query.
      spare: if words leave no more sentences than that without a query, none is taken away to see more.
    """
    depends, job = by_words(document, asked), problem.job
    left = set(range(len(document.sentences))).difference(*depends)
    if len({document.sentences[i].text for i in left}) <= spare:
        return Coverage(depends, set())
    about = [
        [i for i in candidates(document, *texts) if job.part(query).shared(document.span([i]))]
        for query, texts in enumerate(asked)
    ]
    wished = [[i for i in some if i in left] for some in about]
    removed, tried = by_removal(model, document, problem, wished, most_tokens)
    untried = left - tried if tried < set().union(*wished) else set[int]()
    guessed = set[int]()
    for own, more, some in zip(depends, removed, about, strict=True):
        likeliest = untried & set(some[:1])
        own |= more | likeliest
        guessed |= likeliest
    return Coverage(depends, guessed)


def by_removal(
    model: LanguageModel,
    document: Document,
    problem: Problem,
    about: Sequence[Sequence[int]],
    most_tokens: int = MOST_TOKENS,
) -> tuple[list[set[int]], set[int]]:
    """The sentences without which an answer is another one, as far as they were tried.

    A document without a sentence is read from where it differs from the whole: the last sentences, which
    cost least, are tried first.

    Args:
      model: the frozen model.
      document: the document of the problem.
      problem: the queries with the teacher's answers.
      about: for each query, numbers of the sentences that it may depend on, the likeliest first.
      most_tokens: tokens to read at most, about.

    Returns:
      For each query the numbers of its sentences; and those of all that were tried.
    """
    asked: dict[int, list[tuple[int, int]]] = {}
    for query, some in enumerate(about):
        for rank, sentence in enumerate(some):
            asked.setdefault(sentence, []).append((rank, query))
    tried, spent, found = dict[int, list[int]](), 0.0, [set[int]() for _ in about]
    whole_ids, lengths = problem.job.context_ids, problem.rows.lengths
    for sentence in sorted(asked, reverse=True) if len(problem.job.parts) == 1 else ():
        queries = [query for _, query in sorted(asked[sentence])[:TRIED]]
        after = 1 - document.sentences[sentence].start / len(document.text)
        spent += after * len(whole_ids) + int(lengths[queries].sum())
        if spent > most_tokens:
            break
        tried[sentence] = queries
    if not tried:
        return found, set()
    whole = decoder.read_long(model.params, model.config, whole_ids[None], problem.preamble)
    begin = problem.preamble.positions.shape[1]
    most = max(int(lengths[queries].sum()) for queries in tried.values())
    shape = problem.packing
    packing = Packing(min(shape.rows, ceil_div(most, shape.length)), shape.length)
    for sentence, queries in tried.items():
        here = document.sentences[sentence]
        ids = model.encode_context(document.text[: here.start] + document.text[here.end :])
        shortest = min(len(ids), len(whole_ids))
        differ = np.flatnonzero(ids[:shortest] != whole_ids[:shortest])
        first = int(differ[0]) if len(differ) else shortest
        prefix = decoder.read_again(model.params, model.config, ids[None, first:], whole, begin + first)
        kl = at_positions(model, prefix, problem.some(queries), packing, ("kl",))["kl"].sum(axis=1)
        for query in np.asarray(queries)[kl > CHANGED].tolist():
            found[query].add(sentence)
    return found, set(tried)
