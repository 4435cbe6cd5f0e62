"""Divergences from the teacher's k best tokens alone: for a stored teacher, or one behind an API.

All others of either side are one more token, the *tail*: so these are divergences of coarser distributions,
true ones. Two forms that other distillers train on are here to compare with: they leave the tail out
(``truncated_kl_divergence``), or also divide by the mass of the listed (``renormalised_topk_kl_divergence``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsp.losses import checks
from jaxsp.losses.checks import Logits, Losses, Mask, Number, prepare
from jaxsp.losses.divergence import js, kl, kl_terms, reverse_kl
from jaxsp.losses.vocabulary import Found, Piece, compared, log_softmax, on_auto_axes, with_numbers
from jaxsp.typing import AnyArray, Array, Float, Int

TOPK = 64
"""Entries kept where none are given but the whole distribution is at hand."""

_ROUNDING = 1e-6  # of a sum of float32 probabilities

LogProbs = Float[AnyArray, "*t k"]
Ids = Int[AnyArray, "*t k"]
Tail = Float[AnyArray, "*t"] | None


class TopK(NamedTuple):
    """The best tokens of a distribution, best first; log-probabilities of the *whole* distribution."""

    log_probs: Float[Array, "*t k"]
    ids: Int[Array, "*t k"]


class TopKAndTail(NamedTuple):
    """The best tokens of a distribution, best first, and the mass of all others."""

    log_probs: Float[Array, "*t k"]
    ids: Int[Array, "*t k"]
    tail: Float[Array, "*t"]


def topk(logits: Logits, k: int = TOPK) -> TopK:
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
      >>> best = topk(jnp.log(jnp.array([[0.1, 0.6, 0.3]])), 2)
      >>> best.ids
      Array([[1, 2]], dtype=int32)
      >>> [f"{p:.2f}" for p in jnp.exp(best.log_probs)[0]]
      ['0.60', '0.30']
    """
    checks.check_floating(logits=logits)
    checks.check_count("k", k)
    return TopK(*on_auto_axes(lambda x: topk_and_tail(x, k)[:2], jnp.asarray(logits), jnp.asarray(logits)))


def topk_and_tail(logits: Array, k: int) -> TopKAndTail:
    """The same with the mass of all others, summed over these: 1 minus the listed would lose a small one."""
    log_probs = log_softmax(logits.astype(jnp.float32))
    best, ids = jax.lax.top_k(log_probs, min(k, logits.shape[-1]))
    others = jnp.put_along_axis(log_probs, ids, -jnp.inf, axis=-1, inplace=False)
    return TopKAndTail(best, ids, jnp.sum(jnp.exp(others), axis=-1))


