"""Divergences between the teacher's and the student's whole token distributions, in nats.

All take logits ``[*b, t, v]`` in any float dtype and return unreduced float32 ``[*b, t]``: exactly 0,
with zero gradient, where the mask is False (even over NaN). The teacher gets no gradient. ``-inf``
logits (banned tokens) are legal; a token that one side bans and the other does not can make a
divergence infinite, as the mathematics says, and then its gradient means nothing. What has a probability of
0 in float32 counts as having none.

Temperature, beta and alpha may be traced, as a schedule's within one compiled loop; no gradient flows to
them. Where the logits are sharded over the vocabulary, ``axis_name`` names the mapped axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.losses.checks import Logits, Losses, Mask, Number, finite, fraction, number, positive, prepare
from jaxsp.losses.vocabulary import Found, Piece, compared, log_softmax, total, total_over_tokens
from jaxsp.typing import Array


def kl_divergence(
    teacher_logits: Logits,
    student_logits: Logits,
    mask: Mask = None,
    *,
    temperature: Number = 1.0,
    axis_name: str | None = None,
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
      axis_name: mapped axis over which the vocabulary is sharded, if it is.

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
    return _divergence(kl, teacher_logits, student_logits, mask, temperature, axis_name)


def reverse_kl_divergence(
    teacher_logits: Logits,
    student_logits: Logits,
    mask: Mask = None,
    *,
    temperature: Number = 1.0,
    axis_name: str | None = None,
) -> Losses:
    r"""Kullback-Leibler divergence of the teacher from the student: KL(q ‖ p).

    .. math:: KL(q \| p) = \sum_v q_v (\log q_v - \log p_v)

    Minimising it over the student avoids what the teacher finds implausible (mode seeking).

    Args:
      teacher_logits: ``[*b, t, v]``; no gradient flows to it.
      student_logits: ``[*b, t, v]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      temperature: both sides' logits are divided by it.
      axis_name: mapped axis over which the vocabulary is sharded, if it is.

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
    return _divergence(reverse_kl, teacher_logits, student_logits, mask, temperature, axis_name)


