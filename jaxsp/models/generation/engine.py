"""The loop of generation after a prefix, shared or one of several, with continuous batching.

A fixed number of slots (rows of the batch) decode together in one compiled loop. As soon as a sequence
ends, the next request in the queue is read into its slot. So answers of uneven length cost about their sum
of tokens, not their number times the longest. Requests that are all there from the start (``generate``) and
those that come and go (``Live``) go through the same loop.

Where a token's keys are cached is free, as attention masks by position: every slot writes the same column
of a ring, and which columns are its own follows from how many tokens it has read.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.models import decoder
from jaxsp.models.config import DecoderConfig
from jaxsp.models.generation.likely import MOST, Likely
from jaxsp.models.generation.requests import Requests
from jaxsp.models.generation.sampling import choose
from jaxsp.typing import EMPTY, Array, Bool, Float, Int, KeyValues, Params

GROUP = 8
"""Requests read at once where at least half as many slots are free; the others are read one by one."""

MANY = 4 * GROUP
"""Slots from which some of them may wait for a whole group of requests to be read."""

STEPS = 8
"""Decoding steps between two looks of the host: for stop strings, for progress."""


class _State(NamedTuple):
    """Where the queue and the slots are, and the tokens chosen so far; R requests."""

    done: Int[Array, ""]  # decoding steps of this call
    column: Int[Array, ""]  # of the ring, the next to be written
    started: Int[Array, ""]  # requests that have got a slot: the first ones
    index_B: Int[Array, " b"]  # the request that a slot serves
    running_B: Bool[Array, " b"]
    last_BD: Float[Array, "b d"]  # the hidden states that predict the next tokens
    tokens_RA: Int[Array, "r a"]  # as wide as the longest answer
    count_R: Int[Array, " r"]
    query_LBZGF: tuple[Array, Array]  # keys and values of the queries
    answer_LBAGF: tuple[Array, Array]  # and of the answers, a ring of A columns
    prefix: KeyValues | None  # each slot's own, where there are several
    likely: Likely | None = None  # where any request may ask for it


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
    """Requests that have come so far."""
    order_R: Array | np.ndarray | None = None
    """The table's row of each request, by its number (from 0) modulo R; None: the number."""
    patient: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether requests wait until as many slots are free as are read at once."""


class Progress(NamedTuple):
    """A request's tokens so far, and whether it has ended."""

    row: int
    ids: list[int]
    ended: bool


