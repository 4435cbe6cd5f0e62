"""The certainty of a prediction, and whether the student is as sure as the teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsp.losses.checks import Logits, Losses, Mask, Number, prepare
from jaxsp.losses.divergence import kl_terms
from jaxsp.losses.vocabulary import Found, compared, total_over_tokens
from jaxsp.typing import Array


def entropy(
    logits: Logits, mask: Mask = None, *, temperature: Number = 1.0, axis_name: str | None = None
) -> Losses:
    r"""Shannon entropy of a token distribution.

    .. math:: H(p) = -\sum_v p_v \log p_v

    Args:
      logits: ``[*b, t, v]`` of teacher or student.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      temperature: the logits are divided by it.
      axis_name: mapped axis over which the vocabulary is sharded, if it is.

    Returns:
      ``[*b, t]`` float32, in nats, from 0 (sure) to ln v (uniform).

    Raises:
      ValueError: shapes or dtypes don't fit, or the temperature is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> entropy(jnp.array([[0.0, 0.0, -jnp.inf]])).round(4)
      Array([0.6931], dtype=float32)

    Reference:
      Shannon 1948; as an objective (entropy minimisation): Grandvalet & Bengio 2004, Semi-supervised
      Learning by Entropy Minimization.
    """
    mask, logits = prepare(mask, temperature, logits=logits)
    return jnp.where(mask, compared(_entropy, logits, axis_name=axis_name), 0.0)


def _entropy(log_q: Array, axis_name: str | None = None) -> Found:
    terms = -kl_terms(log_q, jnp.zeros_like(log_q))
    value = total_over_tokens(terms, axis_name)
    return value, terms, value


def confidence_shift(teacher_logits: Logits, student_logits: Logits, mask: Mask = None) -> Losses:
    r"""Difference in certainty: the student's of its first token, less the teacher's of its own.

    .. math:: \max_v q_v - \max_v p_v

    Args:
      teacher_logits: ``[*b, t, v]``; no gradient flows to it.
      student_logits: ``[*b, t, v]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.

    Returns:
      ``[*b, t]`` float32 between -1 and 1: positive where the student is too sure, negative where it
      is not sure enough, best at 0.

    Raises:
      ValueError: shapes or dtypes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher, student = jnp.log(jnp.array([[0.6, 0.4]])), jnp.log(jnp.array([[0.1, 0.9]]))
      >>> f"{confidence_shift(teacher, student)[0]:.2f}"
      '0.30'

    Reference:
      Confidence as the first token's probability: Guo et al. 2017 (arXiv:1706.04599).
    """
    mask, *sides = prepare(mask, teacher_logits=teacher_logits, student_logits=student_logits)
    teacher, student = (jnp.max(jax.nn.softmax(side, axis=-1), axis=-1) for side in sides)
    return jnp.where(mask, student - teacher, 0.0)
