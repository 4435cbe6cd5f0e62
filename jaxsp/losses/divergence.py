"""Divergences between the teacher's and the student's whole token distributions, in nats.

All take logits ``[*b, t, v]`` in any float dtype and return unreduced float32 ``[*b, t]``: exactly 0,
with zero gradient, where the mask is False (even over NaN). The teacher gets no gradient. ``-inf``
logits (banned tokens) are legal; a token that one side bans and the other does not can make a
divergence infinite, as the mathematics says, and then its gradient means nothing.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.losses.checks import Logits, Losses, Mask, fraction, prepare
from jaxsp.typing import Array


def kl_divergence(
    teacher_logits: Logits, student_logits: Logits, mask: Mask = None, *, temperature: float = 1.0
) -> Losses:
    r"""Kullback-Leibler divergence of the student from the teacher, over the whole vocabulary.

    .. math:: KL(p \| q) = \sum_v p_v (\log p_v - \log q_v)

    with p the teacher's and q the student's distribution. Minimising it over the student covers all
    that the teacher finds plausible. Its gradient with respect to the student's logits is q - p.

    Args:
      teacher_logits: ``[*b, t, v]``; no gradient flows to it.
      student_logits: ``[*b, t, v]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      temperature: both sides' logits are divided by it. The result is not rescaled by its square.

    Returns:
      ``[*b, t]`` float32, in nats, never negative beyond rounding.

    Raises:
      ValueError: shapes or dtypes don't fit, or the temperature is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.9, 0.1]]))
      >>> kl_divergence(p, q).round(4)
      Array([0.5108], dtype=float32)

    Reference:
      Kullback & Leibler 1951; for distilling language models: Hinton et al. 2015 (arXiv:1503.02531).
    """
    p, q, mask = _log_probs(teacher_logits, student_logits, mask, temperature)
    return jnp.where(mask, jnp.sum(kl_terms(p, q), axis=-1), 0.0)


def reverse_kl_divergence(
    teacher_logits: Logits, student_logits: Logits, mask: Mask = None, *, temperature: float = 1.0
) -> Losses:
    r"""Kullback-Leibler divergence of the teacher from the student: KL(q ‖ p).

    .. math:: KL(q \| p) = \sum_v q_v (\log q_v - \log p_v)

    Minimising it over the student avoids what the teacher finds implausible (mode seeking).

    Args:
      teacher_logits: ``[*b, t, v]``; no gradient flows to it.
      student_logits: ``[*b, t, v]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      temperature: both sides' logits are divided by it.

    Returns:
      ``[*b, t]`` float32, in nats.

    Raises:
      ValueError: shapes or dtypes don't fit, or the temperature is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.9, 0.1]]))
      >>> reverse_kl_divergence(p, q).round(4)
      Array([0.3681], dtype=float32)

    Reference:
      Gu et al. 2023, MiniLLM (arXiv:2306.08543).
    """
    p, q, mask = _log_probs(teacher_logits, student_logits, mask, temperature)
    return jnp.where(mask, jnp.sum(kl_terms(q, p), axis=-1), 0.0)


def js_divergence(
    teacher_logits: Logits,
    student_logits: Logits,
    mask: Mask = None,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Losses:
    r"""Generalised Jensen-Shannon divergence.

    .. math:: JS_\beta = \beta\, KL(p \| m) + (1 - \beta)\, KL(q \| m),\quad m = \beta p + (1 - \beta) q

    with p the teacher's and q the student's distribution. At ``beta=0.5`` it is symmetric and at most
    ln 2. Divided by beta (1 - beta) it tends to KL(p ‖ q), the ``kl_divergence``, as beta → 0 and to
    KL(q ‖ p), the ``reverse_kl_divergence``, as beta → 1. At 0 and 1 themselves, where the formula is 0
    for all p and q, these limits are what is returned.

    Args:
      teacher_logits: ``[*b, t, v]``; no gradient flows to it.
      student_logits: ``[*b, t, v]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      beta: the teacher's weight in the mixture m, between 0 and 1.
      temperature: both sides' logits are divided by it.

    Returns:
      ``[*b, t]`` float32, in nats; for beta inside (0, 1) finite even where one side bans a token.

    Raises:
      ValueError: shapes or dtypes don't fit, beta is outside [0, 1] or the temperature not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.9, 0.1]]))
      >>> js_divergence(p, q).round(4)
      Array([0.1017], dtype=float32)

    Reference:
      Lin 1991; generalised for distillation: Agarwal et al. 2023 (arXiv:2306.13649).
    """
    beta = float(np.float32(fraction("beta", beta)))
    if beta in (0.0, 1.0):
        limit = reverse_kl_divergence if beta else kl_divergence
        return limit(teacher_logits, student_logits, mask, temperature=temperature)
    p, q, mask = _log_probs(teacher_logits, student_logits, mask, temperature)
    m = _log_mixture(p, q, beta)
    terms = beta * kl_terms(p, m) + (1 - beta) * kl_terms(q, m)
    return jnp.where(mask, jnp.sum(terms, axis=-1), 0.0)


def total_variation(
    teacher_logits: Logits, student_logits: Logits, mask: Mask = None, *, temperature: float = 1.0
) -> Losses:
    r"""Total variation distance: the largest difference in the probability of any set of tokens.

    .. math:: TV(p, q) = \tfrac12 \sum_v |p_v - q_v|

    It bounds both divergences from below (Pinsker): :math:`TV \le \sqrt{KL/2}`. 1 - TV is the
    chance that speculative decoding accepts the student's token.

    Args:
      teacher_logits: ``[*b, t, v]``; no gradient flows to it.
      student_logits: ``[*b, t, v]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      temperature: both sides' logits are divided by it.

    Returns:
      ``[*b, t]`` float32, between 0 and 1.

    Raises:
      ValueError: shapes or dtypes don't fit, or the temperature is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.9, 0.1]]))
      >>> f"{total_variation(p, q)[0]:.2f}"
      '0.40'

    Reference:
      For distilling language models: Wen et al. 2023, f-DISTILL (arXiv:2307.15190).
    """
    p, q, mask = _log_probs(teacher_logits, student_logits, mask, temperature)
    return jnp.where(mask, jnp.sum(jnp.abs(jnp.exp(p) - jnp.exp(q)), axis=-1) / 2, 0.0)


def _log_probs(
    teacher_logits: Logits, student_logits: Logits, mask: Mask, temperature: float
) -> tuple[Array, Array, Array]:
    mask, p, q = prepare(mask, temperature, teacher_logits=teacher_logits, student_logits=student_logits)
    return jax.nn.log_softmax(p), jax.nn.log_softmax(q), mask


def kl_terms(log_p: Array, log_q: Array) -> Array:
    """p (log p - log q) of each token, where 0 log 0 = 0, from log-probabilities."""
    # The inner `where` keeps -inf - -inf out of the gradient; the outer one is for a p that
    # underflows, of which the product would make 0 · ∞.
    possible, banned = log_p > -jnp.inf, log_q == -jnp.inf
    known = possible & ~banned
    terms = jnp.exp(log_p) * (jnp.where(known, log_p, 0.0) - jnp.where(known, log_q, 0.0))
    return jnp.where(possible & banned, jnp.inf, terms)


def _log_mixture(log_p: Array, log_q: Array, beta: float) -> Array:
    # log(beta p + (1-beta) q), with a finite gradient where both are 0.
    a, b = log_p + math.log(beta), log_q + math.log1p(-beta)
    either = jnp.maximum(a, b) > -jnp.inf
    return jnp.where(either, jnp.logaddexp(jnp.where(either, a, 0.0), jnp.where(either, b, 0.0)), -jnp.inf)
