"""Free-running answers to queries after a prefix: the teacher's gold answers ŷ, and σ's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxsp.data.rows import pad_ids
from jaxsp.models.generate import greedy
from jaxsp.models.language_model import LanguageModel
from jaxsp.typing import KeyValues

BATCH = 64


def answer_ids(
    model: LanguageModel,
    prefix: KeyValues,
    queries: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """Greedy answers, each with its end-of-turn token if it reached one.

    Args:
      model: the frozen model.
      prefix: what is read before every query.
      queries: token ids from after the prefix up to where the answer starts.
      max_tokens: longest answer.
      on_batch: told how many queries are answered.

    Returns:
      One list of ids per query.
    """
    size = min(BATCH, len(queries))
    longest = max(len(query) for query in queries)
    answers: list[list[int]] = []
    for start in range(0, len(queries), size):
        some = list(queries[start : start + size])
        ids, offsets = pad_ids([*some, *[[]] * (size - len(some))], longest)
        tokens, lengths = greedy(
            model.params,
            model.config,
            prefix,
            ids,
            offsets,
            stop_ids=model.stop_ids,
            max_tokens=max_tokens,
        )
        pairs = zip(np.asarray(tokens), np.asarray(lengths), strict=True)
        answers += [row[:length].tolist() for row, length in pairs][: len(some)]
        on_batch(len(answers))
    return answers
