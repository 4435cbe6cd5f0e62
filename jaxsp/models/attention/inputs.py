"""The inputs of every attention backend, and which slots a query sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsp.typing import Array, Float, Int


class Slots(NamedTuple):
    """One layer's keys and values; batch size 1 means shared by every row."""

    keys: Float[Array, "b s g f"]
    values: Float[Array, "b s g f"]
    positions: Int[Array, "b s"]
    """``EMPTY`` where a slot holds nothing."""
    segment_ids: Int[Array, "b s"] | None = None
    """None: visible to the queries of every segment, as a prefix is."""
    bias: Float[Array, "b s g"] | None = None
    """Added to the slots' scores, after the softcap, float32: the logarithm of the mass that a slot stands
    for. None: 0."""


@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """Queries, keys and values, and the rule of their attention.

    Attributes:
      q_BTHF: rotated queries; ``H`` is a multiple of ``G``.
      positions_BT: int32; ``EMPTY`` for padding, whose output is finite and meaningless.
      slots: keys and values in the order of their positions (padding aside), the queries' own last.
      scale: scale of the products of queries and keys.
      softcap: bound of the scores: ``softcap * tanh(scores / softcap)``, before the mask.
      sliding_window: positions back that a query sees, itself included; it may be traced. None: all.
      segment_ids_BT: segment ids of the queries, where several sequences are packed in one row.
      precision: precision of the matrix products.
    """

    q_BTHF: Float[Array, "b t h f"]
    positions_BT: Int[Array, "b t"]
    slots: tuple[Slots, ...]
    scale: float
    softcap: float | None = None
    sliding_window: int | Int[Array, ""] | None = None
    segment_ids_BT: Int[Array, "b t"] | None = None
    precision: jax.lax.Precision = jax.lax.Precision.DEFAULT


def visible(
    positions: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"] | None,
    slots: Slots,
    sliding_window: int | Int[Array, ""] | None,
) -> Array:
    """Which slots each query sees, bool ``[B, T, S]``."""
    distance_BTS = positions[:, :, None] - slots.positions[:, None, :]
    seen_BTS = (slots.positions[:, None, :] >= 0) & (distance_BTS >= 0)
    if sliding_window is not None:
        seen_BTS &= distance_BTS < sliding_window
    if segment_ids is not None and slots.segment_ids is not None:
        seen_BTS &= segment_ids[:, :, None] == slots.segment_ids[:, None, :]
    return seen_BTS


def joined(pieces: Sequence[Array], batch: int) -> Array:
    """The pieces' slots in one axis, shared pieces copied to each row."""
    return jnp.concatenate([jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in pieces], axis=1)


def joined_bias(pieces: Iterable[Slots], batch: int) -> Float[Array, "b s g"] | None:
    """The biases of the pieces' slots in one axis, 0 where a piece has none; None if none has one.

    They are finite in the dtype of the keys: of a slot that a head does not have float16 would make -inf.
    """
    pieces = list(pieces)
    if all(s.bias is None for s in pieces):
        return None
    found = joined([jnp.zeros(s.keys.shape[:3]) if s.bias is None else s.bias for s in pieces], batch)
    return jnp.maximum(found, float(jnp.finfo(pieces[0].keys.dtype).min))


def padded(x: Array, multiple: int, fill: int = 0) -> Array:
    """``x`` with its second axis filled up at its end to a multiple in length."""
    padding = [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, padding, constant_values=fill)