def js_divergence(
    teacher_logits: Logits,
    student_logits: Logits,
    mask: Mask = None,
    *,
    beta: Number = 0.5,
    temperature: Number = 1.0,
    axis_name: str | None = None,
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
      axis_name: mapped axis over which the vocabulary is sharded, if it is.

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
    beta = fraction("beta", beta)
    return _divergence(js, teacher_logits, student_logits, mask, temperature, axis_name, beta)


def skewed_kl_divergence(
    teacher_logits: Logits,
    student_logits: Logits,
    mask: Mask = None,
    *,
    alpha: Number = 0.1,
    temperature: Number = 1.0,
    axis_name: str | None = None,
) -> Losses:
    r"""Kullback-Leibler divergence from the teacher of a student with a little of the teacher mixed in.

    .. math:: KL(p \| \alpha p + (1 - \alpha) q)

    At most -log α, with gradients that don't explode where the student finds a token of the teacher's
    hardly possible.

    Args:
      teacher_logits: ``[*b, t, v]``; no gradient flows to it.
      student_logits: ``[*b, t, v]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      alpha: share of the teacher, between 0 (``kl_divergence``) and 1 (0 for all p and q).
      temperature: both sides' logits are divided by it.
      axis_name: mapped axis over which the vocabulary is sharded, if it is.

    Returns:
      ``[*b, t]`` float32, in nats.

    Raises:
      ValueError: shapes or dtypes don't fit, alpha is outside [0, 1] or the temperature not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.9, 0.1]]))
      >>> f"{skewed_kl_divergence(p, q)[0]:.4f}"
      '0.3653'

    Reference:
      Ko et al. 2024, DistiLLM (arXiv:2402.03898).
    """
    alpha = fraction("alpha", alpha)
    return _divergence(_skewed_kl, teacher_logits, student_logits, mask, temperature, axis_name, alpha)


def alpha_divergence(
    teacher_logits: Logits,
    student_logits: Logits,
    mask: Mask = None,
    *,
    alpha: Number = 0.5,
    temperature: Number = 1.0,
    axis_name: str | None = None,
) -> Losses:
    r"""Amari's α-divergence, from KL(q ‖ p) at α = 0 to KL(p ‖ q) at α = 1.

    .. math:: \frac{1 - \sum_v p_v^\alpha q_v^{1 - \alpha}}{\alpha (1 - \alpha)}

    Between 0 and 1 it is finite even where one side bans a token. At ½ it is four times the squared
    Hellinger distance.

    Args:
      teacher_logits: ``[*b, t, v]``; no gradient flows to it.
      student_logits: ``[*b, t, v]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      alpha: any number; large ones look at what the student finds too unlikely. Closer than 0.001 to 0 or
        1, but not there, rounding shows.
      temperature: both sides' logits are divided by it.
      axis_name: mapped axis over which the vocabulary is sharded, if it is.

    Returns:
      ``[*b, t]`` float32, in nats.

    Raises:
      ValueError: shapes or dtypes don't fit, alpha is not finite or the temperature not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.9, 0.1]]))
      >>> f"{alpha_divergence(p, q)[0]:.4f}"
      '0.4223'

    Reference:
      Amari 2009, α-Divergence Is Unique, Belonging to Both f-Divergence and Bregman Divergence Classes
      (doi:10.1109/TIT.2009.2030485); in this form: Minka 2005, Divergence Measures and Message Passing.
    """
    alpha = finite("alpha", alpha)
    return _divergence(_alpha, teacher_logits, student_logits, mask, temperature, axis_name, alpha)


def renyi_divergence(
    teacher_logits: Logits,
    student_logits: Logits,
    mask: Mask = None,
    *,
    alpha: float = 0.5,
    temperature: Number = 1.0,
    axis_name: str | None = None,
) -> Losses:
    r"""Rényi's divergence of order α; KL(p ‖ q) at α = 1.

    .. math:: \frac{1}{\alpha - 1} \log \sum_v p_v^\alpha q_v^{1 - \alpha}

    Args:
      teacher_logits: ``[*b, t, v]``; no gradient flows to it.
      student_logits: ``[*b, t, v]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      alpha: the order, positive; known when the program is traced.
      temperature: both sides' logits are divided by it.
      axis_name: mapped axis over which the vocabulary is sharded, if it is.

    Returns:
      ``[*b, t]`` float32, in nats.

    Raises:
      ValueError: shapes or dtypes don't fit, or alpha or the temperature is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.9, 0.1]]))
      >>> f"{renyi_divergence(p, q)[0]:.4f}"
      '0.2231'

    Reference:
      Rényi 1961; van Erven & Harremoës 2014, Rényi Divergence and Kullback-Leibler Divergence
      (arXiv:1206.2459).
    """
    alpha = positive("alpha", number("alpha", alpha))
    sides = teacher_logits, student_logits, mask, temperature, axis_name
    return _divergence(kl, *sides) if np.float32(alpha) == 1 else _divergence(_renyi, *sides, alpha)


def total_variation(
    teacher_logits: Logits,
    student_logits: Logits,
    mask: Mask = None,
    *,
    temperature: Number = 1.0,
    axis_name: str | None = None,
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
      axis_name: mapped axis over which the vocabulary is sharded, if it is.

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
    return _divergence(_total_variation, teacher_logits, student_logits, mask, temperature, axis_name)


def _divergence(
    piece: Piece, teacher: Any, student: Any, mask: Mask, temperature: Any, axis_name: Any, *number: Any
) -> Losses:
    mask, p, q = prepare(mask, temperature, teacher_logits=teacher, student_logits=student)
    log_p = log_softmax(p, axis_name)
    return jnp.where(mask, compared(piece, q, log_p, *number, axis_name=axis_name), 0.0)


# Pieces: see `vocabulary.Piece`. What is the same multiple of q for all tokens is left out of a slope: the
# gradient to the logits stays the same.


def kl(log_q: Array, log_p: Array, axis_name: str | None = None) -> Found:
    """KL(p ‖ q)."""
    return total_over_tokens(kl_terms(log_p, log_q), axis_name), -jnp.exp(log_p), -1.0


def reverse_kl(log_q: Array, log_p: Array, axis_name: str | None = None) -> Found:
    """KL(q ‖ p)."""
    terms = kl_terms(log_q, log_p)
    value = total_over_tokens(terms, axis_name)
    return value, terms, value


def js(log_q: Array, log_p: Array, beta: Any, axis_name: str | None = None) -> Found:
    """The generalised Jensen-Shannon divergence; at the ends of beta its limits."""

    def inside() -> Found:
        log_m = jnp.log(_mixture(log_p, log_q, beta))
        slope = (1 - beta) * kl_terms(log_q, log_m)
        value = total_over_tokens(beta * kl_terms(log_p, log_m) + slope, axis_name)
        return value, slope, total_over_tokens(slope, axis_name)

    return _between(beta, (kl, reverse_kl), inside, log_q, log_p, axis_name)


def _alpha(log_q: Array, log_p: Array, alpha: Any, axis_name: str | None = None) -> Found:
    def inside() -> Found:
        powers = jnp.exp(_log_powers(log_p, log_q, alpha))
        terms = alpha * jnp.exp(log_p) + (1 - alpha) * jnp.exp(log_q) - powers
        slope = -powers / alpha
        value = total_over_tokens(terms / (alpha * (1 - alpha)), axis_name)
        return value, slope, total_over_tokens(slope, axis_name)

    return _between(alpha, (reverse_kl, kl), inside, log_q, log_p, axis_name)


def _renyi(log_q: Array, log_p: Array, alpha: float, axis_name: str | None = None) -> Found:
    logs = _log_powers(log_p, log_q, alpha)
    top = jnp.max(logs, axis=-1, keepdims=True)
    top = jnp.nan_to_num(top if axis_name is None else jax.lax.pmax(top, axis_name), neginf=0.0)
    sums = total(jnp.sum(jnp.exp(logs - top), axis=-1, keepdims=True), axis_name)
    log_sum = top + jnp.log(sums)
    # Near 1 the sum's logarithm is lost to rounding, and what it lacks of 1 is not.
    lacks = alpha * (alpha - 1) * _alpha(log_q, log_p, alpha, axis_name)[0]
    near = jnp.abs(lacks) < 0.5
    value = jnp.where(near, jnp.log1p(jnp.where(near, lacks, 0.0)), log_sum[..., 0]) / (alpha - 1)
    return value, -jnp.exp(logs - log_sum), -1.0


def _skewed_kl(log_q: Array, log_p: Array, alpha: Any, axis_name: str | None = None) -> Found:
    def inside() -> Found:
        m = _mixture(log_p, log_q, alpha)
        slope = -(1 - alpha) * jnp.exp(log_p) * (jnp.exp(log_q) / m)
        value = total_over_tokens(kl_terms(log_p, jnp.log(m)), axis_name)
        return value, slope, total_over_tokens(slope, axis_name)

    return _between(alpha, (kl, lambda *_: inside()), inside, log_q, log_p, axis_name)


def _total_variation(log_q: Array, log_p: Array, axis_name: str | None = None) -> Found:
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    value = total_over_tokens(jnp.abs(p - q), axis_name) / 2
    return value, jnp.sign(q - p) * q / 2, None


def _between(number: Any, ends: tuple[Piece, Piece], inside: Callable[[], Found], *sides: Any) -> Found:
    """The piece of an end if the number is 0 or 1, else ``inside``; of a traced number all are computed."""
    if isinstance(number, float):
        return ends[int(number)](*sides) if number in (0.0, 1.0) else inside()
    found = inside()
    for end, piece in enumerate(ends):
        found = jax.tree.map(lambda a, b, end=end: jnp.where(number == end, a, b), piece(*sides), found)
    return found


def kl_terms(log_p: Array, log_q: Array) -> Array:
    """p (log p - log q) of each token, from log-probabilities; 0 where p is 0, if only by underflow."""
    p = jnp.exp(log_p)
    gone = p == 0  # inside, too: the gradient of what is not taken must be a number
    return jnp.where(gone, 0.0, p * (jnp.where(gone, 0.0, log_p) - jnp.where(gone, 0.0, log_q)))


def _mixture(log_p: Array, log_q: Array, beta: Any) -> Array:
    """beta p + (1 - beta) q of each token, never 0: float32's least normal number stands for what is less."""
    mixture = beta * jnp.exp(log_p) + (1 - beta) * jnp.exp(log_q)
    return jnp.maximum(mixture, jnp.finfo(jnp.float32).tiny)


def _log_powers(log_p: Array, log_q: Array, alpha: Any) -> Array:
    """log(p^α q^(1-α)) of each token; -inf where both are 0."""
    possible = (log_p > -jnp.inf) | (log_q > -jnp.inf)
    return jnp.where(possible, alpha * log_p + (1 - alpha) * log_q, -jnp.inf)
