"""Generation after a shared prefix, with continuous batching.

A fixed number of slots (rows of the batch) decode together in one compiled loop. As soon as a sequence
ends, the next request in the queue is read into its slot. So answers of uneven length cost about their sum
of tokens, not their number times the longest.

Where a token's keys are cached is free, as attention masks by position: every slot writes the same column
of a ring, and which columns are its own follows from how many tokens it has read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.models import decoder
from jaxsp.models.config import DecoderConfig
from jaxsp.models.generation.sampling import Choices, Sampling, choose, column, round_up, tabulate
from jaxsp.models.generation.stop_strings import Decode, certain, stop_at
from jaxsp.typing import EMPTY, Array, Bool, Float, Int, KeyValues, Params, UserError

CHUNK = 128
"""Longest run of query tokens read at once; a longer query takes several."""

GROUP = 8
"""Requests read at once where at least half as many slots are free; the others are read one by one."""

STEPS = 8
"""Decoding steps between two looks of the host: for stop strings, for progress."""


class _Requests(NamedTuple):
    """All requests as arrays; or, taken by index, those that the slots serve."""

    ids_BZ: Int[Array, "b z"]
    length_B: Int[Array, " b"]
    max_B: Int[Array, " b"]
    choices: Choices


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


def generate(
    params: Params,
    config: DecoderConfig,
    prefix: KeyValues,
    requests: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    *,
    slots: int = 16,
    key: Array | None = None,
    decode: Decode | None = None,
    on_finished: Callable[[int, list[int]], None] = lambda index, ids: None,
) -> list[list[int]]:
    """Continues every request; requests wait in order for one of the slots.

    An answer depends on its request, its place in ``requests`` and the key, not on the slots or on the
    other requests; in bfloat16 up to rounding, by which a token that is nearly as probable can win.

    Args:
      params: the frozen weights.
      config: of the model.
      prefix: read before every request; batch size 1, never copied per slot.
      requests: token ids to read after the prefix, none empty; lists or arrays.
      sampling: for all requests, or one for each.
      slots: how many sequences decode together.
      key: of the random draws; needed if any temperature is above 0.
      decode: the text of token ids; needed if there are stop strings.
      on_finished: told the index and the tokens of each answer as it ends.

    Returns:
      The tokens of each answer, in the order of the requests; a stop id that ended it is its last.

    Raises:
      UserError: a request that is empty, too long for the model's window or no token ids; a prefix of
        several rows; a missing argument.

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
    _check(config, prefix, requests, samplings, slots, key, decode)
    answers: list[list[int]] = [[] for _ in requests]
    events = _run(params, config, prefix, requests, samplings, slots=slots, key=key, decode=decode)
    for index, ids, ended in events:
        if ended:
            answers[index] = ids
            on_finished(index, ids)
    return answers


def stream(
    params: Params,
    config: DecoderConfig,
    prefix: KeyValues,
    request: Sequence[int],
    sampling: Sampling,
    *,
    key: Array | None = None,
    decode: Decode | None = None,
) -> Iterator[int]:
    """The tokens of one answer as they come: those that ``generate`` returns for this request alone.

    A token that may yet turn out to begin a stop string is held back.

    Args:
      params: the frozen weights.
      config: of the model.
      prefix: read before the request; batch size 1.
      request: token ids to read after the prefix, not empty.
      sampling: how tokens are chosen.
      key: of the random draws; needed if the temperature is above 0.
      decode: the text of token ids; needed if there are stop strings.

    Raises:
      UserError: as ``generate``.
    """
    _check(config, prefix, [request], [sampling], 1, key, decode)
    events = _run(
        params, config, prefix, [request], [sampling], slots=1, key=key, decode=decode, steps=1
    )

    def tokens() -> Iterator[int]:
        shown = 0
        for _, ids, ended in events:
            sure = len(ids) if ended else certain(ids, sampling.stop_strings, decode)
            yield from ids[shown:sure]
            shown = max(shown, sure)

    return tokens()


def _check(
    config: DecoderConfig,
    prefix: KeyValues,
    requests: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    slots: int,
    key: Array | None,
    decode: Decode | None,
) -> None:
    if slots < 1:
        raise UserError(f"slots must be at least 1; got {slots}.")
    if len(samplings) != len(requests):
        raise UserError(f"There are {len(requests)} requests, but {len(samplings)} samplings.")
    if len(prefix.positions) != 1:
        raise UserError(
            f"The prefix must have one row (batch size 1); got {len(prefix.positions)}."
        )
    if key is not None and not _is_key(key):
        raise UserError(f"key must be one random key, as jax.random.key(0); got {key!r}.")
    before = int(prefix.next_position[0])
    for index, (request, sampling) in enumerate(zip(requests, samplings, strict=True)):
        _check_ids(f"Request {index}", request, config.vocab_size)
        needed = before + len(request) + sampling.max_tokens
        if needed > config.window:
            raise UserError(
                f"Request {index} has {len(request)} tokens; with the prefix ({before}) and max_tokens"
                f" ({sampling.max_tokens}) that is {needed}, more than the model's window of"
                f" {config.window}. Shorten one of them."
            )
        if max(sampling.stop_ids, default=0) >= config.vocab_size:
            raise UserError(
                f"Stop id {max(sampling.stop_ids)} is not a token: the vocabulary has"
                f" {config.vocab_size}."
            )
        if sampling.temperature and key is None:
            raise UserError(
                f"Temperature {sampling.temperature} needs a key, as jax.random.key(0)."
            )
        if sampling.stop_strings and decode is None:
            raise UserError(
                f"Stop strings {sampling.stop_strings} need decode, to read the answer."
            )