def topk_kl_divergence(
    teacher_log_probs: LogProbs,
    teacher_ids: Ids,
    student_logits: Logits,
    mask: Mask = None,
    *,
    k: int | None = None,
    teacher_tail: Tail = None,
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
        default it is what the given ones leave of 1, which rounding makes inexact where that is little;
        in half precision it means nothing, and must be given.

    Returns:
      ``[*b, t]`` float32, in nats.

    Raises:
      ValueError: shapes, dtypes or ids don't fit, k < 1, or the tail of a half-precision teacher is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = topk(jnp.log(jnp.array([[0.6, 0.3, 0.05, 0.05]])), 2)
      >>> student = jnp.log(jnp.array([[0.3, 0.3, 0.1, 0.3]]))
      >>> f"{topk_kl_divergence(*teacher, student)[0]:.4f}"
      '0.2773'

    Reference:
      The data-processing inequality: Cover & Thomas 2006, Elements of Information Theory, ch. 2.
    """
    return _over_best(kl, teacher_log_probs, teacher_ids, student_logits, mask, k, teacher_tail)


def topk_reverse_kl_divergence(
    teacher_log_probs: LogProbs,
    teacher_ids: Ids,
    student_logits: Logits,
    mask: Mask = None,
    *,
    k: int | None = None,
    teacher_tail: Tail = None,
) -> Losses:
    r"""Reverse KL divergence over the teacher's k best tokens and one bucket for all the others.

    .. math:: \sum_{v \in K} q_v \log \frac{q_v}{p_v} + q_{tail} \log \frac{q_{tail}}{p_{tail}}

    Args:
      teacher_log_probs: ``[*b, t, k]``, as in ``topk_kl_divergence``.
      teacher_ids: ``[*b, t, k]``, their tokens, in ``[0, v)``, each once.
      student_logits: ``[*b, t, v]``, any float dtype.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      k: entries used, the first ones, of those given; all if ``None``.
      teacher_tail: ``[*b, t]``, probability of all tokens that are not given. Where it is only what these
        leave of 1, less than 0.000001, which rounding hides, counts as that.

    Returns:
      ``[*b, t]`` float32, in nats; never above ``reverse_kl_divergence`` where the tail is given and
      not 0.

    Raises:
      ValueError: shapes, dtypes or ids don't fit, k < 1, or the tail of a half-precision teacher is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = topk(jnp.log(jnp.array([[0.6, 0.3, 0.05, 0.05]])), 2)
      >>> student = jnp.log(jnp.array([[0.3, 0.3, 0.1, 0.3]]))
      >>> f"{topk_reverse_kl_divergence(*teacher, student)[0]:.4f}"
      '0.3466'

    Reference:
      Gu et al. 2023, MiniLLM (arXiv:2306.08543), here of coarser distributions.
    """
    least = _ROUNDING if teacher_tail is None else 0.0
    sides = teacher_log_probs, teacher_ids, student_logits
    return _over_best(reverse_kl, *sides, mask, k, teacher_tail, least_tail=least)


def topk_js_divergence(
    teacher_log_probs: LogProbs,
    teacher_ids: Ids,
    student_logits: Logits,
    mask: Mask = None,
    *,
    beta: Number = 0.5,
    k: int | None = None,
    teacher_tail: Tail = None,
) -> Losses:
    r"""Generalised Jensen-Shannon divergence over the teacher's k best tokens and one bucket for the others.

    .. math:: \beta\, KL(p \| m) + (1 - \beta)\, KL(q \| m),\quad m = \beta p + (1 - \beta) q

    Args:
      teacher_log_probs: ``[*b, t, k]``, as in ``topk_kl_divergence``.
      teacher_ids: ``[*b, t, k]``, their tokens, in ``[0, v)``, each once.
      student_logits: ``[*b, t, v]``, any float dtype.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      beta: the teacher's weight in the mixture m, between 0 and 1, as in ``js_divergence``.
      k: entries used, the first ones, of those given; all if ``None``.
      teacher_tail: ``[*b, t]``, probability of all tokens that are not given; by default what these leave.

    Returns:
      ``[*b, t]`` float32, in nats.

    Raises:
      ValueError: shapes, dtypes or ids don't fit, k < 1, beta is outside [0, 1], or the tail of a
        half-precision teacher is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = topk(jnp.log(jnp.array([[0.6, 0.3, 0.05, 0.05]])), 2)
      >>> student = jnp.log(jnp.array([[0.3, 0.3, 0.1, 0.3]]))
      >>> f"{topk_js_divergence(*teacher, student)[0]:.4f}"
      '0.0737'

    Reference:
      Agarwal et al. 2023 (arXiv:2306.13649), here of coarser distributions.
    """
    beta = checks.fraction("beta", beta)
    return _over_best(js, teacher_log_probs, teacher_ids, student_logits, mask, k, teacher_tail, beta)


def truncated_kl_divergence(
    teacher_log_probs: LogProbs,
    teacher_ids: Ids,
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
      teacher_log_probs: ``[*b, t, k]``, as in ``topk_kl_divergence``.
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
      >>> teacher = topk(jnp.log(jnp.array([[0.6, 0.3, 0.1]])), 2)
      >>> student = jnp.log(jnp.array([[0.66, 0.33, 0.01]]))
      >>> f"{truncated_kl_divergence(*teacher, student)[0]:.4f}"
      '-0.0858'

    Reference:
      Eyuboglu et al. 2025, Cartridges (arXiv:2506.06266), trains on the top tokens of the teacher.
    """
    return _over_best(_truncated, teacher_log_probs, teacher_ids, student_logits, mask, k, without_tail=True)


def renormalised_topk_kl_divergence(
    teacher_log_probs: LogProbs,
    teacher_ids: Ids,
    student_logits: Logits,
    mask: Mask = None,
    *,
    k: int | None = None,
) -> Losses:
    r"""KL divergence of the k best tokens among themselves, both sides divided by their mass there.

    .. math:: \sum_{v \in K} \tilde p_v \log \frac{\tilde p_v}{\tilde q_v},\quad
              \tilde p_v = p_v / \textstyle\sum_K p,\ \tilde q_v = q_v / \textstyle\sum_K q

    The form most used for stored top-k teachers, here to compare with. How much of the student's mass is on
    other tokens it does not see: they may take nearly all. Prefer ``topk_kl_divergence``.

    Args:
      teacher_log_probs: ``[*b, t, k]``, as in ``topk_kl_divergence``.
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
      >>> teacher = topk(jnp.log(jnp.array([[0.6, 0.3, 0.1]])), 2)
      >>> student = jnp.log(jnp.array([[0.02, 0.01, 0.97]]))  # nearly all elsewhere: it does not mind
      >>> f"{renormalised_topk_kl_divergence(*teacher, student)[0]:.4f}"
      '0.0000'

    Reference:
      As a bias of stored logits: Anshumann et al. 2025, Sparse Logit Sampling (arXiv:2503.16870).
    """
    sides = teacher_log_probs, teacher_ids, student_logits
    return _over_best(_renormalised, *sides, mask, k, without_tail=True)


def _truncated(log_q: Array, log_p: Array) -> Found:
    return kl(log_q[..., :-1], log_p[..., :-1])


def _renormalised(log_q: Array, log_p: Array) -> Found:
    p, q = (_normalised(side[..., :-1]) for side in (log_p, log_q))
    return jnp.sum(kl_terms(p, q), axis=-1), jnp.exp(q) - jnp.exp(p), None


def _normalised(logs: Array) -> Array:
    some = jnp.max(logs, axis=-1, keepdims=True) != -jnp.inf  # none is there under the mask
    return log_softmax(jnp.where(some, logs, 0.0))


def _over_best(
    piece: Piece,
    teacher_log_probs: AnyArray,
    teacher_ids: AnyArray,
    student_logits: AnyArray,
    mask: Mask,
    k: int | None,
    teacher_tail: Tail = None,
    *number: Any,
    least_tail: float = 0.0,
    without_tail: bool = False,
) -> Losses:
    """The piece of the two coarser distributions ``[*b, t, k + 1]``, whose last token is the tail."""
    live, logits = prepare(mask, student_logits=student_logits)
    there = checks.check_entries(teacher_log_probs, teacher_ids, live, logits.shape[-1])
    if k is not None:
        checks.check_count("k", k)
    exact = teacher_tail is not None
    if exact:
        checks.check_shape("teacher_tail", teacher_tail, live.shape)
    elif not without_tail and jnp.finfo(teacher_log_probs.dtype).bits < 32:
        raise ValueError(
            f"teacher_log_probs are {teacher_log_probs.dtype}: what they leave of 1 is lost to rounding;"
            " give it as teacher_tail, or keep them in float32."
        )
    piece, traced = with_numbers(piece, *number)

    def values(logits: Array, there: Array, log_p: Array, ids: Array, tail: Array, *numbers: Array) -> Array:
        log_p = jnp.where(there, jax.lax.stop_gradient(log_p).astype(jnp.float32), -jnp.inf)
        # Out of range on either side reads NaN; an entry that is not there takes no token from the tail.
        ids = jnp.where(there & (ids >= 0), ids.astype(jnp.int32), logits.shape[-1])
        mass = -jnp.expm1(jax.nn.logsumexp(log_p[..., :k], axis=-1))
        if exact:  # and that of the entries after the first k
            left_out = jnp.sum(jnp.exp(log_p[..., log_p.shape[-1] if k is None else k :]), axis=-1)
            mass = jax.lax.stop_gradient(tail).astype(jnp.float32) + left_out
        mass = jnp.maximum(mass, least_tail)
        coarse = _of_coarse(piece, 0.0 if exact or least_tail else _ROUNDING)
        return compared(coarse, logits, log_p[..., :k], ids[..., :k], mass, *numbers)

    tail = jnp.where(live, 0.0 if teacher_tail is None else teacher_tail, 0.0)
    arrays = there, teacher_log_probs, teacher_ids, tail
    found = on_auto_axes(values, logits, logits, *map(jnp.asarray, arrays), *traced)
    return jnp.where(live, found, 0.0)


def _of_coarse(piece: Piece, inexact_below: float) -> Piece:
    """The piece of k tokens and all others together, as one of the whole vocabulary."""

    def whole(
        log_q: Array, log_p: Array, ids: Array, tail: Array, *number: Any
    ) -> tuple[Array, Array, Array]:
        listed = jnp.take_along_axis(log_q, ids, axis=-1, mode="fill")
        listed = jnp.where(log_p == -jnp.inf, -jnp.inf, listed)
        others = jnp.put_along_axis(log_q, ids, -jnp.inf, axis=-1, inplace=False, mode="drop")
        # Summed over the others themselves. All of the vocabulary listed leaves an empty tail.
        some = jnp.any(others > -jnp.inf, axis=-1)
        log_rest = jax.nn.logsumexp(jnp.where(some[..., None], others, 0.0), axis=-1)
        log_rest = jnp.where(some, log_rest, -jnp.inf)
        # A listed mass of 1 may be a little less by rounding, and the rest far from 0 where q has hardly
        # any: it must not lift a divergence above that of the whole distributions.
        log_tail = jnp.log(jnp.maximum(tail, 0.0))
        log_tail = jnp.where(tail > inexact_below, log_tail, jnp.minimum(log_tail, log_rest))
        q, p = (jnp.concatenate([a, b[..., None]], -1) for a, b in ((listed, log_rest), (log_p, log_tail)))
        value, slope, _ = piece(q, p, *number)
        within = jnp.exp(others - jnp.where(some, log_rest, 0.0)[..., None])  # q of the others, given these
        k = ids.shape[-1]
        spread = within * slope[..., k:] if slope.shape[-1] > k else jnp.zeros_like(log_q)
        spread = jnp.put_along_axis(spread, ids, slope[..., :k], axis=-1, inplace=False, mode="drop")
        return value, spread, jnp.sum(slope, axis=-1)

    return whole
