"""Work over the vocabulary when its tokens may be spread, in order, over the shards of a mapped axis.

Each shard holds the head's rows, and so the logits, of its own tokens. Sums over the vocabulary go over
the axis by ``psum``, the largest logit by ``pmax``; all shards get the same values and gradients. With
``axis_name=None`` there is one shard, and nothing to send.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxsp.losses.checks import check_fraction, check_positive
from jaxsp.losses.divergence import kl_divergence, kl_terms
from jaxsp.losses.likelihood import negative_log_likelihood

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxsp.typing import Array


def shards(axis_name: str | None) -> int:
    """How many there are."""
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
    for other in others:
        never = jnp.any(other.reshape(-1)[:1] > 0) & False  # compiles to nothing, but has the type
        x = x + never.astype(x.dtype)
    return x


def _log_softmax(logits: Array, axis_name: str | None) -> Array:
    largest = jnp.max(logits, axis=-1, keepdims=True)
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    sums = jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True)
    return logits - largest - jnp.log(total(sums, axis_name))


def _kl(
    given: dict[str, Array],
    live: Array,
    axis_name: str | None,
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    check_positive(temperature=temperature)
    log_p, log_q = (
        _log_softmax(given[side] / temperature, axis_name)
        for side in ("teacher_logits", "student_logits")
    )
    values = total(jnp.sum(kl_terms(log_p, log_q), axis=-1), axis_name)
    gradient = (jnp.exp(log_q) - jnp.exp(log_p)) / temperature
    return jnp.where(live, values, 0.0), jnp.where(live[:, None], gradient, 0.0)


def _nll(
    given: dict[str, Array],
    live: Array,
    axis_name: str | None,
    label_smoothing: float = 0.0,
) -> tuple[Array, Array]:
    check_fraction(label_smoothing=label_smoothing)
    logits = given["student_logits"]
    width = logits.shape[-1]
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * width
    gold = first + jnp.arange(width) == given["targets"][:, None]
    log_q = _log_softmax(logits, axis_name)
    wanted = gold.astype(jnp.float32)
    if label_smoothing:
        allowed = (log_q > -jnp.inf).astype(jnp.float32)
        share = allowed / total(jnp.sum(allowed, axis=-1, keepdims=True), axis_name)
        wanted = (1 - label_smoothing) * wanted + label_smoothing * share
    terms = jnp.where(wanted > 0, wanted * log_q, 0.0)
    values = -total(jnp.sum(terms, axis=-1), axis_name)
    known = total(jnp.sum(gold, axis=-1), axis_name) > 0  # an id out of range reads NaN
    values = jnp.where(live, jnp.where(known, values, jnp.nan), 0.0)
    return values, jnp.where(live[:, None], jnp.exp(log_q) - wanted, 0.0)


RULES: dict[tuple[Callable[..., Array], tuple[str, ...]], Callable[..., tuple[Array, Array]]] = {
    (kl_divergence, ("teacher_logits", "student_logits")): _kl,
    (negative_log_likelihood, ("student_logits", "targets")): _nll,
}
"""By function and inputs of an objective: its values and their gradient to this shard's student
logits, written out. Others are differentiated, on the gathered logits; that takes twice the memory."""
