"""Generation after a prefix, shared or one of several, with continuous batching.

A fixed number of slots (rows of the batch) decode together in one compiled loop. As soon as a sequence
ends, the next request in the queue is read into its slot. So answers of uneven length cost about their sum
of tokens, not their number times the longest.

Where a token's keys are cached is free, as attention masks by position: every slot writes the same column
of a ring, and which columns are its own follows from how many tokens it has read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.models import decoder
from jaxsp.models.config import DecoderConfig
from jaxsp.models.generation.requests import Requests, TokenIds, Work
from jaxsp.models.generation.sampling import Sampling, choose, round_up
from jaxsp.models.generation.stop_strings import Decode, certain, stop_at
from jaxsp.typing import EMPTY, AnyArray, Array, Bool, Float, Int, KeyValues, Params

GROUP = 8
"""Requests read at once where at least half as many slots are free; the others are read one by one."""

STEPS = 8
"""Decoding steps between two looks of the host: for stop strings, for progress."""


class _State(NamedTuple):
    """Where the queue and the slots are, and the tokens chosen so far; R requests."""

    step: Int[Array, ""]  # decoding steps done
    started: Int[Array, ""]  # requests that have got a slot: the first ones
    index_B: Int[Array, " b"]  # the request that a slot serves
    running_B: Bool[Array, " b"]
    last_BD: Float[Array, "b d"]  # the hidden states that predict the next tokens
    tokens_RA: Int[Array, "r a"]
    count_R: Int[Array, " r"]
    query_LBZGF: tuple[Array, Array]  # keys and values of the queries
    answer_LBAGF: tuple[Array, Array]  # and of the answers, a ring: column = step % A
    prefix: KeyValues | None  # each slot's own, where there are several


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Given:
    """The loop's inputs, the same at every step."""

    params: Params
    config: DecoderConfig = dataclasses.field(metadata={"static": True})
    prefix: KeyValues
    table: Requests
    chunk: int = dataclasses.field(metadata={"static": True})
    total: Array | np.int32


def generate(
    params: Params,
    config: DecoderConfig,
    prefix: KeyValues,
    requests: Sequence[TokenIds] | AnyArray,
    sampling: Sampling | Sequence[Sampling],
    *,
    after: Sequence[int] | AnyArray | None = None,
    slots: int = 16,
    key: Array | None = None,
    decode: Decode | None = None,
    on_finished: Callable[[int, list[int]], None] = lambda index, ids: None,
) -> list[list[int]]:
    """Continues every request; requests wait in order for one of the slots.

    An answer depends on its request, its place in ``requests`` and the key, or on its own key alone, not on
    the slots or on the other requests; in bfloat16 up to rounding, by which a token that is nearly as
    probable can win.

    Args:
      params: the frozen weights.
      config: configuration of the model.
      prefix: read before every request: one row, never copied per slot; or several rows, which may hold
        ``EMPTY`` slots, each read before the requests that name it. Of these each slot keeps a copy.
      requests: token ids to read after the prefix, none empty; lists or arrays.
      sampling: for all requests, or one for each.
      after: the row of ``prefix`` that each request is read after; needed if there are several.
      slots: number of sequences that decode together.
      key: random key of the draws, or an array of one for each request; needed if any temperature is above 0.
      decode: the text of token ids; needed if there are stop strings.
      on_finished: called with the index and the tokens of each answer as it ends.

    Returns:
      The tokens of each answer, in the order of the requests; a stop id that ended it is its last.

    Raises:
      UserError: a request that is empty, too long for the model's window or no token ids; a row that
        the prefix doesn't have; a missing argument.

    Example:
      >>> import jaxsp
      >>> from jaxsp.models import decoder
      >>> model = jaxsp.load_model("smollm2-135m-instruct", dtype="float32")
      >>> nothing = decoder.empty_prefix(model.config)
      >>> requests = model.tokenizer(["The capital of France is", "One, two, three,"]).input_ids
      >>> sampling = Sampling(max_tokens=2)
      >>> answers = generate(model.params, model.config, nothing, requests, sampling)
      >>> model.tokenizer.batch_decode(answers)
      [' Paris.', ' four,']
    """
    samplings = [sampling] * len(requests) if isinstance(sampling, Sampling) else list(sampling)
    answers: list[list[int]] = [[] for _ in requests]
    work = Work(config, prefix, requests, samplings, slots, key, decode, after)
    for index, ids, ended in _run(params, work):
        if ended:
            answers[index] = ids
            on_finished(index, ids)
    return answers


