"""Similarity of vectors and of distributions as vectors; a similarity is better when it is larger."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsp.losses.checks import Hidden, Logits, Losses, Mask, Number, prepare
from jaxsp.typing import Array


def cosine_similarity(teacher: Hidden, student: Hidden, mask: Mask = None) -> Losses:
    r"""Cosine of the angle between two vectors: hidden states, or probabilities.

    .. math:: \frac{x \cdot y}{\|x\| \|y\|}

    Args:
      teacher: ``[*b, t, d]``, any float dtype; no gradient flows to it.
      student: ``[*b, t, d]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.

    Returns:
      ``[*b, t]`` float32 from -1 to 1, to be *maximised*; 0, with zero gradient, where a vector is 0 or
      the mask is False.

    Raises:
      ValueError: shapes or dtypes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> f"{cosine_similarity(jnp.array([[3.0, 0.0]]), jnp.array([[4.0, 3.0]]))[0]:.2f}"
      '0.80'

    Reference:
      For distilling hidden states: Sanh et al. 2019, DistilBERT (arXiv:1910.01108).
    """
    mask, x, y = prepare(mask, 1.0, "d", teacher=teacher, student=student)
    return jnp.where(mask, jnp.sum(_units(x) * _units(y), axis=-1), 0.0)


def distribution_cosine_similarity(
    teacher_logits: Logits, student_logits: Logits, mask: Mask = None, *, temperature: Number = 1.0
) -> Losses:
    r"""Cosine similarity of the two token distributions.

    .. math:: \frac{\sum_v p_v q_v}{\|p\|_2 \|q\|_2}

    Args:
      teacher_logits: ``[*b, t, v]``; no gradient flows to it.
      student_logits: ``[*b, t, v]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      temperature: both sides' logits are divided by it.

    Returns:
      ``[*b, t]`` float32 from 0 to 1, to be *maximised*; 0 where the mask is False.

    Raises:
      ValueError: shapes or dtypes don't fit, or the temperature is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher, student = jnp.log(jnp.array([[0.6, 0.4]])), jnp.log(jnp.array([[0.4, 0.6]]))
      >>> f"{distribution_cosine_similarity(teacher, student)[0]:.4f}"
      '0.9231'

    Reference:
      Salton, Wong & Yang 1975, A Vector Space Model for Automatic Indexing.
    """
    mask, p, q = prepare(mask, temperature, teacher_logits=teacher_logits, student_logits=student_logits)
    return cosine_similarity(jax.nn.softmax(p), jax.nn.softmax(q), mask)


def hidden_mse(teacher_hidden: Hidden, student_hidden: Hidden, mask: Mask = None) -> Losses:
    r"""Mean squared difference of hidden states.

    .. math:: \frac1D \sum_d (x_d - y_d)^2

    Args:
      teacher_hidden: ``[*b, t, d]``, any float dtype; no gradient flows to it.
      student_hidden: ``[*b, t, d]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.

    Returns:
      ``[*b, t]`` float32, in squared units of the hidden states.

    Raises:
      ValueError: shapes or dtypes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> hidden_mse(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 4.0]]))
      Array([2.], dtype=float32)

    Reference:
      Romero et al. 2014, FitNets (arXiv:1412.6550); Jiao et al. 2019, TinyBERT (arXiv:1909.10351).
    """
    _, x, y = prepare(mask, 1.0, "d", teacher_hidden=teacher_hidden, student_hidden=student_hidden)
    return jnp.mean((x - y) ** 2, axis=-1)


def _units(x: Array) -> Array:
    """Vectors of length 1; zero vectors stay zero, with zero gradient."""
    # Divided by the largest entry first: squares of large or tiny entries would over- or underflow.
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=-1, keepdims=True)
    some = largest != 0  # or NaN, which stays
    x = x / jnp.where(some, largest, 1.0)
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    return jnp.where(some, x / jnp.sqrt(jnp.where(some, squares, 1.0)), 0.0)
