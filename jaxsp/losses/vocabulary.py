"""Work over the vocabulary when its tokens may be spread, in order, over the shards of a mapped axis.

Each shard holds the head's rows, and so the logits, of its own tokens. Sums over the vocabulary go over
the axis by ``psum``, the largest logit by ``pmax``; all shards get the same values and gradients. With
``axis_name=None`` there is one shard, and nothing to send.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsp.typing import Array


def shards(axis_name: str | None) -> int:
    """The number of shards."""
    return 1 if axis_name is None else jax.lax.psum(1, axis_name)


def total(x: Array, axis_name: str | None) -> Array:
    """The sum of all shards' parts."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def gather(x: Array, axis_name: str | None) -> Array:
    """All shards' ``[n, v]`` side by side, the same on each."""
    if axis_name is None:
        return x
    # By a sum and not by all_gather, whose result shard_map does not know to be the same everywhere.
    width = x.shape[-1]
    blank = like_varying(jnp.zeros((*x.shape[:-1], width * shards(axis_name)), x.dtype), x)
    start = jax.lax.axis_index(axis_name) * width
    return total(jax.lax.dynamic_update_slice_in_dim(blank, x, start, axis=-1), axis_name)


def own_part(x: Array, width: int, axis_name: str | None) -> Array:
    """The columns of this shard's tokens, of ``[n, v]`` over all."""
    if axis_name is None:
        return x
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis_name) * width, width, axis=-1)


def like_varying(x: Array, *others: Array) -> Array:
    """``x``, marked as differing over all the axes over which the others differ.

    ``shard_map`` keeps book of that in its types, and a loop's carry must not change its type.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return x
    for other in others:
        never = jnp.any(other.reshape(-1)[:1] > 0) & False  # compiles to nothing, but has the type
        x = x + never.astype(x.dtype)
    return x


def largest(x: Array, axis_name: str | None) -> Array:
    """The largest of all shards', with no gradient."""
    return x if axis_name is None else jax.lax.pmax(x, axis_name)


def first_token(width: int, axis_name: str | None) -> Array | int:
    """The id of this shard's first token."""
    return 0 if axis_name is None else jax.lax.axis_index(axis_name) * width