def stream(
    params: Params,
    config: DecoderConfig,
    prefix: KeyValues,
    request: TokenIds,
    sampling: Sampling,
    *,
    key: Array | None = None,
    decode: Decode | None = None,
) -> Iterator[int]:
    """The tokens of one answer as they come: those that ``generate`` returns for this request alone.

    A token that may yet turn out to begin a stop string is held back.

    Args:
      params: the frozen weights.
      config: configuration of the model.
      prefix: read before the request; batch size 1.
      request: token ids to read after the prefix, not empty.
      sampling: rule by which tokens are chosen.
      key: random key of the draws; needed if the temperature is above 0.
      decode: the text of token ids; needed if there are stop strings.

    Raises:
      UserError: as ``generate``.
    """
    work = Work(config, prefix, [request], [sampling], 1, key, decode)

    def tokens() -> Iterator[int]:
        shown = 0
        for _, ids, ended in _run(params, work, steps=1):
            sure = len(ids) if ended else certain(ids, sampling.stop_strings, decode)
            yield from ids[shown:sure]
            shown = max(shown, sure)

    return tokens()


def _run(params: Params, work: Work, steps: int = STEPS) -> Iterator[tuple[int, list[int], bool]]:
    """The host's loop: (request, its tokens so far, whether it has ended) every ``steps``."""
    config, prefix, total = work.config, work.prefix, np.int32(len(work.requests))
    if not total:
        return
    table, chunk = work.table()
    # Rounded, as the table's sizes are: calls with other limits can share the compiled loop.
    A = round_up(max(int(sampling.max_tokens) for sampling in work.samplings), 16)
    B = min(work.slots, round_up(int(total), GROUP)) if total > 1 else 1
    state = _start(params, config, prefix if work.several else None, table, B, A)
    given = _Given(params, config, prefix, table, chunk, total)
    cut_B = np.zeros(B, bool)
    pending: list[int] = []
    known = 0
    while pending or known < total:
        state = _advance(given, state, cut_B, np.int32(steps))
        started, index_B, running_B, count_R, tokens_RA = jax.device_get(
            (state.started, state.index_B, state.running_B, state.count_R, state.tokens_RA)
        )
        pending += range(known, started)
        known = int(started)
        slot_of = {int(index_B[slot]): slot for slot in np.flatnonzero(running_B)}
        cut_B = np.zeros(B, bool)
        for index in tuple(pending):
            ids = tokens_RA[index, : count_R[index]].tolist()
            end = stop_at(ids, work.samplings[index].stop_strings, work.decode)
            if end is not None and index in slot_of:
                cut_B[slot_of.pop(index)] = True
            if index not in slot_of:
                pending.remove(index)
            yield index, ids[:end], index not in slot_of


@functools.partial(jax.jit, static_argnames=("config", "B", "A"), keep_unused=True)
def _start(
    params: Params, config: DecoderConfig, several: KeyValues | None, table: Requests, B: int, A: int
) -> _State:
    # The weights as an argument put the state on their device, as ``_advance`` does with those that
    # follow: with another placement jax would compile it a second time.
    del params
    R, Z = table.ids_BZ.shape
    return _State(
        step=jnp.int32(0),
        started=jnp.int32(0),
        index_B=jnp.zeros(B, jnp.int32),
        running_B=jnp.zeros(B, bool),
        last_BD=jnp.zeros((B, config.width), config.dtype),
        tokens_RA=jnp.zeros((R, A), jnp.int32),
        count_R=jnp.zeros(R, jnp.int32),
        query_LBZGF=_room(config, B, Z),
        answer_LBAGF=_room(config, B, A),
        prefix=None if several is None else several.rows(jnp.zeros(B, jnp.int32)),
    )


def _room(config: DecoderConfig, rows: int, size: int) -> tuple[Array, Array]:
    shape = (config.layers, rows, size, config.kv_heads, config.head_width)
    return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)


@functools.partial(jax.jit, donate_argnames="state")
def _advance(given: _Given, state: _State, cut_B: Array, steps: Array) -> _State:
    """Ends the slots to ``cut``, then decodes so many ``steps``, or until every request has ended."""
    last = state.step + steps
    group, total = min(GROUP, len(cut_B)), given.total

    def refill(state: _State) -> _State:
        """Reads several requests at a time while at least half as many can be, then one by one."""
        for rows in dict.fromkeys((group, 1)):
            state = jax.lax.while_loop(
                lambda state, least=(rows + 1) // 2: (
                    jnp.minimum(total - state.started, jnp.sum(~state.running_B)) >= least
                ),
                functools.partial(_read, given, rows),
                state,
            )
        return state

    def unfinished(state: _State) -> Array:
        return (state.step < last) & ((state.started < total) | jnp.any(state.running_B))

    state = state._replace(running_B=state.running_B & ~cut_B)
    return jax.lax.while_loop(unfinished, lambda state: _step(given, refill(state)), state)


