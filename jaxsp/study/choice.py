"""The choice between the queries made: which to train on, which to measure on, and for what to make some."""

from __future__ import annotations

import collections
import random
from collections.abc import Collection, Mapping, Sequence

from jaxsp.data.documents import Query
from jaxsp.settings import Settings

A_SENTENCE = 4
"""Queries to train on for each sentence of the document, where the user gives none and asks for no number."""

HELD_OUT, MOST_HELD_OUT = 0.2, 16
"""Part of the questions to measure on, and their number at most, where the user gives none."""

FEW = 64
"""Queries of the document for sentences that nobody asks for, at most, where the user's own are fewer."""


def to_measure(
    depends: Mapping[int, set[int]],
    queries: Sequence[Query],
    own: int,
    settings: Settings,
    cut: Collection[int] = (),
) -> list[int]:
    """Queries to hold out: of the questions that the model wrote, as those are most like a user's."""
    written = [i for i in depends if i >= own and queries[i].seed == "question"]
    written = [i for i in written if i not in cut] or written or list(depends)
    count = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(written))))
    return sorted(random.Random(settings.training.seed).sample(written, min(count, len(written))))


def to_train(
    depends: Mapping[int, set[int]],
    queries: Sequence[Query],
    own: int,
    sentences: int,
    settings: Settings,
    weights: Mapping[str, int],
    cut: Collection[int] = (),
) -> list[int]:
    """Numbers of the queries to train on: all given, and more in turns for the sentences asked for least.

    Where the user gives queries and asks for no number of others, until each sentence is asked for.

    Args:
      depends: for each query by its number, the sentences that it depends on.
      queries: all of them, the user's own first.
      own: number of the user's own.
      sentences: number of the document's sentences.
      settings: settings of the compression.
      weights: by seed, the times that a sentence is asked for by it, beside the others.
      cut: queries whose answers are cut at their greatest length: the last to take.
    """
    chosen = [i for i in depends if i < own]
    times = [collections.Counter[str]() for _ in range(sentences)]  # by seed
    most = settings.study.study_queries
    enough = 1 if own and most is None else A_SENTENCE

    def choose(i: int) -> None:
        for sentence in depends[i]:
            times[sentence][queries[i].seed or "given"] += 1

    for i in chosen:
        choose(i)
    left = {
        sentence: [i for i in depends if i >= own and sentence in depends[i]] for sentence in range(sentences)
    }
    while most is None or len(chosen) - own < most:
        open_ones = [s for s, some in left.items() if some and (most or times[s].total() < enough)]
        if not open_ones:
            break
        sentence = min(open_ones, key=lambda s: times[s].total())

        def rank(i: int, seen: collections.Counter[str] = times[sentence]) -> tuple[bool, float]:
            return i in cut, (seen[queries[i].seed] + 1) / weights[queries[i].seed]

        best = min(left[sentence], key=rank)
        chosen.append(best)
        choose(best)
        for sentence in depends[best]:
            left[sentence].remove(best)
    return chosen


def to_fill(times: Sequence[int], given: int, added: int, most: int | None) -> list[int]:
    """Numbers of the sentences to ask for beside the user's own queries: those that nobody asks for.

    What is asked later is most like the user's own, and each other query takes steps from these. So where
    there is no room for all, it is some from the whole of the document.

    Args:
      times: for each sentence the number of queries that ask for it.
      given: number of the user's own queries.
      added: number of those of the document there are already.
      most: number of them in all, if there is a wish.

    Example:
      >>> to_fill([0, 1, 2, 1, 0], given=9, added=0, most=None), to_fill([0, 0, 0, 0], 9, 0, most=2)
      ([0, 4], [0, 2])
    """
    some = [i for i, own in enumerate(times) if own == 0]
    most = max(given, FEW) if most is None else min(most, max(given, FEW))
    room = max(0, most - added)
    return some if len(some) <= room else [some[i * len(some) // room] for i in range(room)]
