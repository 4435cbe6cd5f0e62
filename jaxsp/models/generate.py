"""Greedy decoding after a prefix: batched in one jitted loop, or one sequence streamed."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsp.models import decoder
from jaxsp.models.config import DecoderConfig
from jaxsp.typing import EMPTY, Array, Bool, Int, KeyValues, Params


class _Decoding(NamedTuple):
    """The state of a decoding loop; ``step`` counts tokens already chosen."""

    step: Int[Array, ""]
    token_B: Int[Array, " b"]
    tokens_BA: Int[Array, "b a"]
    done_B: Bool[Array, " b"]
    cache: KeyValues


@functools.partial(jax.jit, static_argnames=("config", "stop_ids", "max_tokens"))
def greedy(
    params: Params,
    config: DecoderConfig,
    prefix: KeyValues,
    ids: Int[Array, "b t"],
    offsets: Int[Array, "b t"],
    *,
    stop_ids: tuple[int, ...],
    max_tokens: int,
) -> tuple[Int[Array, "b a"], Int[Array, " b"]]:
    """The most probable continuation of every row, token by token, with a key-value cache.

    The loop ends as soon as every row has ended its turn.

    Args:
      params: the frozen weights.
      config: of the model.
      prefix: shared by all rows.
      ids: right-padded tokens to read after the prefix.
      offsets: their positions counted from the prefix's end, ``EMPTY`` for padding.
      stop_ids: tokens that end a row.
      max_tokens: longest answer, A.

    Returns:
      Tokens ``[B, A]``, and each row's length: up to and with its stop token if it reached one.
    """
    state = _read_queries(params, config, prefix, ids, offsets, stop_ids, max_tokens)

    def unfinished(state: _Decoding) -> Array:
        return (state.step < max_tokens) & ~jnp.all(state.done_B)

    step = functools.partial(_step, params, config, prefix, stop_ids=stop_ids)
    state = jax.lax.while_loop(unfinished, step, state)
    stopped_BA = _is_stop(state.tokens_BA, stop_ids) & (jnp.arange(max_tokens) < state.step)
    first_stop_B = jnp.argmax(stopped_BA, axis=-1) + 1
    return state.tokens_BA, jnp.where(jnp.any(stopped_BA, axis=-1), first_stop_B, state.step)


def stream(
    params: Params,
    config: DecoderConfig,
    prefix: KeyValues,
    ids: Sequence[int],
    *,
    stop_ids: tuple[int, ...],
    max_tokens: int,
) -> Iterator[int]:
    """The tokens of one greedy answer as they come; the stop token is the last, if it is reached."""
    row = jnp.asarray([ids], jnp.int32)
    offsets = jnp.arange(len(ids))[None]
    state = _start(params, config, prefix, row, offsets, stop_ids, max_tokens)
    for i in range(max_tokens):
        token = int(state.token_B[0])
        yield token
        if token in stop_ids or i + 1 == max_tokens:
            return
        state = _next(params, config, prefix, stop_ids, state)


def _read_queries(
    params: Params,
    config: DecoderConfig,
    prefix: KeyValues,
    ids_BT: Array,
    offsets_BT: Array,
    stop_ids: tuple[int, ...],
    max_tokens: int,
) -> _Decoding:
    B, _ = ids_BT.shape
    start = prefix.next_position[:, None]
    positions_BT = jnp.where(offsets_BT == EMPTY, EMPTY, start + offsets_BT)
    inputs = decoder.embed(params, config, ids_BT)
    states_BTD, cache = decoder.hidden(params, config, inputs, positions_BT, (prefix,))
    last_B = jnp.argmax(positions_BT, axis=-1)
    state_BD = jnp.take_along_axis(states_BTD, last_B[:, None, None], axis=1)[:, 0]
    token_B = _best(params, config, state_BD)
    room = jnp.zeros(
        (config.layers, B, max_tokens, config.kv_heads, config.head_width), config.dtype
    )
    empty = jnp.full((B, max_tokens), EMPTY, jnp.int32)
    tokens_BA = jnp.zeros((B, max_tokens), jnp.int32).at[:, 0].set(token_B)
    return _Decoding(
        step=jnp.int32(1),
        token_B=token_B,
        tokens_BA=tokens_BA,
        # A row of padding alone has nothing to say and must not keep the loop running.
        done_B=_is_stop(token_B, stop_ids) | jnp.all(offsets_BT == EMPTY, axis=-1),
        cache=cache.append(KeyValues(room, room, empty)),
    )


def _step(
    params: Params,
    config: DecoderConfig,
    prefix: KeyValues,
    state: _Decoding,
    *,
    stop_ids: tuple[int, ...],
) -> _Decoding:
    """Reads the last token of each row, chooses the next, and adds to the cache in place."""
    cache = state.cache
    # A row without tokens (padding of the batch) has no next position in its own cache.
    here_B1 = jnp.maximum(cache.next_position, prefix.next_position)[:, None]
    inputs = decoder.embed(params, config, state.token_B[:, None])
    states_B1D, new = decoder.hidden(params, config, inputs, here_B1, (prefix, cache))
    token_B = _best(params, config, states_B1D[:, 0])
    slot = cache.positions.shape[1] - state.tokens_BA.shape[1] + state.step - 1
    return _Decoding(
        step=state.step + 1,
        token_B=token_B,
        tokens_BA=jax.lax.dynamic_update_slice(
            state.tokens_BA, token_B[:, None], (jnp.int32(0), state.step)
        ),
        done_B=state.done_B | _is_stop(token_B, stop_ids),
        cache=KeyValues(
            jax.lax.dynamic_update_slice_in_dim(cache.keys, new.keys, slot, axis=2),
            jax.lax.dynamic_update_slice_in_dim(cache.values, new.values, slot, axis=2),
            jax.lax.dynamic_update_slice_in_dim(cache.positions, here_B1, slot, axis=1),
        ),
    )


_start = jax.jit(_read_queries, static_argnames=("config", "stop_ids", "max_tokens"))


@functools.partial(jax.jit, static_argnums=(1, 3), donate_argnums=4)
def _next(
    params: Params,
    config: DecoderConfig,
    prefix: KeyValues,
    stop_ids: tuple[int, ...],
    state: _Decoding,
) -> _Decoding:
    return _step(params, config, prefix, state, stop_ids=stop_ids)


def _best(params: Params, config: DecoderConfig, hidden_BD: Array) -> Array:
    logits_BV = decoder.unembed(params, config, hidden_BD)
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def _is_stop(tokens: Array, stop_ids: tuple[int, ...]) -> Array:
    return jnp.isin(tokens, jnp.asarray(stop_ids or (EMPTY,), jnp.int32))