def _read(given: _Given, rows: int, state: _State) -> _State:
    """Reads up to ``rows`` requests, the next of the queue, each into a slot that is free."""
    params, config, chunk = given.params, given.config, given.chunk
    prefix, table = given.prefix, given.table
    (B,), Z = state.running_B.shape, table.ids_BZ.shape[1]
    slot_N = jnp.argsort(state.running_B)[:rows]  # the free ones first
    index_N = state.started + jnp.arange(rows, dtype=jnp.int32)
    served_N = ~state.running_B[slot_N] & (index_N < given.total)
    slot_N = jnp.where(served_N, slot_N, B)  # B: nowhere
    length_N = jnp.where(served_N, table.length_B[index_N], 0)
    if table.after_B is not None:
        prefix = prefix.rows(table.after_B[index_N])
    first_N1 = prefix.next_position[:, None]

    def read_chunk(n: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        last_ND, *caches = carry
        start = n * chunk
        offsets_W = start + jnp.arange(chunk)
        positions_NW = jnp.where(offsets_W < length_N[:, None], first_N1 + offsets_W, EMPTY)
        earlier = _queries(prefix, jnp.minimum(start, length_N), *caches)
        ids_NW = jax.lax.dynamic_slice_in_dim(table.ids_BZ[index_N], start, chunk, axis=1)
        inputs = decoder.embed(params, config, ids_NW)
        states_NWD, new = decoder.hidden(params, config, inputs, positions_NW, (prefix, earlier))
        end_N1 = (length_N - 1 - start)[:, None]
        end_ND = jnp.take_along_axis(states_NWD, end_N1[..., None], axis=1, mode="clip")[:, 0]
        last_ND = jnp.where((end_N1 >= 0) & (end_N1 < chunk), end_ND, last_ND)
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=2)
        return last_ND, *map(write, caches, (new.keys, new.values))

    chunks = jnp.max(length_N + chunk - 1) // chunk
    carry = (jnp.zeros((rows, config.width), config.dtype), *_room(config, rows, Z))
    last_ND, *queries = jax.lax.fori_loop(0, chunks, read_chunk, carry)

    def put(cache: Array, rows: Array) -> Array:
        return cache.at[:, slot_N].set(rows, mode="drop")

    own = state.prefix
    if own is not None:
        own = KeyValues(
            put(own.keys, prefix.keys),
            put(own.values, prefix.values),
            put(own.positions[None], prefix.positions)[0],
            None if own.bias is None or prefix.bias is None else put(own.bias, prefix.bias),
        )
    keys, values = map(put, state.query_LBZGF, queries)
    return state._replace(
        started=state.started + jnp.sum(served_N, dtype=jnp.int32),
        index_B=state.index_B.at[slot_N].set(index_N, mode="drop"),
        running_B=state.running_B.at[slot_N].set(True, mode="drop"),
        last_BD=state.last_BD.at[slot_N].set(last_ND, mode="drop"),
        query_LBZGF=(keys, values),
        prefix=own,
    )


def _step(given: _Given, state: _State) -> _State:
    """Chooses the next token of each slot and reads it; the ring is written in place."""
    params, config, table = given.params, given.config, given.table
    prefix = given.prefix if state.prefix is None else state.prefix
    R, A = state.tokens_RA.shape
    requests: Requests = jax.tree.map(lambda all_R: all_R[state.index_B], table)
    count_B = state.count_R[state.index_B]
    logits_BV = decoder.unembed(params, config, state.last_BD)
    token_B = choose(logits_BV, requests.choices, count_B)
    stopped_B = jnp.any(token_B[:, None] == requests.choices.stops_BE, axis=1)
    index_B = jnp.where(state.running_B, state.index_B, R)  # R: nowhere

    column = state.step % A
    here_B = prefix.next_position + requests.length_B + count_B
    ago_A = (column - 1 - jnp.arange(A)) % A + 1  # how many steps, since each column was written
    own_BA = ago_A <= count_B[:, None]
    keys, values = state.answer_LBAGF
    query = _queries(prefix, requests.length_B, *state.query_LBZGF)
    answer = KeyValues(keys, values, jnp.where(own_BA, here_B[:, None] - ago_A, EMPTY))
    inputs = decoder.embed(params, config, token_B[:, None])
    states_B1D, new = decoder.hidden(params, config, inputs, here_B[:, None], (prefix, query, answer))
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=column, axis=2)
    return state._replace(
        step=state.step + 1,
        running_B=state.running_B & ~stopped_B & (count_B + 1 < requests.max_B),
        last_BD=states_B1D[:, 0],
        tokens_RA=state.tokens_RA.at[index_B, count_B].set(token_B, mode="drop"),
        count_R=state.count_R.at[index_B].add(1, mode="drop"),
        answer_LBAGF=(write(keys, new.keys), write(values, new.values)),
    )


def _queries(prefix: KeyValues, read_B: Array, keys: Array, values: Array) -> KeyValues:
    """The cached queries, of which ``read_B`` tokens are there."""
    at_Z = jnp.arange(keys.shape[2])
    positions_BZ = jnp.where(at_Z < read_B[:, None], prefix.next_position[:, None] + at_Z, EMPTY)
    return KeyValues(keys, values, positions_BZ)
