"""The brackets: every quality figure of σ stands between the full context and none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsp import distributions
from jaxsp.evaluation.metrics import at_positions
from jaxsp.models import decoder
from jaxsp.models.language_model import LanguageModel
from jaxsp.prompts import PROMPT_KINDS
from jaxsp.teacher.answers import answer_ids
from jaxsp.teacher.problem import Problem
from jaxsp.typing import EMPTY, KeyValues, PyTree

CONDITIONS = {
    "full_context": "the whole context: what σ should be",
    "prompt": "the trained soft prompt σ",
    "initial": "σ before training",
    "truncated_context": "the context cut to the length of σ",
    "no_context": "nothing where the context stood",
}


class Measured(NamedTuple):
    """A condition on every query."""

    positions: dict[str, np.ndarray]
    """Each metric of a position, ``[N, A]``."""
    answers: list[list[int]]
    """Free-running answers, as token ids."""


def prefixes(
    model: LanguageModel, problem: Problem, sigmas: Mapping[str, PyTree], kind: str
) -> dict[str, KeyValues]:
    """The prefixes of all conditions but the full context, of one size, so that they share compiled programs.

    Args:
      model: the frozen model.
      problem: whose preamble and context they are of.
      sigmas: prompts by name, such as ``prompt`` and ``initial``, of the same length.
      kind: of the prompts.
    """
    preamble, length = problem.preamble, PROMPT_KINDS[kind].length(next(iter(sigmas.values())))
    vectors = model.embed(problem.job.context_ids[:length]).astype(jnp.float32)

    def read(sigma: PyTree, kind: str) -> KeyValues:
        return distributions.read_prompt(model.params, model.config, sigma, preamble, kind)

    return {
        **{name: read(sigma, kind) for name, sigma in sigmas.items()},
        "truncated_context": read({"embeddings": vectors}, "embedding"),
        "no_context": preamble.append(decoder.empty_prefix(model.config, length)),
    }


def measure(
    model: LanguageModel, problem: Problem, found: Mapping[str, KeyValues], max_tokens: int
) -> dict[str, Measured]:
    """Measures conditions on every query; what is the same is measured once.

    Their answers are generated together, and their positions read by one program.

    Args:
      model: the frozen model.
      problem: the queries, and what the teacher said.
      found: prefixes of one size, by name.
      max_tokens: longest free-running answer.
    """
    distinct: list[KeyValues] = []
    which = {}
    for name, prefix in found.items():
        same = (i for i, other in enumerate(distinct) if _equal(prefix, other))
        which[name] = next(same, len(distinct))
        if which[name] == len(distinct):
            distinct.append(prefix)
    queries, count = problem.job.query_ids, len(distinct)
    stacked = KeyValues(
        jnp.concatenate([prefix.keys for prefix in distinct], axis=1),
        jnp.concatenate([prefix.values for prefix in distinct], axis=1),
        jnp.concatenate([prefix.positions for prefix in distinct], axis=0),
    )
    answers = answer_ids(
        model,
        stacked,
        queries * count,
        max_tokens=max_tokens,
        after=np.repeat(np.arange(count), len(queries)).tolist() if count > 1 else None,
    )
    measured = [
        Measured(
            at_positions(model, prefix, problem.rows, problem.packing),
            answers[i * len(queries) : (i + 1) * len(queries)],
        )
        for i, prefix in enumerate(distinct)
    ]
    return {name: measured[i] for name, i in which.items()}


def measure_full_context(model: LanguageModel, problem: Problem) -> Measured:
    """The condition that σ is to equal: what the teacher said, without reading the context again."""
    return Measured(at_positions(model, None, problem.rows, problem.packing), problem.answers)


def _equal(a: KeyValues, b: KeyValues) -> bool:
    return all(bool(jnp.array_equal(x, y)) for x, y in zip(_live(a), _live(b), strict=True))


def _live(prefix: KeyValues) -> tuple[np.ndarray, ...]:
    """Slots that are attended to; empty ones may hold anything."""
    there = np.asarray(prefix.positions[0] != EMPTY)
    return (
        np.asarray(prefix.positions)[:, there],
        np.asarray(prefix.keys, np.float32)[:, :, there],
        np.asarray(prefix.values, np.float32)[:, :, there],
    )