def _check_ids(name: str, request: Sequence[int], vocab: int) -> None:
    ids = np.asarray(request)
    if ids.ndim == 1 and not len(ids):
        raise UserError(f"{name} is empty; give at least one token to read.")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UserError(f"{name} must be a list of token ids; got {request!r:.60}.")
    outside = np.flatnonzero((ids < 0) | (ids >= vocab))
    if len(outside):
        at = outside[0]
        raise UserError(
            f"{name} has the token id {ids[at]} at place {at}; the vocabulary has {vocab}: give ids from"
            f" 0 to {vocab - 1}."
        )


def _is_key(key: Array) -> bool:
    try:
        jax.random.fold_in(key, 0)  # jax's own check
    except (TypeError, ValueError):
        return False
    return True


def _run(
    params: Params,
    config: DecoderConfig,
    prefix: KeyValues,
    requests: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    *,
    slots: int,
    key: Array | None,
    decode: Decode | None,
    steps: int = STEPS,
) -> Iterator[tuple[int, list[int], bool]]:
    """The host's loop: (request, its tokens so far, whether it has ended), after every ``steps``."""
    if not len(requests):
        return
    key = jax.random.key(0) if key is None else key
    table, chunk = _table(requests, samplings, key)
    # Rounded, as the table's sizes are: calls with other limits can share the compiled loop.
    A = round_up(max(sampling.max_tokens for sampling in samplings), 16)
    B = min(slots, round_up(len(requests), GROUP)) if len(requests) > 1 else 1
    state = _start(params, config, table, B, A)
    total = np.int32(len(requests))
    cut_B = np.zeros(B, bool)
    pending: list[int] = []
    known = 0
    while pending or known < total:
        state = _advance(params, config, prefix, table, state, chunk, total, cut_B, np.int32(steps))
        started, index_B, running_B, count_R, tokens_RA = jax.device_get(
            (state.started, state.index_B, state.running_B, state.count_R, state.tokens_RA)
        )
        pending += range(known, started)
        known = int(started)
        slot_of = {int(index_B[slot]): slot for slot in np.flatnonzero(running_B)}
        cut_B = np.zeros(B, bool)
        for index in tuple(pending):
            ids = tokens_RA[index, : count_R[index]].tolist()
            end = stop_at(ids, samplings[index].stop_strings, decode)
            if end is not None and index in slot_of:
                cut_B[slot_of.pop(index)] = True
            if index not in slot_of:
                pending.remove(index)
            yield index, ids[:end], index not in slot_of


def _table(
    requests: Sequence[Sequence[int]], samplings: Sequence[Sampling], key: Array
) -> tuple[_Requests, int]:
    """The requests as arrays, and the size of the chunks that they are read in."""
    R = round_up(len(requests), 64)
    longest = max(len(request) for request in requests)
    chunk = min(CHUNK, round_up(longest, 16))
    ids_RZ = np.zeros((R, round_up(longest, chunk)), np.int32)
    for ids_Z, request in zip(ids_RZ, requests, strict=False):
        ids_Z[: len(request)] = request
    table = _Requests(
        ids_BZ=jnp.asarray(ids_RZ),
        length_B=column([len(request) for request in requests], R),
        max_B=column([sampling.max_tokens for sampling in samplings], R),
        choices=tabulate(samplings, R, key),
    )
    return table, chunk


@functools.partial(jax.jit, static_argnames=("config", "B", "A"), keep_unused=True)
def _start(params: Params, config: DecoderConfig, table: _Requests, B: int, A: int) -> _State:
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
    )


def _room(config: DecoderConfig, rows: int, size: int) -> tuple[Array, Array]:
    shape = (config.layers, rows, size, config.kv_heads, config.head_width)
    return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)