class Batch:
    """The host's side of the loop: the requests of a table, and the slots that serve them.

    Args:
      params: the frozen weights.
      config: configuration of the model.
      prefix: one row for all requests; or several, of which the table names one for each.
      table: all requests, or room for them.
      chunk: query tokens that are read at once.
      slots: number of sequences that decode together.
      answer_tokens: longest answer.
      waiting: rows of the table that wait, if all are there from the start.
      widths: numbers of slots that a step may compute beside all: a step costs as much as it has slots. Each
        is a program of its own.
      alternatives: most probable tokens that are kept beside each one whose probability is wanted.
      patient: whether they wait until a whole group can be read.
    """

    def __init__(
        self,
        params: Params,
        config: DecoderConfig,
        prefix: KeyValues,
        table: Requests,
        chunk: int,
        slots: int,
        answer_tokens: int,
        waiting: range | None = None,
        widths: Sequence[int] = (),
        alternatives: int = MOST,
        patient: bool = False,
    ) -> None:
        several = prefix if len(prefix.positions) > 1 else None
        self._given = _Given(params, config, prefix, table, chunk, np.int32(0), patient=patient)
        self._state = _start(params, config, several, table, slots, answer_tokens, alternatives)
        self._in_order = waiting is not None
        self._waiting = collections.deque(waiting or ())
        self._running: dict[int, int] = {}  # slots by rows
        self._started = 0
        self._cut_B = np.zeros(slots, bool)
        self._steps = 0
        self.widths = sorted({*(width for width in widths if width < slots), slots})

    @property
    def busy(self) -> bool:
        """Whether any request waits or is under way."""
        return bool(self._waiting or self._running)

    @property
    def steps(self) -> int:
        """Decoding steps done."""
        return self._steps

    def put(self, row: int, table: Requests) -> None:
        """Lets a request wait that has come into the table."""
        self._given = dataclasses.replace(self._given, table=table)
        self._waiting.append(row)

    def drop(self, row: int) -> None:
        """Takes a request out, wherever it is; another one may have its row at once."""
        if row in self._running:
            self._cut_B[self._running.pop(row)] = True
        elif row in self._waiting:
            self._waiting.remove(row)

    def advance(self, steps: int) -> list[Progress]:
        """Decodes so many steps, or until no request is left.

        Args:
          steps: the number; any is the same compiled program.

        Returns:
          The progress of each request that was under way, those that ended meanwhile included.
        """
        total, order_R = self._started + len(self._waiting), None
        if not self._in_order:
            order_R = np.zeros(len(self._state.count_R), np.int32)
            order_R[np.arange(self._started, total) % len(order_R)] = list(self._waiting)
        given = dataclasses.replace(self._given, total=np.int32(total), order_R=order_R)
        state = self._state = _advance(
            given, self._state, self._cut_B, np.int32(steps), self._computed_slots()
        )
        done, started, index_B, running_B, count_R, tokens_RA = jax.device_get(
            (state.done, state.started, state.index_B, state.running_B, state.count_R, state.tokens_RA)
        )
        slot_of = {int(index_B[slot]): int(slot) for slot in np.flatnonzero(running_B)}
        under_way = [*self._running, *(self._waiting.popleft() for _ in range(started - self._started))]
        self._running = {row: slot_of[row] for row in under_way if row in slot_of}
        self._started = int(started)
        self._steps += int(done)
        self._cut_B = np.zeros_like(self._cut_B)
        return [
            Progress(row, tokens_RA[row, : count_R[row]].tolist(), row not in slot_of) for row in under_way
        ]

    def _computed_slots(self) -> Int[np.ndarray, " w"] | None:
        """The slots of the next steps: those that run, and free ones for who waits; ``None``: all."""
        running, count = list(self._running.values()), len(self._running) + len(self._waiting)
        width = next((width for width in self.widths if width >= count), self.widths[-1])
        if width == len(self._cut_B):
            return None
        free = np.setdiff1d(np.arange(len(self._cut_B)), running)
        return np.array([*running, *free][:width], np.int32)

    def resize(self, query_tokens: int, answer_tokens: int) -> None:
        """Makes room for other lengths: what is under way must fit, and what waits when it is read.

        A step costs as much as there is room. Each pair of sizes is a program of its own.

        Args:
          query_tokens: of the longest request, at most those that the table has; a multiple of the chunk.
          answer_tokens: that any answer may have until the next call, at most those at the start.
        """
        if (query_tokens, answer_tokens) != self.sizes:
            state = self._state
            column, query, answer = _resized(
                state.column, state.query_LBZGF, state.answer_LBAGF, query_tokens, answer_tokens
            )
            self._state = state._replace(column=column, query_LBZGF=query, answer_LBAGF=answer)

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens of a request, and of an answer, that there is room for."""
        return self._state.query_LBZGF[0].shape[2], self._state.answer_LBAGF[0].shape[2]

    def likely(self) -> Likely | None:
        """The probabilities of all tokens so far, by row and place, where the table has room for the wish."""
        return jax.device_get(self._state.likely)


@functools.partial(jax.jit, static_argnames=("config", "B", "A", "N"), keep_unused=True)
def _start(
    params: Params,
    config: DecoderConfig,
    several: KeyValues | None,
    table: Requests,
    B: int,
    A: int,
    N: int = MOST,
) -> _State:
    # The weights as an argument put the state on their device, as ``_advance`` does with those that
    # follow: with another placement jax would compile it a second time.
    del params
    R, Z = table.ids_BZ.shape
    return _State(
        done=jnp.int32(0),
        column=jnp.int32(0),
        started=jnp.int32(0),
        index_B=jnp.zeros(B, jnp.int32),
        running_B=jnp.zeros(B, bool),
        last_BD=jnp.zeros((B, config.width), config.dtype),
        tokens_RA=jnp.zeros((R, A), jnp.int32),
        count_R=jnp.zeros(R, jnp.int32),
        query_LBZGF=_room(config, B, Z),
        answer_LBAGF=_room(config, B, A),
        prefix=None if several is None else several.rows(jnp.zeros(B, jnp.int32)),
        likely=None if table.likely_B is None else Likely.room(R, A, N),
    )


@functools.partial(jax.jit, static_argnames=("Z", "A"))
def _resized(
    column: Array, query: tuple[Array, Array], answer: tuple[Array, Array], Z: int, A: int
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """The ring's next column and the caches, with room for ``Z`` tokens of a query and ``A`` of an answer."""
    before = answer[0].shape[2]

    def columns(cache: Array, first: int, count: int) -> Array:
        more = max(0, first + count - cache.shape[2])
        cache = jnp.pad(cache, [(0, more if axis == 2 else 0) for axis in range(cache.ndim)])
        return cache[:, :, first : first + count]

    def ring(cache: Array) -> Array:
        """From the oldest column on, of which the newest ones are kept."""
        return columns(jnp.roll(cache, -column, axis=2), max(0, before - A), A)

    queries = tuple(columns(cache, 0, Z) for cache in query)
    return jnp.full_like(column, min(A, before) % A), queries, tuple(map(ring, answer))


