"""Generation after a shared prefix, with continuous batching.

A fixed number of slots (rows of the batch) decode together in one compiled loop. As soon as a sequence
ends, the next request in the queue is read into its slot. So answers of uneven length cost about their sum
of tokens, not their number times the longest.

Where a token's keys are cached is free, as attention masks by position: every slot writes the same column
of a ring, and which columns are its own follows from how many tokens it has read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.models import decoder
from jaxsp.models.config import DecoderConfig
from jaxsp.typing import EMPTY, Array, Bool, Float, Int, KeyValues, Params, UserError

CHUNK = 128
"""Longest run of query tokens read at once; a longer query takes several."""

STEPS = 8
"""Decoding steps between two looks of the host: for stop strings, for progress."""

Decode = Callable[[list[int]], str]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen, and when it ends.

    The distribution is the softmax of logits / temperature, cut to the ``top_k`` most probable tokens, then
    to the fewest of these that together reach ``top_p`` (Holtzman et al. 2020, arXiv:1904.09751).

    Attributes:
      temperature: 0 takes the most probable token.
      top_k: how many tokens to choose from; 0 for all.
      top_p: the probability that the tokens to choose from reach together, in (0, 1].
      stop_ids: tokens that end the answer, which includes them.
      stop_strings: texts that end the answer, which is cut to the tokens before them.
      min_tokens: stop ids are not chosen before there are so many.
      max_tokens: longest answer.

    Raises:
      UserError: a value that can't be meant.

    Example:
      >>> Sampling(temperature=0.8, top_p=0.9, max_tokens=64).top_k
      0
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    min_tokens: int = 0
    max_tokens: int = 128

    def __post_init__(self) -> None:
        wishes = {
            "temperature": (0 <= self.temperature < math.inf, "0 or more, and finite"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "stop_ids": (all(i >= 0 for i in self.stop_ids), "token ids, 0 or more"),
            "stop_strings": (
                not isinstance(self.stop_strings, str) and all(self.stop_strings),
                "a tuple of texts, none of them empty",
            ),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "min_tokens": (
                0 <= self.min_tokens <= self.max_tokens,
                f"between 0 and max_tokens ({self.max_tokens})",
            ),
        }
        for name, (good, wish) in wishes.items():
            if not good:
                raise UserError(f"{name} must be {wish}; got {getattr(self, name)!r}.")


class _Requests(NamedTuple):
    """All requests as arrays; or, taken by index, those that the slots serve."""

    ids_BZ: Int[Array, "b z"]
    length_B: Int[Array, " b"]
    key_B: Array
    temperature_B: Float[Array, " b"]
    top_k_B: Int[Array, " b"]
    top_p_B: Float[Array, " b"]
    min_B: Int[Array, " b"]
    max_B: Int[Array, " b"]
    stops_BE: Int[Array, "b e"]  # ``EMPTY`` where there are fewer


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
    other requests.

    Args:
      params: the frozen weights.
      config: of the model.
      prefix: read before every request; batch size 1, never copied per slot.
      requests: token ids to read after the prefix, none empty.
      sampling: for all requests, or one for each.
      slots: how many sequences decode together.
      key: of the random draws; needed if any temperature is above 0.
      decode: the text of token ids; needed if there are stop strings.
      on_finished: told the index and the tokens of each answer as it ends.

    Returns:
      The tokens of each answer, in the order of the requests; a stop id that ended it is its last.

    Raises:
      UserError: a request that is empty or too long for the model's window, or a missing argument.

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
      UserError: a request that is empty or too long for the model's window, or a missing argument.
    """
    _check(config, prefix, [request], [sampling], 1, key, decode)
    events = _run(
        params, config, prefix, [request], [sampling], slots=1, key=key, decode=decode, steps=1
    )

    def tokens() -> Iterator[int]:
        shown = 0
        for _, ids, ended in events:
            certain = len(ids) if ended else _certain(ids, sampling.stop_strings, decode)
            yield from ids[shown:certain]
            shown = max(shown, certain)

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
    before = int(prefix.next_position[0])
    for index, (request, sampling) in enumerate(zip(requests, samplings, strict=True)):
        if not len(request):
            raise UserError(f"Request {index} is empty; give at least one token to read.")
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
    if not requests:
        return
    key = jax.random.key(0) if key is None else key
    table, chunk = _table(requests, samplings, key)
    # Rounded, as the table's sizes are: calls with other limits can share the compiled loop.
    A = _round_up(max(sampling.max_tokens for sampling in samplings), 16)
    B = min(slots, len(requests))
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
            end = _end(ids, samplings[index].stop_strings, decode)
            if end is not None and index in slot_of:
                cut_B[slot_of.pop(index)] = True
            if index not in slot_of:
                pending.remove(index)
            yield index, ids[:end], index not in slot_of


