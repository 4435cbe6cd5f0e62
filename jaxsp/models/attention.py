"""Causal attention over a shared prefix, a per-row cache and the row itself, in one function."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsp.typing import EMPTY, Array, Float, Int

QUERY_CHUNK = 256
"""Longest run of queries attended at once: bounds the score array at ``[B, H, QUERY_CHUNK, S]``."""

MASKED = -1e30  # finite, so that a padding row (which sees nothing) gives finite numbers


class Segment(NamedTuple):
    """One layer's keys and values; batch size 1 means shared by every row."""

    keys: Float[Array, "b s g f"]
    values: Float[Array, "b s g f"]
    positions: Int[Array, "b s"]


def attention(
    q_BTHF: Array,
    positions_BT: Array,
    segments: Sequence[Segment],
    *,
    precision: jax.lax.Precision = jax.lax.Precision.DEFAULT,
) -> Array:
    """Softmax attention of each query over every segment's slots at or before its own position.

    The mask comes from positions alone: slot ``s`` is visible to query ``t`` iff
    ``0 <= position[s] <= position[t]``. Grouped queries (``H`` a multiple of ``G``) and shared
    segments are multiplied as they are, never repeated. Queries beyond ``QUERY_CHUNK`` are taken in
    chunks that the backward pass recomputes, so memory is linear in the number of slots.

    Args:
      q_BTHF: rotated queries.
      positions_BT: int32; ``EMPTY`` for padding, whose output is finite and meaningless.
      segments: keys and values, with their positions.
      precision: of the two matrix products.

    Returns:
      ``[B, T, H, F]`` in the dtype of ``q``; softmax and accumulation are float32.
    """
    block = functools.partial(_block, segments=segments, precision=precision)
    B, T, H, F = q_BTHF.shape
    if T <= QUERY_CHUNK:
        return block(q_BTHF, positions_BT)
    chunks = -(-T // QUERY_CHUNK)
    padding = chunks * QUERY_CHUNK - T
    q_BTHF = jnp.pad(q_BTHF, ((0, 0), (0, padding), (0, 0), (0, 0)))
    positions_BT = jnp.pad(positions_BT, ((0, 0), (0, padding)), constant_values=EMPTY)
    out_NBTHF = jax.lax.map(
        lambda chunk: jax.checkpoint(block)(*chunk),
        (
            q_BTHF.reshape(B, chunks, QUERY_CHUNK, H, F).swapaxes(0, 1),
            positions_BT.reshape(B, chunks, QUERY_CHUNK).swapaxes(0, 1),
        ),
    )
    return out_NBTHF.swapaxes(0, 1).reshape(B, chunks * QUERY_CHUNK, H, F)[:, :T]


def _block(
    q_BTHF: Array,
    positions_BT: Array,
    *,
    segments: Sequence[Segment],
    precision: jax.lax.Precision,
) -> Array:
    B, T, H, F = q_BTHF.shape
    G = segments[0].keys.shape[2]
    R = H // G
    # The R queries that share a key head become rows of one matrix: [B, G, R·T, F] batched products
    # are what every backend multiplies best.
    q_BGXF = q_BTHF.reshape(B, T, G, R, F).transpose(0, 2, 3, 1, 4).reshape(B, G, R * T, F)
    q_BGXF = q_BGXF * jnp.asarray(F**-0.5, q_BTHF.dtype)

    scores = []
    for segment in segments:
        spec = "bgxf,sgf->bgxs" if _shared(segment, B) else "bgxf,bsgf->bgxs"
        scores_BGXS = _product(spec, q_BGXF, segment.keys, precision)
        slots = segment.positions[:, None, :]
        visible_BTS = (slots != EMPTY) & (slots <= positions_BT[:, :, None])
        mask_BGXS = jnp.tile(visible_BTS, (1, R, 1))[:, None]
        scores.append(jnp.where(mask_BGXS, scores_BGXS, MASKED))

    weights_BGXS = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q_BTHF.dtype)
    out_BGXF = jnp.zeros((B, G, R * T, F), jnp.float32)
    start = 0
    for segment in segments:
        stop = start + segment.keys.shape[1]
        spec = "bgxs,sgf->bgxf" if _shared(segment, B) else "bgxs,bsgf->bgxf"
        out_BGXF += _product(spec, weights_BGXS[..., start:stop], segment.values, precision)
        start = stop
    out_BTHF = out_BGXF.reshape(B, G, R, T, F).transpose(0, 3, 1, 2, 4).reshape(B, T, H, F)
    return out_BTHF.astype(q_BTHF.dtype)


def _shared(segment: Segment, batch: int) -> bool:
    return segment.keys.shape[0] == 1 and batch > 1


def _product(spec: str, left: Array, right: Array, precision: jax.lax.Precision) -> Array:
    if right.ndim > spec.split(",")[1].index("-"):
        right = right[0]
    return jnp.einsum(spec, left, right, precision=precision, preferred_element_type=jnp.float32)
