"""Work over the vocabulary, whose tokens may be spread, in order, over the shards of a mapped axis.

Each shard then holds the logits of its own tokens. Sums over the vocabulary go over the axis by ``psum``, the
largest logit by ``pmax``; all shards get the same values. With ``axis_name=None`` there is one shard, and
nothing to send.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxsp.typing import AnyArray, Array

Found: TypeAlias = tuple[Array, Array, Array | float | None]
Piece: TypeAlias = Callable[..., Found]
"""Takes log q ``[*b, v]`` and what else is compared; gives its value ``[*b]``, the slope ``[*b, v]`` to each
log q as if these were free, and the sum of the slopes ``[*b]`` (``None``: it is to be added up). One that can
work on shards takes ``axis_name``, too, where there are any."""


def shards(axis_name: str | None) -> int:
    """The number of shards."""
    return 1 if axis_name is None else jax.lax.psum(1, axis_name)


def total(x: Array, axis_name: str | None) -> Array:
    """The sum of all shards' parts."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def total_over_tokens(x: Array, axis_name: str | None) -> Array:
    """The sum ``[*b]`` over all tokens, of each shard's ``[*b, v]``."""
    return total(jnp.sum(x, axis=-1), axis_name)


def first_token(width: int, axis_name: str | None) -> Array | int:
    """The id of this shard's first token."""
    return 0 if axis_name is None else jax.lax.axis_index(axis_name) * width


def gather(x: Array, axis_name: str | None) -> Array:
    """All shards' ``[n, v]`` side by side, the same on each."""
    if axis_name is None:
        return x
    # By a sum and not by all_gather, whose result shard_map does not know to be the same everywhere.
    width = x.shape[-1]
    blank = like_varying(jnp.zeros((*x.shape[:-1], width * shards(axis_name)), x.dtype), x)
    start = first_token(width, axis_name)
    return total(jax.lax.dynamic_update_slice_in_dim(blank, x, start, axis=-1), axis_name)


def own_part(x: Array, width: int, axis_name: str | None) -> Array:
    """The columns of this shard's tokens, of ``[n, v]`` over all."""
    if axis_name is None:
        return x
    return jax.lax.dynamic_slice_in_dim(x, first_token(width, axis_name), width, axis=-1)


def like_varying(x: AnyArray, *others: Array) -> Array:
    """``x``, marked as differing over all the axes over which the others differ.

    ``shard_map`` keeps book of that in its types, and a loop's carry must not change its type.
    """
    x = jnp.asarray(x)
    axes = frozenset().union(*map(_varying, others)) - _varying(x)
    if not axes:
        return x
    lax: Any = jax.lax  # which has the one since jax 0.8, and had the other before
    return lax.pcast(x, tuple(axes), to="varying") if hasattr(lax, "pcast") else lax.pvary(x, tuple(axes))


def _varying(x: Array) -> frozenset[str]:
    aval: Any = jax.typeof(x)
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying  # before jax 0.10 and since


def on_auto_axes(function: Callable[..., Any], like: Array, *arrays: Any) -> Any:
    """``function(*arrays)`` where XLA divides the work, also if the mesh's axes are Explicit.

    Such axes are part of the types, and gathers along an axis that is cut have none. The results are cut as
    ``like`` ``[*b, d]`` is: each along its first axes, those of ``*b``.
    """
    sharding: Any = jax.typeof(like).sharding
    if not (axes := sharding.mesh.explicit_axes):
        return function(*arrays)
    out = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-1]))
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=out)(*arrays)


def parts(x: Array) -> int:
    """The number of devices' parts that ``[*b, d]`` is cut into along ``*b``, as far as it is known."""
    sharding: Any = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
    cuts = jax.tree.leaves(tuple(getattr(sharding, "spec", ()))[: x.ndim - 1])
    return math.prod(sharding.mesh.shape[name] for name in cuts)


def log_softmax(logits: Array, axis_name: str | None = None) -> Array:
    """Log-probabilities of this shard's tokens."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    top = top if axis_name is None else jax.lax.pmax(top, axis_name)
    sums = jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True)
    return logits - top - jnp.log(total(sums, axis_name))


def compared(piece: Piece, logits: Array, *given: Any, axis_name: str | None = None) -> Array:
    """A piece's value ``[*b]``; its gradient is written out, and goes to ``logits`` ``[*b, v]`` alone.

    With q = softmax(logits) it is slope - q · (sum of the slopes): less memory than differentiating
    the steps takes, and all that logits on several shards need.
    """
    piece, arrays = with_numbers(piece, *given)
    if axis_name is None:
        return _differentiable(piece, logits, arrays)
    return _over_shards(functools.partial(piece, axis_name=axis_name), axis_name, logits, arrays)


def with_numbers(piece: Piece, *given: Any) -> tuple[Piece, tuple[Any, ...]]:
    """Binds known numbers, which come last, to the piece; gives it and the other arguments."""
    numbers = [float(np.float32(x)) for x in given if isinstance(x, float)]
    arrays = tuple(x for x in given if not isinstance(x, float))
    return (lambda *arrays, **over: piece(*arrays, *numbers, **over)), arrays


def _value_and_gradient(
    piece: Piece, axis_name: str | None, logits: Array, given: Any
) -> tuple[Array, Array]:
    log_q = log_softmax(logits, axis_name)
    value, slope, mass = piece(log_q, *given)
    if mass is None:
        mass = total_over_tokens(slope, axis_name)
    return value, slope - jnp.exp(log_q) * jnp.asarray(mass, jnp.float32)[..., None]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(piece: Piece, logits: Array, given: Any) -> Array:
    return _value_and_gradient(piece, None, logits, given)[0]


@_differentiable.defjvp
def _(piece: Piece, primals: Any, tangents: Any) -> tuple[Array, Array]:
    value, gradient = _value_and_gradient(piece, None, *primals)
    return value, jnp.sum(gradient * tangents[0], axis=-1)


# Backwards alone: pmap and shard_map don't transpose a psum in the same way.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _over_shards(piece: Piece, axis_name: str, logits: Array, given: Any) -> Array:
    return _value_and_gradient(piece, axis_name, logits, given)[0]


_over_shards.defvjp(
    _value_and_gradient, lambda piece, axis_name, gradient, cotangent: (cotangent[..., None] * gradient, None)
)
