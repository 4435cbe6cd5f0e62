"""Signals by which σ may be said to be unsure of its answer; the larger, the surer.

All but the distances follow from the distributions by which σ chose its tokens, so that they cost nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxsp import distributions
from jaxsp.data.examples import make_rows
from jaxsp.evaluation.certainty import SIGNAL, certainty
from jaxsp.models import decoder
from jaxsp.models.language_model import LanguageModel
from jaxsp.typing import KeyValues

LEAST = 3
"""Tokens in the mean of the least probable ones."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """An answer of σ's own, and what it was chosen by.

    Attributes:
      words: the text of each token.
      best: ``[A]`` logarithm of the probability of the most probable token, which is the answer's.
      second: ``[A]`` that of the next one.
      entropy: ``[A]`` of the whole distribution, in nats.
      state: ``[D]`` the last hidden state of the query, which predicts the first token.
      cut: whether the answer reached its greatest length.
    """

    words: list[str]
    best: np.ndarray
    second: np.ndarray
    entropy: np.ndarray
    state: np.ndarray
    cut: bool


def answered(
    model: LanguageModel, prefix: KeyValues, queries: Sequence[list[int]], answers: Sequence[list[int]]
) -> list[Answered]:
    """The distributions of answers, by one pass over each.

    Args:
      model: the frozen model.
      prefix: what stands before the queries: σ's.
      queries: token ids.
      answers: σ's greedy answers to them.
    """
    rows, found = make_rows(queries, answers), []
    for i, ids in enumerate(answers):
        count = len(ids)
        states = distributions.answer_hidden(model.params, model.config, prefix, rows.take([i]))[0]
        logs = jax.nn.log_softmax(decoder.unembed(model.params, model.config, states), axis=-1)[:count]
        two = np.asarray(jax.lax.top_k(logs, 2)[0])
        entropy = -np.asarray((np.e ** np.asarray(logs) * np.asarray(logs)).sum(axis=-1))
        words = [str(model.tokenizer.decode([token])) for token in ids] if model.tokenizer else []
        state = np.asarray(states[0], np.float32)
        cut = ids[-1] not in model.stop_ids
        found.append(Answered(words, two[:, 0], two[:, 1], entropy, state, cut))
    return found


def _of_facts(one: Answered) -> float:
    """The lowest of tokens with a figure or a capital inside the answer; of all, if there are none."""
    said = [word.strip() for word in one.words]
    facts = [
        any(sign.isdigit() for sign in word) or (n > 0 and word[:1].isupper()) for n, word in enumerate(said)
    ]
    return float(one.best[facts].min()) if any(facts) else float(one.best.min())


SIGNALS: dict[str, Callable[[Answered], float]] = {
    SIGNAL: lambda one: certainty(one.best),
    "mean_log_probability": lambda one: float(one.best.mean()),
    "first_log_probability": lambda one: float(one.best[0]),
    f"mean_of_{LEAST}_lowest": lambda one: float(np.sort(one.best)[:LEAST].mean()),
    "lowest_of_figures_and_names": _of_facts,
    "sum_of_log_probabilities": lambda one: float(one.best.sum()),
    "lowest_margin": lambda one: float((one.best - one.second).min()),
    "highest_entropy": lambda one: -float(one.entropy.max()),
    "mean_entropy": lambda one: -float(one.entropy.mean()),
}
"""By name, each a function of one answer. The first is the library's."""

DISTANCE, RANDOM = "distance_to_failed_queries", "random"


def distances(answers: Sequence[Answered], wrong: Sequence[bool]) -> list[float]:
    """The distance from a query's last hidden state to one that failed, less that to one answered well.

    Each query is compared with the others alone. Distances are cosines; without a query of one kind among the
    others nothing is known of it: 0.
    """
    states = np.array([one.state / np.linalg.norm(one.state) for one in answers])
    near, bad = states @ states.T, np.array(wrong)
    found = []
    for i in range(len(bad)):
        others = np.arange(len(bad)) != i
        good_ones, bad_ones = near[i, others & ~bad], near[i, others & bad]
        both = len(good_ones) and len(bad_ones)
        found.append(float(good_ones.max() - bad_ones.max()) if both else 0.0)
    return found


def all_signals(answers: Sequence[Answered], wrong: Sequence[bool]) -> dict[str, list[float]]:
    """Every signal of every answer, and one drawn at random, which a signal must be better than."""
    found = {name: [signal(one) for one in answers] for name, signal in SIGNALS.items()}
    random = np.random.default_rng(0).random(len(answers)).tolist()
    return {**found, DISTANCE: distances(answers, wrong), RANDOM: random}


def sent(values: Sequence[float], threshold: Callable[[Sequence[float]], float]) -> list[bool]:
    """The answers that are below the threshold that all others give.

    Args:
      values: a signal on the held-out queries of one document.
      threshold: a function from the others' values to the threshold.
    """
    return [
        values[i] < threshold([*values[:i], *values[i + 1 :]]) if len(values) > 1 else False
        for i in range(len(values))
    ]


def separation(values: Sequence[float], wrong: Sequence[bool]) -> tuple[float, int]:
    """Pairs of a wrong and a good answer of which the wrong one is less sure (a tie: half), and all pairs."""
    bad = [v for v, w in zip(values, wrong, strict=True) if w]
    good = [v for v, w in zip(values, wrong, strict=True) if not w]
    pairs = [(b < g) + 0.5 * math.isclose(b, g) * (not b < g) for b in bad for g in good]
    return float(sum(pairs)), len(pairs)
