"""Free-running answers to queries after a prefix: the teacher's gold answers ŷ, and σ's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxsp.models.generation import Sampling, generate, generate_with_log_probs
from jaxsp.models.language_model import LanguageModel
from jaxsp.typing import Array, Float, KeyValues

SLOTS = 64
"""Answers to questions about one text are nearly equally long: the more at once, the fewer steps."""


def answer_ids(
    model: LanguageModel,
    prefix: KeyValues,
    queries: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    after: Sequence[int] | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
    keys: Array | None = None,
) -> list[list[int]]:
    """Greedy answers, or sampled ones, each with its end-of-turn token if it reached one.

    Args:
      model: the frozen model.
      prefix: what is read before every query; one row, or several to choose from.
      queries: token ids from after the prefix up to where the answer starts.
      max_tokens: longest answer.
      after: the row of ``prefix`` that each query is read after; needed if there are several.
      on_batch: called with the number of queries answered.
      keys: a random key for each query: its answer is then sampled at temperature 1.

    Returns:
      One list of ids per query.
    """
    done = itertools.count(1)
    temperature = 0.0 if keys is None else 1.0
    sampling = Sampling(temperature=temperature, stop_ids=model.stop_ids, max_tokens=max_tokens)

    def finished(*_: Any) -> None:
        on_batch(next(done))

    return generate(
        model.params, model.config, prefix, queries, sampling, slots=SLOTS, after=after, on_finished=finished,
        key=keys,
    )  # fmt: skip


def answers_with_log_probs(
    model: LanguageModel,
    prefix: KeyValues,
    queries: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    after: Sequence[int] | None = None,
) -> tuple[list[list[int]], list[Float[np.ndarray, " _"]]]:
    """The greedy answers of ``answer_ids``, and how probable each of their tokens was.

    Args:
      model: as in ``answer_ids``, and so are the others.
      prefix: one row, or several to choose from.
      queries: token ids.
      max_tokens: longest answer.
      after: the row of ``prefix`` of each query.

    Returns:
      One list of ids per query; and the natural logarithms of their probabilities.
    """
    sampling = Sampling(stop_ids=model.stop_ids, max_tokens=max_tokens)
    arguments = model.params, model.config, prefix, queries, sampling
    return generate_with_log_probs(*arguments, slots=SLOTS, after=after)