def _table(
    requests: Sequence[Sequence[int]], samplings: Sequence[Sampling], key: Array
) -> tuple[_Requests, int]:
    """The requests as arrays, and the size of the chunks that they are read in."""
    R = _round_up(len(requests), 64)
    longest = max(len(request) for request in requests)
    chunk = min(CHUNK, _round_up(longest, 16))
    ids_RZ = np.zeros((R, _round_up(longest, chunk)), np.int32)
    stops_RE = np.full(
        (R, _round_up(max(1, *(len(s.stop_ids) for s in samplings)), 8)), EMPTY, np.int32
    )
    for i, (request, sampling) in enumerate(zip(requests, samplings, strict=True)):
        ids_RZ[i, : len(request)] = request
        stops_RE[i, : len(sampling.stop_ids)] = sampling.stop_ids

    def column(values: list[int] | list[float]) -> Array:
        dtype = np.float32 if isinstance(values[0], float) else np.int32
        return jnp.asarray(np.pad(np.asarray(values, dtype), (0, R - len(values))))

    table = _Requests(
        ids_BZ=jnp.asarray(ids_RZ),
        length_B=column([len(request) for request in requests]),
        key_B=jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(R)),
        temperature_B=column([float(s.temperature) for s in samplings]),
        top_k_B=column([s.top_k for s in samplings]),
        top_p_B=column([float(s.top_p) for s in samplings]),
        min_B=column([s.min_tokens for s in samplings]),
        max_B=column([s.max_tokens for s in samplings]),
        stops_BE=jnp.asarray(stops_RE),
    )
    return table, chunk


@functools.partial(jax.jit, static_argnames=("config", "B", "A"), keep_unused=True)
def _start(params: Params, config: DecoderConfig, table: _Requests, B: int, A: int) -> _State:
    # The weights as an argument put the state on their device, as ``_advance`` does with those that
    # follow: with another placement jax would compile it a second time.
    del params
    R, Z = table.ids_BZ.shape

    def room(size: int) -> tuple[Array, Array]:
        shape = (config.layers, B, size, config.kv_heads, config.head_width)
        return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)

    return _State(
        step=jnp.int32(0),
        started=jnp.int32(0),
        index_B=jnp.zeros(B, jnp.int32),
        running_B=jnp.zeros(B, bool),
        last_BD=jnp.zeros((B, config.width), config.dtype),
        tokens_RA=jnp.zeros((R, A), jnp.int32),
        count_R=jnp.zeros(R, jnp.int32),
        query_LBZGF=room(Z),
        answer_LBAGF=room(A),
    )


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
    read = functools.partial(_read, params, config, prefix, table, chunk)
    step = functools.partial(_step, params, config, prefix, table)

    def vacant(state: _State) -> Array:
        return (state.started < total) & ~jnp.all(state.running_B)

    def unfinished(state: _State) -> Array:
        return (state.step < last) & ((state.started < total) | jnp.any(state.running_B))

    return jax.lax.while_loop(
        unfinished,
        lambda state: step(jax.lax.while_loop(vacant, read, state)),
        state._replace(running_B=state.running_B & ~cut_B),
    )


