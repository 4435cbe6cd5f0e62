"""Attention everywhere: chunks of queries, whose scores the backward pass computes again.

As in FlashAttention (Dao et al. 2022, arXiv:2205.14135), a query's log-sum-exp is kept instead of its
probabilities; the slots themselves are not tiled.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsp.models.attention.inputs import AttentionInputs, Slots, padded, visible
from jaxsp.typing import EMPTY, Array, PyTree, ceil_div

SCORE_BYTES = 64 * 2**20
"""Bound of a chunk's scores, ``[B, H, chunk, S]`` in float32. At S = 8192 a quarter of it was slower."""

SMALLEST_CHUNK = 16
"""Queries in a chunk whatever the batch: with fewer, matrix units would stand idle."""

MASKED = -1e30  # finite, so that a query which sees nothing gets finite numbers


class _Queries(NamedTuple):
    # The H/G queries that share a key head are rows of one matrix, X = H/G · T: products batched over
    # [B, G] alone are what every machine multiplies best.
    q_BGXF: Array
    positions_BX: Array
    segment_ids_BX: Array | None


class _Rule(NamedTuple):
    scale: float
    softcap: float | None
    precision: jax.lax.Precision

    def product(self, spec: str, left: Array, right: Array) -> Array:
        return jnp.einsum(spec, left, right, precision=self.precision, preferred_element_type=jnp.float32)


def unsupported_reason(inputs: AttentionInputs) -> str | None:
    """None: this backend serves all inputs."""
    del inputs


def attend(inputs: AttentionInputs) -> Array:
    """Attention in chunks of queries; its memory is linear in the number of slots."""
    B, T, H, F = inputs.q_BTHF.shape
    G = inputs.slots[0].keys.shape[2]
    R = H // G
    query_bytes = 4 * B * H * sum(s.keys.shape[1] for s in inputs.slots)
    N = ceil_div(T, max(SMALLEST_CHUNK, SCORE_BYTES // query_bytes))
    C = ceil_div(T, N)
    if N > 1:
        # A mask depends on positions alone, the same in every layer. In a scan over layers jax's derivative
        # would compute all chunks' masks beforehand and keep them: 9 GiB at 32k tokens. Tied to the queries,
        # it can't.
        tied = jax.lax.optimization_barrier((inputs.q_BTHF, inputs.positions_BT, inputs.segment_ids_BT))
        inputs = dataclasses.replace(inputs, q_BTHF=tied[0], positions_BT=tied[1], segment_ids_BT=tied[2])

    def split(x_BT: Array, fill: int) -> Array:
        return padded(x_BT, N * C, fill).reshape(B, N, C, *x_BT.shape[2:]).swapaxes(0, 1)

    def per_head(x_BT: Array) -> Array:
        return jnp.tile(split(x_BT, EMPTY), (1, 1, R))

    q_NBCGRF = split(inputs.q_BTHF, 0).reshape(N, B, C, G, R, F)
    queries_N = _Queries(
        q_NBCGRF.transpose(0, 1, 3, 4, 2, 5).reshape(N, B, G, R * C, F),
        per_head(inputs.positions_BT),
        None if inputs.segment_ids_BT is None else per_head(inputs.segment_ids_BT),
    )
    slots = tuple(_without_batch(s, B) for s in inputs.slots)
    rule = _Rule(inputs.scale, inputs.softcap, inputs.precision)
    out_NBGXF: Any = _attend(rule, queries_N, slots, inputs.sliding_window)  # older jax types it as object
    out_NBGRCF = out_NBGXF.reshape(N, B, G, R, C, F)
    return out_NBGRCF.transpose(1, 0, 4, 2, 3, 5).reshape(B, N * C, H, F)[:, :T]


def _without_batch(slots: Slots, batch: int) -> Slots:
    # Keys shared by several rows lose their batch axis: the products below read it off their rank.
    if slots.keys.shape[0] == batch:
        return slots
    bias = None if slots.bias is None else slots.bias[0]
    return slots._replace(keys=slots.keys[0], values=slots.values[0], bias=bias)


def _axes(slots: Slots) -> str:
    return "bsgf"[-slots.keys.ndim :]


# Measured on two CPU cores: value and gradient, 30 scanned layers, 8 rows of 48 tokens, H=9, G=3, F=64,
# bfloat16. After a shared prefix of 320: 156 ms in 58 MiB; derived by jax, 267 ms in 268 MiB, and with
# jax.checkpoint 261 ms in 49 MiB. After one of 30: 67, 95 and 90 ms. One array of all scores: no faster.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    rule: _Rule, queries_N: _Queries, slots: tuple[Slots, ...], sliding_window: int | Array | None
) -> Array:
    return _forward(rule, queries_N, slots, sliding_window)[0]


def _forward(
    rule: _Rule, queries_N: _Queries, slots: tuple[Slots, ...], sliding_window: int | Array | None
) -> tuple[Array, tuple]:
    _, (out_NBGXF, log_sum_NBGX) = _each_chunk(
        lambda _, queries: (None, _attend_chunk(rule, queries, slots, sliding_window)), None, queries_N
    )
    return out_NBGXF, (queries_N, slots, sliding_window, out_NBGXF, log_sum_NBGX)


def _backward(rule: _Rule, kept: tuple, d_out_NBGXF: Array) -> tuple:
    queries_N, slots, sliding_window, out_NBGXF, log_sum_NBGX = kept

    def step(d_slots, chunk):
        queries, out_BGXF, log_sum_BGX, d_out_BGXF = chunk
        mean_BGX1 = jnp.sum(
            out_BGXF.astype(jnp.float32) * d_out_BGXF.astype(jnp.float32), axis=-1, keepdims=True
        )
        parts = [
            _gradient(rule, queries, s, sliding_window, log_sum_BGX, mean_BGX1, d_out_BGXF) for s in slots
        ]
        d_q_BGXF = _total(d_q for d_q, *_ in parts).astype(queries.q_BGXF.dtype)
        more = [rest for _, *rest in parts]
        return jax.tree.map(jnp.add, d_slots, more), d_q_BGXF

    key_values = [[s.keys, s.values, s.bias] for s in slots]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), key_values)
    totals, d_q_NBGXF = _each_chunk(step, zeros, (queries_N, out_NBGXF, log_sum_NBGX, d_out_NBGXF))
    totals = jax.tree.map(lambda total, x: total.astype(x.dtype), totals, key_values)
    # Positions and ids have none.
    d_slots = tuple(Slots._make((keys, values, None, None, bias)) for keys, values, bias in totals)
    return (queries_N._replace(q_BGXF=d_q_NBGXF, positions_BX=None, segment_ids_BX=None), d_slots, None)


