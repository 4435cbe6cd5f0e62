"""From unreduced losses to one number: sums and counts first, one division last.

A mean of local means weighs short microbatches too much; a (total, count) pair merges exactly over
microbatches and devices, and is divided once, after the ``psum``.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax.numpy as jnp

from jaxsp.losses.checks import Mask, Weights, check_mask, weights_of
from jaxsp.typing import AnyArray, Array, Float

Values: TypeAlias = Float[AnyArray, "*t"]


class Total(NamedTuple):
    """A (weighted) sum over positions and how many there were (their weight), float32 scalars."""

    total: Float[Array, ""]
    count: Float[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]


def masked_sum(values: Values, mask: Mask = None, *, weights: Weights = None) -> Total:
    """Sum and count of the values where the mask is True.

    Args:
      values: unreduced losses ``[*b, t]``.
      mask: which of them count; all if ``None``.
      weights: weight of each position, ``[*b, t]``, or of each sequence, ``[*b]``; 1 if ``None``. A position
        of weight w counts as w positions.

    Returns:
      ``Total(total, count)``, float32 scalars.

    Raises:
      ValueError: the mask or the weights have another shape, the mask is not boolean, or a weight is
        negative.

    Example:
      >>> import jax.numpy as jnp
      >>> t = masked_sum(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([True, True, False]))
      >>> float(t.total), float(t.count)
      (3.0, 2.0)
    """
    mask = check_mask(mask, values.shape)
    weighed = jnp.ones(values.shape, jnp.float32) if weights is None else weights_of(weights, values.shape)
    weighed = jnp.where(mask, weighed, 0.0)
    # A position of weight 0 is masked too: 0 times infinity is not 0.
    total = jnp.sum(jnp.where(weighed != 0, values, 0.0) * weighed, dtype=jnp.float32)
    return Total(total, jnp.sum(weighed))


def merge(*totals: Total) -> Total:
    """Adds up the totals and the counts of several parts.

    Args:
      *totals: totals of disjoint positions.

    Returns:
      That of all of them.

    Example:
      >>> import jax.numpy as jnp
      >>> a, b = masked_sum(jnp.array([1.0, 2.0])), masked_sum(jnp.array([6.0]))
      >>> float(masked_mean(merge(a, b)))
      3.0
    """
    return Total(sum(t.total for t in totals), sum(t.count for t in totals))  # type: ignore[arg-type]


def masked_mean(values: Values | Total, mask: Mask = None, *, weights: Weights = None) -> Float[Array, ""]:
    """(Weighted) mean over the positions where the mask is True; 0 where there are none.

    Args:
      values: unreduced losses ``[*b, t]``, or a ``Total`` (then without mask and weights).
      mask: which of them count; all if ``None``.
      weights: weight of each position, ``[*b, t]``, or of each sequence, ``[*b]``; 1 if ``None``.

    Returns:
      A float32 scalar, in the unit of ``values``.

    Raises:
      ValueError: shapes don't fit, or a mask or weights beside a ``Total``.

    Example:
      >>> import jax.numpy as jnp
      >>> float(masked_mean(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False])))
      2.0
    """
    if not isinstance(values, Total):
        values = masked_sum(values, mask, weights=weights)
    elif mask is not None or weights is not None:
        raise ValueError("A Total is already reduced: give mask and weights to masked_sum.")
    return values.total / jnp.where(values.count > 0, values.count, 1.0)
