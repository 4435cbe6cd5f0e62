"""From unreduced losses to one number: sums and counts first, one division last.

A mean of local means weighs short microbatches too much; a (total, count) pair merges exactly over
microbatches and devices, and is divided once, after the ``psum``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxsp.losses.checks import check_mask
from jaxsp.typing import Array, Bool, Float


class Total(NamedTuple):
    """A sum over positions and how many there were, both float32 scalars."""

    total: Float[Array, ""]
    count: Float[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]


def masked_sum(values: Float[Array, "*b t"], mask: Bool[Array, "*b t"] | None = None) -> Total:
    """Sum and count of the values where the mask is True.

    Args:
      values: unreduced losses ``[*b, t]``.
      mask: which of them count; all if ``None``.

    Returns:
      ``Total(total, count)``, float32 scalars.

    Raises:
      ValueError: the mask has another shape, or is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> t = masked_sum(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([True, True, False]))
      >>> float(t.total), float(t.count)
      (3.0, 2.0)
    """
    mask = check_mask(mask, values.shape)
    total = jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32)
    return Total(total, jnp.sum(mask, dtype=jnp.float32))


def merge(*totals: Total) -> Total:
    """Adds up the totals and the counts of several parts.

    Example:
      >>> import jax.numpy as jnp
      >>> a, b = masked_sum(jnp.array([1.0, 2.0])), masked_sum(jnp.array([6.0]))
      >>> float(masked_mean(merge(a, b)))
      3.0
    """
    return Total(sum(t.total for t in totals), sum(t.count for t in totals))  # type: ignore[arg-type]


def masked_mean(
    values: Float[Array, "*b t"] | Total, mask: Bool[Array, "*b t"] | None = None
) -> Float[Array, ""]:
    """Mean over the positions where the mask is True; 0 where there are none.

    Args:
      values: unreduced losses ``[*b, t]``, or a ``Total`` (the mask is then not used).
      mask: which of them count; all if ``None``.

    Returns:
      A float32 scalar, in the unit of ``values``.

    Example:
      >>> import jax.numpy as jnp
      >>> float(masked_mean(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False])))
      2.0
    """
    total, count = values if isinstance(values, Total) else masked_sum(values, mask)
    return total / jnp.maximum(count, 1.0)