_attend.defvjp(_forward, _backward)


def _each_chunk(step: Callable[..., tuple], carry: Any, chunks_N: PyTree) -> tuple[Any, Any]:
    """A scan; of a single chunk, as nearly always, without the loop: programs are a third smaller."""
    if len(jax.tree.leaves(chunks_N)[0]) > 1:
        return jax.lax.scan(step, carry, chunks_N)
    carry, out = step(carry, jax.tree.map(lambda x_N: jnp.squeeze(x_N, 0), chunks_N))
    return carry, jax.tree.map(lambda x: x[None], out)


def _attend_chunk(
    rule: _Rule, queries: _Queries, slots: tuple[Slots, ...], sliding_window: int | Array | None
) -> tuple[Array, Array]:
    """The output and the log-sum-exp of each query's scores."""
    scored = (_scores(rule, queries, s, sliding_window) for s in slots)
    pieces = [
        jnp.where(seen, scores_BGXS + _bias(s), MASKED)
        for (scores_BGXS, seen), s in zip(scored, slots, strict=True)
    ]
    highest_BGX = functools.reduce(jnp.maximum, [jnp.max(x, axis=-1) for x in pieces])
    pieces = [jnp.exp(x - highest_BGX[..., None]) for x in pieces]
    sum_BGX = _total(jnp.sum(x, axis=-1) for x in pieces)
    dtype = queries.q_BGXF.dtype
    out_BGXF = _total(
        rule.product(f"bgxs,{_axes(s)}->bgxf", x.astype(dtype), s.values)
        for x, s in zip(pieces, slots, strict=True)
    )
    return (out_BGXF / sum_BGX[..., None]).astype(dtype), highest_BGX + jnp.log(sum_BGX)


def _gradient(
    rule: _Rule,
    queries: _Queries,
    slots: Slots,
    sliding_window: int | Array | None,
    log_sum_BGX: Array,
    mean_BGX1: Array,
    d_out_BGXF: Array,
) -> tuple[Array, Array, Array, Array | None]:
    """One piece's part of the gradient: of the queries, of its keys, of its values, of its bias."""
    axes, dtype = _axes(slots), queries.q_BGXF.dtype
    scores_BGXS, seen = _scores(rule, queries, slots, sliding_window)
    biased_BGXS = scores_BGXS + _bias(slots)
    weights_BGXS = jnp.where(seen, jnp.exp(biased_BGXS - log_sum_BGX[..., None]), 0)
    d_weights_BGXS = rule.product(f"bgxf,{axes}->bgxs", d_out_BGXF, slots.values)
    d_biased_BGXS = weights_BGXS * (d_weights_BGXS - mean_BGX1)
    d_bias = None
    if slots.bias is not None:
        d_bias = jnp.einsum(f"bgxs->{axes[:-1]}", d_biased_BGXS)
    d_scores_BGXS = rule.scale * d_biased_BGXS
    if rule.softcap is not None:
        d_scores_BGXS *= 1 - (scores_BGXS / rule.softcap) ** 2
    # Products of the inputs' own type: with float32 on one side, bfloat16 was a third slower.
    d_scores_BGXS, weights_BGXS = d_scores_BGXS.astype(dtype), weights_BGXS.astype(dtype)
    return (
        rule.product(f"bgxs,{axes}->bgxf", d_scores_BGXS, slots.keys),
        rule.product(f"bgxs,bgxf->{axes}", d_scores_BGXS, queries.q_BGXF),
        rule.product(f"bgxs,bgxf->{axes}", weights_BGXS, d_out_BGXF),
        d_bias,
    )


def _scores(
    rule: _Rule, queries: _Queries, slots: Slots, sliding_window: int | Array | None
) -> tuple[Array, Array]:
    """Scores before bias and mask, and the mask."""
    scores_BGXS = rule.scale * rule.product(f"bgxf,{_axes(slots)}->bgxs", queries.q_BGXF, slots.keys)
    if rule.softcap is not None:
        scores_BGXS = rule.softcap * jnp.tanh(scores_BGXS / rule.softcap)
    seen_BXS = visible(queries.positions_BX, queries.segment_ids_BX, slots, sliding_window)
    return scores_BGXS, seen_BXS[:, None]


def _bias(slots: Slots) -> Array | float:
    """The bias, as it lies beside the scores: ``[b, g, 1, s]``; 0 where there is none."""
    return 0.0 if slots.bias is None else jnp.moveaxis(slots.bias, -1, -2)[..., None, :]


def _total(pieces: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, pieces)
