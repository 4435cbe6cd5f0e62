"""What every attention backend is given, and which slots a query sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of :func:`jaxsp.models.attention.attention`, as one value."""

    q_BTHF: Array
    positions_BT: Array
    slots: tuple[Slots, ...]
    scale: float
    softcap: float | None
    window: int | Array | None
    segment_ids_BT: Array | None
    precision: jax.lax.Precision


def visible(
    positions: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"] | None,
    slots: Slots,
    window: int | Int[Array, ""] | None,
) -> Array:
    """Which slots each query sees, bool ``[B, T, S]``."""
    distance_BTS = positions[:, :, None] - slots.positions[:, None, :]
    seen_BTS = (slots.positions[:, None, :] >= 0) & (distance_BTS >= 0)
    if window is not None:
        seen_BTS &= distance_BTS < window
    if segment_ids is not None and slots.segment_ids is not None:
        seen_BTS &= segment_ids[:, :, None] == slots.segment_ids[:, None, :]
    return seen_BTS


def joined(pieces: Sequence[Array], batch: int) -> Array:
    """The pieces' slots in one axis, shared pieces copied to each row."""
    return jnp.concatenate([jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in pieces], axis=1)


def padded(x: Array, multiple: int) -> Array:
    """``x`` with zeros that make its second axis a multiple in length."""
    padding = [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, padding)