def _read(
    params: Params,
    config: DecoderConfig,
    prefix: KeyValues,
    table: _Requests,
    chunk: int,
    state: _State,
) -> _State:
    """Reads the next request in the queue, chunk by chunk, into a slot that is free."""
    slot = jnp.argmin(state.running_B)
    index = state.started
    length = table.length_B[index]

    def read_chunk(n: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        _, *caches = carry
        start = n * chunk
        row = (jax.lax.dynamic_slice_in_dim(cache, slot, 1, axis=1) for cache in caches)
        earlier = _queries(prefix, start[None], *row)
        offsets_W = start + jnp.arange(chunk)
        inside_W = offsets_W < length
        positions_1W = jnp.where(inside_W, prefix.next_position + offsets_W, EMPTY)[None]
        ids_1W = jax.lax.dynamic_slice(table.ids_BZ, (index, start), (1, chunk))
        inputs = decoder.embed(params, config, ids_1W)
        states_1WD, new = decoder.hidden(params, config, inputs, positions_1W, (prefix, earlier))
        at = (0, slot, start, 0, 0)
        caches = map(jax.lax.dynamic_update_slice, caches, (new.keys, new.values), (at, at))
        return states_1WD[0, jnp.sum(inside_W) - 1], *caches

    chunks = (length + chunk - 1) // chunk
    carry = (state.last_BD[slot], *state.query_LBZGF)
    last_D, keys, values = jax.lax.fori_loop(0, chunks, read_chunk, carry)
    return state._replace(
        started=index + 1,
        index_B=state.index_B.at[slot].set(index),
        running_B=state.running_B.at[slot].set(True),
        last_BD=state.last_BD.at[slot].set(last_D),
        query_LBZGF=(keys, values),
    )


def _step(
    params: Params, config: DecoderConfig, prefix: KeyValues, table: _Requests, state: _State
) -> _State:
    """Chooses the next token of each slot and reads it; the ring is written in place."""
    R, A = state.tokens_RA.shape
    requests: _Requests = jax.tree.map(lambda all_R: all_R[state.index_B], table)
    count_B = state.count_R[state.index_B]
    token_B = _choose(decoder.unembed(params, config, state.last_BD), requests, count_B)
    stopped_B = jnp.any(token_B[:, None] == requests.stops_BE, axis=1)
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
    at = (0, 0, column, 0, 0)
    return state._replace(
        step=state.step + 1,
        running_B=state.running_B & ~stopped_B & (count_B + 1 < requests.max_B),
        last_BD=states_B1D[:, 0],
        tokens_RA=state.tokens_RA.at[index_B, count_B].set(token_B, mode="drop"),
        count_R=state.count_R.at[index_B].add(1, mode="drop"),
        answer_LBAGF=(
            jax.lax.dynamic_update_slice(keys, new.keys, at),
            jax.lax.dynamic_update_slice(values, new.values, at),
        ),
    )


def _queries(prefix: KeyValues, read_B: Array, keys: Array, values: Array) -> KeyValues:
    """The cached queries, of which ``read_B`` tokens are there."""
    at_Z = jnp.arange(keys.shape[2])
    positions_BZ = jnp.where(at_Z < read_B[:, None], prefix.next_position + at_Z, EMPTY)
    return KeyValues(keys, values, positions_BZ)


def _choose(logits_BV: Array, requests: _Requests, count_B: Array) -> Array:
    """The next token of each request; what none of them asks for costs nothing."""
    early_B = count_B < requests.min_B
    random_B = requests.temperature_B > 0
    logits_BV = jax.lax.cond(
        jnp.any(early_B), lambda: _without(requests.stops_BE, early_B, logits_BV), lambda: logits_BV
    )
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.lax.cond(
        jnp.any(random_B),
        lambda: jnp.where(random_B, _sample(logits_BV, requests, count_B), best_B),
        lambda: best_B,
    )


def _without(stops_BE: Array, early_B: Array, logits_BV: Array) -> Array:
    V = logits_BV.shape[1]
    banned_BE = jnp.where(early_B[:, None] & (stops_BE != EMPTY), stops_BE, V)  # V: none
    rows_B1 = jnp.arange(len(logits_BV))[:, None]
    return logits_BV.at[rows_B1, banned_BE].set(-jnp.inf, mode="drop")


def _sample(logits_BV: Array, requests: _Requests, count_B: Array) -> Array:
    random_B = requests.temperature_B > 0
    temperature_B1 = jnp.where(random_B, requests.temperature_B, 1)[:, None]
    # From the largest down, so that no temperature makes the largest infinite.
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature_B1
    logits_BV = jax.lax.cond(
        jnp.any(random_B & ((requests.top_k_B > 0) | (requests.top_p_B < 1))),
        lambda: _most_probable(logits_BV, requests.top_k_B[:, None], requests.top_p_B[:, None]),
        lambda: logits_BV,
    )
    keys = jax.vmap(jax.random.fold_in)(requests.key_B, count_B)
    return jax.vmap(jax.random.categorical)(keys, logits_BV).astype(jnp.int32)


def _most_probable(logits_BV: Array, top_k_B1: Array, top_p_B1: Array) -> Array:
    """-inf outside the top k, and outside the fewest of these that reach the probability top p."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    inside_BV = (jnp.arange(logits_BV.shape[1]) < top_k_B1) | (top_k_B1 == 0)
    p_BV = jax.nn.softmax(sorted_BV, axis=-1, where=inside_BV)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    # The sum may round to 1 before the last token: at top_p 1 it must not cut.
    inside_BV &= (before_BV < top_p_B1) | (top_p_B1 >= 1)
    least_B1 = jnp.min(sorted_BV, axis=-1, keepdims=True, where=inside_BV, initial=jnp.inf)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def _end(ids: list[int], stop_strings: Sequence[str], decode: Decode | None) -> int | None:
    """How many tokens stand before the stop string that is complete first, if there is one."""
    if not stop_strings or decode is None:
        return None
    text = decode(ids)
    starts = [(text.find(stop), len(stop)) for stop in stop_strings]
    found = [(start + length, start) for start, length in starts if start >= 0]
    return _tokens_before(min(found)[1], ids, decode) if found else None


def _certain(ids: list[int], stop_strings: Sequence[str], decode: Decode | None) -> int:
    """How many tokens stand before anything that more tokens could make a stop string."""
    if not stop_strings or decode is None:
        return len(ids)
    text = decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")  # the bytes of half a character
    starts = range(max(0, len(text) - max(map(len, stop_strings))), len(text))
    begun = [at for at in starts if any(stop.startswith(text[at:]) for stop in stop_strings)]
    return _tokens_before(min(begun, default=len(text)), ids, decode)


def _tokens_before(end: int, ids: list[int], decode: Decode) -> int:
    """How many tokens decode to at most ``end`` characters."""
    return next(n for n in range(len(ids), -1, -1) if len(decode(ids[:n])) <= end)


def _round_up(number: int, to: int) -> int:
    return -(-number // to) * to
