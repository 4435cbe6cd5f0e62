"""What is measured: every objective at every answer position, and whole answers against the teacher's."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp import distributions
from jaxsp.data.rows import Rows
from jaxsp.losses import Total, fused_objective, masked_sum
from jaxsp.models import decoder
from jaxsp.models.config import DecoderConfig
from jaxsp.models.language_model import LanguageModel
from jaxsp.typing import Array, Float, KeyValues, Params

REPORTED = ("kl", "reverse_kl", "js", "nll", "zero_one", "rank_agreement", "confidence_shift")
"""Of ``jaxsp.losses.OBJECTIVES``, those that every report has."""

BATCH = 16
_RESAMPLES = 4000


@functools.partial(jax.jit, static_argnames=("config", "names"))
def _at_positions(
    params: Params, config: DecoderConfig, prefix: KeyValues, rows: Rows, names: tuple[str, ...]
) -> dict[str, Array]:
    states = distributions.answer_hidden(params, config, prefix, rows)
    first, *others = names
    values, measured = fused_objective(
        first,
        states,
        decoder.unembedding(params, config),
        jnp.asarray(rows.mask),
        teacher_hidden=jnp.asarray(rows.teacher_hidden),
        targets=jnp.asarray(rows.targets),
        metrics=others,
        softcap=config.logit_softcap,
    )
    return {first: values, **measured}


def at_positions(
    model: LanguageModel, prefix: KeyValues, rows: Rows, names: Sequence[str] = REPORTED
) -> dict[str, Float[np.ndarray, "n a"]]:
    """Each named objective between the teacher and the model after ``prefix``, at every position.

    Args:
      model: the frozen model.
      prefix: of the condition measured.
      rows: with the teacher's hidden states.
      names: keys of ``jaxsp.losses.OBJECTIVES``.

    Returns:
      By name, ``[N, A]`` float32; 0 under a False mask.
    """
    size = min(BATCH, len(rows))
    parts = [
        _at_positions(
            model.params, model.config, prefix, rows.take(range(i, i + size)), tuple(names)
        )
        for i in range(0, len(rows), size)
    ]
    return {
        name: np.concatenate([np.asarray(p[name]) for p in parts])[: len(rows)] for name in names
    }


def prompt_kl_function(model: LanguageModel, rows: Rows, before: KeyValues, kind: str):
    """A function from σ to its mean KL over ``rows``, compiled once: what training watches."""

    @jax.jit
    def total(params: Params, before: KeyValues, sigma, rows: Rows) -> Total:
        config = model.config
        prefix = distributions.prompt_prefix(params, config, sigma, before, kind)
        values = _at_positions(params, config, prefix, rows, ("kl",))["kl"]
        return masked_sum(values, jnp.asarray(rows.mask))

    def mean_kl(sigma) -> float:
        size = min(BATCH, len(rows))
        parts = [
            total(model.params, before, sigma, rows.take(range(i, i + size)))
            for i in range(0, len(rows), size)
        ]
        return float(sum(float(p.total) for p in parts) / sum(float(p.count) for p in parts))

    return mean_kl


def answer_mismatch(reference: Sequence[int], answer: Sequence[int]) -> float:
    """1 if the two answers differ in any token, else 0."""
    return float(list(reference) != list(answer))


def rouge_l(reference: str, answer: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words, 1 for equal answers.

    Words are runs of letters and digits, in lower case. Two answers without words count as equal.

    Example:
      >>> rouge_l("The tank holds 1 litre.", "The tank holds 2 litres.")
      0.6

    Reference:
      Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries (aclanthology.org/W04-1013).
    """
    a, b = (re.findall(r"\w+", text.lower()) for text in (reference, answer))
    if not a or not b:
        return float(a == b)
    lengths = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if word == other else max(above, lengths[j - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(a) + len(b))


def gap_closed(
    prompt: tuple[np.ndarray, np.ndarray], bracket: tuple[np.ndarray, np.ndarray], seed: int = 0
) -> dict[str, float]:
    """1 - KL(σ) / KL(bracket), with a 95% percentile bootstrap interval over queries.

    Args:
      prompt: per query, KL of σ summed over its answer positions, and the number of these.
      bracket: the same of the condition compared with.
      seed: of the resampling.

    Returns:
      ``value``, ``low`` and ``high``; 1 is the full context, 0 the bracket.

    Reference:
      Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13.
    """
    (ours, counts), (theirs, _) = prompt, bracket
    draws = np.random.default_rng(seed).integers(len(ours), size=(_RESAMPLES, len(ours)))
    draws = np.concatenate([np.arange(len(ours))[None], draws])  # the first is the data itself
    kl_ours = ours[draws].sum(axis=1) / counts[draws].sum(axis=1)
    kl_theirs = theirs[draws].sum(axis=1) / counts[draws].sum(axis=1)
    gaps = 1 - kl_ours / np.maximum(kl_theirs, 1e-9)
    low, high = np.percentile(gaps[1:], [2.5, 97.5])
    return {"value": float(gaps[0]), "low": float(low), "high": float(high)}