@functools.partial(jax.jit, static_argnames=("config", "chunk"), donate_argnames="state")
def _advance(
    params: Params,
    config: DecoderConfig,
    prefix: KeyValues,
    table: _Requests,
    state: _State,
    chunk: int,
    total: Array,
    cut_B: Array,
    steps: Array,
) -> _State:
    """Ends the slots to ``cut``, then decodes so many ``steps``, or until every request has ended."""
    last = state.step + steps
    group = min(GROUP, len(cut_B))
    step = functools.partial(_step, params, config, prefix, table)

    def read(rows: int, least: int, state: _State) -> _State:
        """Reads so many requests at a time, while there are at least so few to read."""
        return jax.lax.while_loop(
            lambda state: jnp.minimum(total - state.started, jnp.sum(~state.running_B)) >= least,
            functools.partial(_read, params, config, prefix, table, chunk, total, rows),
            state,
        )

    def refill(state: _State) -> _State:
        state = read(group, (group + 1) // 2, state) if group > 1 else state
        return read(1, 1, state)

    def unfinished(state: _State) -> Array:
        return (state.step < last) & ((state.started < total) | jnp.any(state.running_B))

    return jax.lax.while_loop(
        unfinished,
        lambda state: step(refill(state)),
        state._replace(running_B=state.running_B & ~cut_B),
    )


def _read(
    params: Params,
    config: DecoderConfig,
    prefix: KeyValues,
    table: _Requests,
    chunk: int,
    total: Array,
    rows: int,
    state: _State,
) -> _State:
    """Reads up to ``rows`` requests, the next of the queue, each into a slot that is free."""
    (B,), Z = state.running_B.shape, table.ids_BZ.shape[1]
    slot_N = jnp.argsort(state.running_B)[:rows]  # the free ones first
    index_N = state.started + jnp.arange(rows, dtype=jnp.int32)
    served_N = ~state.running_B[slot_N] & (index_N < total)
    slot_N = jnp.where(served_N, slot_N, B)  # B: nowhere
    length_N = jnp.where(served_N, table.length_B[index_N], 0)

    def read_chunk(n: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        last_ND, *caches = carry
        start = n * chunk
        offsets_W = start + jnp.arange(chunk)
        positions_NW = jnp.where(
            offsets_W < length_N[:, None], prefix.next_position + offsets_W, EMPTY
        )
        earlier = _queries(prefix, jnp.minimum(start, length_N), *caches)
        ids_NW = jax.lax.dynamic_slice_in_dim(table.ids_BZ[index_N], start, chunk, axis=1)
        inputs = decoder.embed(params, config, ids_NW)
        states_NWD, new = decoder.hidden(params, config, inputs, positions_NW, (prefix, earlier))
        end_N1 = (length_N - 1 - start)[:, None]
        last_ND = jnp.where(
            (end_N1 >= 0) & (end_N1 < chunk),
            jnp.take_along_axis(states_NWD, end_N1[..., None], axis=1, mode="clip")[:, 0],
            last_ND,
        )
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=2)
        return last_ND, *map(write, caches, (new.keys, new.values))

    chunks = jnp.max(length_N + chunk - 1) // chunk
    carry = (jnp.zeros((rows, config.width), config.dtype), *_room(config, rows, Z))
    last_ND, *queries = jax.lax.fori_loop(0, chunks, read_chunk, carry)
    keys, values = (
        cache.at[:, slot_N].set(rows, mode="drop")
        for cache, rows in zip(state.query_LBZGF, queries, strict=True)
    )
    return state._replace(
        started=state.started + jnp.sum(served_N, dtype=jnp.int32),
        index_B=state.index_B.at[slot_N].set(index_N, mode="drop"),
        running_B=state.running_B.at[slot_N].set(True, mode="drop"),
        last_BD=state.last_BD.at[slot_N].set(last_ND, mode="drop"),
        query_LBZGF=(keys, values),
    )


def _step(
    params: Params, config: DecoderConfig, prefix: KeyValues, table: _Requests, state: _State
) -> _State:
    """Chooses the next token of each slot and reads it; the ring is written in place."""
    R, A = state.tokens_RA.shape
    requests: _Requests = jax.tree.map(lambda all_R: all_R[state.index_B], table)
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
    past = (
        prefix,
        _queries(prefix, requests.length_B, *state.query_LBZGF),
        KeyValues(keys, values, jnp.where(own_BA, here_B[:, None] - ago_A, EMPTY)),
    )
    inputs = decoder.embed(params, config, token_B[:, None])
    states_B1D, new = decoder.hidden(params, config, inputs, here_B[:, None], past)
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=column, axis=2)
    return state._replace(
        step=state.step + 1,
        running_B=state.running_B & ~stopped_B & (count_B + 1 < requests.max_B),
        last_BD=states_B1D[:, 0],
        tokens_RA=state.tokens_RA.at[index_B, count_B].set(token_B, mode="drop"),
        count_R=state.count_R.at[index_B].add(1, mode="drop"),
        answer_LBAGF=(
            write(keys, new.keys),
            write(values, new.values),
        ),
    )


def _queries(prefix: KeyValues, read_B: Array, keys: Array, values: Array) -> KeyValues:
    """The cached queries, of which ``read_B`` tokens are there."""
    at_Z = jnp.arange(keys.shape[2])
    positions_BZ = jnp.where(at_Z < read_B[:, None], prefix.next_position + at_Z, EMPTY)
    return KeyValues(keys, values, positions_BZ)