def _room(config: DecoderConfig, rows: int, size: int) -> tuple[Array, Array]:
    shape = (config.layers, rows, size, config.kv_heads, config.head_width)
    return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)


@functools.partial(jax.jit, donate_argnames="state")
def _advance(
    given: _Given, state: _State, cut_B: Array, steps: Array, slots_W: Int[Array, " w"] | None = None
) -> _State:
    """Ends the slots to ``cut``, then decodes so many ``steps``, or until every request has ended.

    Only ``slots_W`` are computed, if they are given: those that run must be among them.
    """
    state = state._replace(done=jnp.int32(0), running_B=state.running_B & ~cut_B)
    if slots_W is None:
        return _decoded(given, state, steps)
    own = state._replace(
        index_B=state.index_B[slots_W],
        running_B=state.running_B[slots_W],
        last_BD=state.last_BD[slots_W],
        query_LBZGF=_rows(state.query_LBZGF, slots_W),
        answer_LBAGF=_rows(state.answer_LBAGF, slots_W),
        prefix=None if state.prefix is None else state.prefix.rows(slots_W),
    )
    own = _decoded(given, own, steps)
    put = functools.partial(_put, slots_W)
    return own._replace(
        index_B=state.index_B.at[slots_W].set(own.index_B),
        running_B=state.running_B.at[slots_W].set(own.running_B),
        last_BD=state.last_BD.at[slots_W].set(own.last_BD),
        query_LBZGF=tuple(map(put, state.query_LBZGF, own.query_LBZGF)),
        answer_LBAGF=tuple(map(put, state.answer_LBAGF, own.answer_LBAGF)),
        prefix=_put_prefix(slots_W, state.prefix, own.prefix),
    )


def _rows(caches: tuple[Array, Array], slots_W: Array) -> tuple[Array, ...]:
    return tuple(cache[:, slots_W] for cache in caches)


def _put(slots: Array, cache: Array, rows: Array) -> Array:
    """A cache with other rows in some slots; in those that there aren't: nothing."""
    return cache.at[:, slots].set(rows, mode="drop")


def _put_prefix(slots: Array, all_B: KeyValues | None, rows: KeyValues | None) -> KeyValues | None:
    """The same of each slot's own prefix, where there are several."""
    if all_B is None or rows is None:
        return all_B
    put = functools.partial(_put, slots)
    return KeyValues(
        put(all_B.keys, rows.keys),
        put(all_B.values, rows.values),
        put(all_B.positions[None], rows.positions)[0],
        None if all_B.bias is None or rows.bias is None else put(all_B.bias, rows.bias),
    )


def _decoded(given: _Given, state: _State, steps: Array) -> _State:
    """The state after so many steps of all of its slots, or when every request has ended."""
    group, total = min(GROUP, len(state.running_B)), given.total

    def can_be_read(rows: int, state: _State) -> Array:
        left, free = total - state.started, jnp.sum(~state.running_B)
        if given.patient:
            return (left > 0) & (free >= jnp.minimum(left, rows))
        return jnp.minimum(left, free) >= (rows + 1) // 2

    def refill(state: _State) -> _State:
        """Reads several requests at a time while at least half as many can be, then one by one.

        Or, if they are patient, whole groups alone, and the last ones together.
        """
        for rows in (group,) if given.patient else dict.fromkeys((group, 1)):
            state = jax.lax.while_loop(
                functools.partial(can_be_read, rows), functools.partial(_read, given, rows), state
            )
        return state

    def unfinished(state: _State) -> Array:
        return (state.done < steps) & ((state.started < total) | jnp.any(state.running_B))

    return jax.lax.while_loop(unfinished, lambda state: _step(given, refill(state)), state)


