"""Sizes of σ's entries, which learning rates are relative to."""

from __future__ import annotations

import jax.numpy as jnp

from jaxsp.typing import AnyArray, Array, Float


def root_mean_square(x: Float[AnyArray, "*axes"], axis: tuple[int, ...] | None = None) -> Array:
    """The root mean square over these axes, which stay with size 1; 1 where all entries are 0.

    Example:
      >>> root_mean_square(jnp.array([1.0, 7.0])).tolist()
      [5.0]
    """
    size = jnp.sqrt(jnp.mean(jnp.square(jnp.asarray(x)), axis=axis, keepdims=True))
    return jnp.where(size > 0, size, 1.0)
