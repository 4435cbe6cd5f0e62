"""Divergences from the teacher's k best tokens alone: for a stored teacher, or one behind an API."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsp.losses.checks import (
    Logits,
    Losses,
    Mask,
    check_batch,
    check_count,
    check_floating,
    check_ids,
    prepare,
)
from jaxsp.losses.divergence import kl_terms
from jaxsp.typing import AnyArray, Array, Float, Int

TOP_K = 64
"""Entries kept where none are given but the whole distribution is at hand."""

_ROUNDING = 1e-6  # of a sum of float32 probabilities


class TopK(NamedTuple):
    """The best tokens of a distribution, best first; log-probabilities of the *whole* distribution."""

    log_probs: Float[Array, "*b t k"]
    ids: Int[Array, "*b t k"]


def top_k(logits: Logits, k: int = TOP_K) -> TopK:
    """The k most likely tokens and their log-probabilities, which sum to less than 1 (no renormalising).

    Args:
      logits: ``[*b, t, v]``, any float dtype.
      k: number of tokens; all v if there are fewer.

    Returns:
      ``TopK(log_probs, ids)``, float32 and int32 ``[*b, t, k]``, best first, ties by id.

    Raises:
      ValueError: the logits don't fit, or k < 1.

    Example:
      >>> import jax.numpy as jnp
      >>> best = top_k(jnp.log(jnp.array([[0.1, 0.6, 0.3]])), 2)
      >>> best.ids
      Array([[1, 2]], dtype=int32)
      >>> [f"{p:.2f}" for p in jnp.exp(best.log_probs)[0]]
      ['0.60', '0.30']
    """
    check_floating(logits=logits)
    check_count("k", k)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return TopK(*jax.lax.top_k(log_probs, min(k, logits.shape[-1])))


def topk_kl_divergence(
    teacher_log_probs: Float[AnyArray, "*b t k"],
    teacher_ids: Int[AnyArray, "*b t k"],
    student_logits: Logits,
    mask: Mask = None,
    *,
    k: int | None = None,
    teacher_tail: Float[AnyArray, "*b t"] | None = None,
) -> Losses:
    r"""KL divergence over the teacher's k best tokens and one bucket for all the others (the tail).

    .. math:: \sum_{v \in K} p_v \log \frac{p_v}{q_v} + p_{tail} \log \frac{p_{tail}}{q_{tail}},
              \quad p_{tail} = 1 - \sum_{v \in K} p_v

    A true divergence, of two coarser distributions: never above the full KL, rising with k, and equal
    to it once the tail holds at most one token. Nothing is renormalised.

    Args:
      teacher_log_probs: ``[*b, t, k]``, log-probabilities of the whole distribution; no gradient flows
        to them. ``-inf`` fills entries that are not there.
      teacher_ids: ``[*b, t, k]``, their tokens, in ``[0, v)``, each once.
      student_logits: ``[*b, t, v]``, any float dtype.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      k: entries used, the first ones, of those given; all if ``None``.
      teacher_tail: ``[*b, t]``, probability of all tokens that are not given; no gradient flows to it. By
        default it is what the given ones leave of 1, which rounding makes inexact where that is little.

    Returns:
      ``[*b, t]`` float32, in nats.

    Raises:
      ValueError: shapes, dtypes or ids don't fit, or k < 1.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = top_k(jnp.log(jnp.array([[0.6, 0.3, 0.05, 0.05]])), 2)
      >>> student = jnp.log(jnp.array([[0.3, 0.3, 0.1, 0.3]]))
      >>> f"{topk_kl_divergence(*teacher, student)[0]:.4f}"
      '0.2773'

    Reference:
      The data-processing inequality: Cover & Thomas 2006, Elements of Information Theory, ch. 2.
    """
    log_p, ids, log_q, mask = _prepared(teacher_log_probs, teacher_ids, student_logits, mask, k)
    log_q, log_q_tail = _listed_and_tail(log_q, ids)
    if teacher_tail is None:
        p_tail, exact_above = -jnp.expm1(jax.nn.logsumexp(log_p, axis=-1)), _ROUNDING
    else:
        p_tail, exact_above = _mass_beyond(k, teacher_log_probs, teacher_tail, mask), 0.0
    some = p_tail > 0
    rest = p_tail * (jnp.log(jnp.where(some, p_tail, 1.0)) - jnp.where(some, log_q_tail, 0.0))
    # A listed mass of 1 may be a little less by rounding, and the rest far from 0 where q has hardly
    # any: it must not lift the sum above the full divergence.
    rest = jnp.where(p_tail > exact_above, rest, jnp.where(some, jnp.minimum(rest, 0.0), 0.0))
    return jnp.where(mask, jnp.sum(kl_terms(log_p, log_q), axis=-1) + rest, 0.0)


def truncated_kl_divergence(
    teacher_log_probs: Float[AnyArray, "*b t k"],
    teacher_ids: Int[AnyArray, "*b t k"],
    student_logits: Logits,
    mask: Mask = None,
    *,
    k: int | None = None,
) -> Losses:
    r"""The k best tokens' terms of the KL divergence, the others dropped: *not* a divergence.

    .. math:: \sum_{v \in K} p_v \log \frac{p_v}{q_v}

    What several distillers train on, here to compare with. It can be negative, and its minimum is
    not at the teacher: it pulls all of the student's mass into the k tokens. Prefer
    ``topk_kl_divergence``.

    Args:
      teacher_log_probs: ``[*b, t, k]``, log-probabilities of the whole distribution; no gradient flows
        to them. ``-inf`` fills entries that are not there.
      teacher_ids: ``[*b, t, k]``, their tokens, in ``[0, v)``, each once.
      student_logits: ``[*b, t, v]``, any float dtype.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      k: entries used, the first ones, of those given; all if ``None``.

    Returns:
      ``[*b, t]`` float32, in nats.

    Raises:
      ValueError: shapes, dtypes or ids don't fit, or k < 1.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = top_k(jnp.log(jnp.array([[0.6, 0.3, 0.1]])), 2)
      >>> student = jnp.log(jnp.array([[0.66, 0.33, 0.01]]))
      >>> f"{truncated_kl_divergence(*teacher, student)[0]:.4f}"
      '-0.0858'

    Reference:
      Eyuboglu et al. 2025, Cartridges (arXiv:2506.06266), trains on the top tokens of the teacher.
    """
    log_p, ids, log_q, mask = _prepared(teacher_log_probs, teacher_ids, student_logits, mask, k)
    log_q = jnp.take_along_axis(log_q, ids, axis=-1, mode="fill")
    return jnp.where(mask, jnp.sum(kl_terms(log_p, log_q), axis=-1), 0.0)


def _prepared(
    teacher_log_probs: AnyArray, teacher_ids: AnyArray, student_logits: AnyArray, mask: Mask, k: int | None
) -> tuple[Array, Array, Array, Array]:
    """Checked; under the mask all is replaced by numbers, so that no NaN there reaches a gradient."""
    mask, logits = prepare(mask, student_logits=student_logits)
    check_floating("k", teacher_log_probs=teacher_log_probs)
    check_batch("teacher_log_probs", teacher_log_probs, mask.shape, "k")
    if k is not None:
        check_count("k", k)
    vocabulary = logits.shape[-1]
    log_p = jax.lax.stop_gradient(teacher_log_probs).astype(jnp.float32)
    there = mask[..., None] & (log_p != -jnp.inf)
    check_ids(teacher_ids, teacher_log_probs.shape, vocabulary, there, name="teacher_ids")
    ids = teacher_ids.astype(jnp.int32)
    # Out of range on either side reads NaN; an entry that is not there takes no token from the tail.
    ids = jnp.where(there & (ids >= 0), ids, vocabulary)
    log_p = jnp.where(mask[..., None], log_p, -jnp.inf)
    return log_p[..., :k], ids[..., :k], jax.nn.log_softmax(logits, axis=-1), mask


def _mass_beyond(k: int | None, log_probs: AnyArray, tail: AnyArray, mask: Array) -> Array:
    """The mass of all tokens but the first k: of the entries after these, and of those not given."""
    if tail.shape != mask.shape:
        raise ValueError(f"teacher_tail must have shape {list(mask.shape)}, not {list(tail.shape)}.")
    left_out = jnp.asarray(log_probs, jnp.float32)[..., log_probs.shape[-1] if k is None else k :]
    mass = jnp.asarray(tail, jnp.float32) + jnp.sum(jnp.exp(left_out), axis=-1)
    return jax.lax.stop_gradient(jnp.where(mask, mass, 0.0))


def _listed_and_tail(log_q: Array, ids: Array) -> tuple[Array, Array]:
    """The student's log-probabilities of the listed tokens, and of all others together.

    The tail is summed over the others themselves: 1 minus the listed mass would lose a small one.
    """
    listed = jnp.take_along_axis(log_q, ids, axis=-1, mode="fill")
    others = jnp.put_along_axis(log_q, ids, -jnp.inf, axis=-1, inplace=False, mode="drop")
    # An empty tail (all of the vocabulary listed) has log-probability -inf, and no gradient.
    some = jnp.any(others > -jnp.inf, axis=-1)
    tail = jax.nn.logsumexp(jnp.where(some[..., None], others, 0.0), axis=-1)
    return listed, jnp.where(some, tail, -jnp.inf)