def _read(given: _Given, rows: int, state: _State) -> _State:
    """Reads up to ``rows`` requests, the next of the queue, each into a slot that is free."""
    params, config, chunk = given.params, given.config, given.chunk
    prefix, table = given.prefix, given.table
    (B,), R, Z = state.running_B.shape, len(table.ids_BZ), state.query_LBZGF[0].shape[2]
    slot_N = jnp.argsort(state.running_B)[:rows]  # the free ones first
    number_N = state.started + jnp.arange(rows, dtype=jnp.int32)
    served_N = ~state.running_B[slot_N] & (number_N < given.total)
    slot_N = jnp.where(served_N, slot_N, B)  # B: nowhere
    index_N = number_N if given.order_R is None else given.order_R[number_N % R]
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

    keys, values = map(functools.partial(_put, slot_N), state.query_LBZGF, queries)
    count_R = state.count_R
    if given.order_R is not None:  # another request may have had the row
        count_R = count_R.at[jnp.where(served_N, index_N, R)].set(0, mode="drop")  # R: nowhere
    return state._replace(
        started=state.started + jnp.sum(served_N, dtype=jnp.int32),
        index_B=state.index_B.at[slot_N].set(index_N, mode="drop"),
        running_B=state.running_B.at[slot_N].set(True, mode="drop"),
        last_BD=state.last_BD.at[slot_N].set(last_ND, mode="drop"),
        count_R=count_R,
        query_LBZGF=(keys, values),
        prefix=_put_prefix(slot_N, state.prefix, prefix),
    )


def _step(given: _Given, state: _State) -> _State:
    """Chooses the next token of each slot and reads it; the ring is written in place."""
    params, config, table = given.params, given.config, given.table
    prefix = given.prefix if state.prefix is None else state.prefix
    R, A = len(state.tokens_RA), state.answer_LBAGF[0].shape[2]
    requests: Requests = jax.tree.map(lambda all_R: all_R[state.index_B], table)
    count_B = state.count_R[state.index_B]
    logits_BV = decoder.unembed(params, config, state.last_BD)
    token_B = choose(logits_BV, requests.choices.where(state.running_B), count_B)
    stopped_B = jnp.any(token_B[:, None] == requests.choices.stops_BE, axis=1)
    index_B = jnp.where(state.running_B, state.index_B, R)  # R: nowhere

    column = state.column
    here_B = prefix.next_position + requests.length_B + count_B
    ago_A = (column - 1 - jnp.arange(A)) % A + 1  # how many steps, since each column was written
    own_BA = ago_A <= count_B[:, None]
    keys, values = state.answer_LBAGF
    query = _queries(prefix, requests.length_B, *state.query_LBZGF)
    answer = KeyValues(keys, values, jnp.where(own_BA, here_B[:, None] - ago_A, EMPTY))
    inputs = decoder.embed(params, config, token_B[:, None])
    states_B1D, new = decoder.hidden(params, config, inputs, here_B[:, None], (prefix, query, answer))
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=column, axis=2)
    likely = state.likely
    if likely is not None and requests.likely_B is not None:
        likely = likely.written(logits_BV, token_B, requests.likely_B & state.running_B, index_B, count_B)
    return state._replace(
        done=state.done + 1,
        column=(column + 1) % A,
        running_B=state.running_B & ~stopped_B & (count_B + 1 < requests.max_B),
        last_BD=states_B1D[:, 0],
        tokens_RA=state.tokens_RA.at[index_B, count_B].set(token_B, mode="drop"),
        count_R=state.count_R.at[index_B].add(1, mode="drop"),
        answer_LBAGF=(write(keys, new.keys), write(values, new.values)),
        likely=likely,
    )


def _queries(prefix: KeyValues, read_B: Array, keys: Array, values: Array) -> KeyValues:
    """The cached queries, of which ``read_B`` tokens are there."""
    at_Z = jnp.arange(keys.shape[2])
    positions_BZ = jnp.where(at_Z < read_B[:, None], prefix.next_position[:, None] + at_Z, EMPTY)
    return KeyValues(keys, values, positions_BZ)
