"""Generation equals taking tokens from full forward passes, whatever the slots; and what it costs."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsp
from jaxsp import distributions
from jaxsp.models import decoder
from jaxsp.models.families import FAMILIES
from jaxsp.models.generation import Sampling, engine, generate, stream
from jaxsp.models.generation.requests import Work
from jaxsp.teacher import answers
from jaxsp.typing import EMPTY, KeyValues, UserError
from tests import programs, tiny
from tests.conftest import slow_beside

CONTEXT = [5, 100, 7, 9, 200, 31]
QUERIES = [[4, 8, 15], [16], [23, 42, 108, 4, 9, 77, 12], [50, 60], list(range(20, 57))]


@pytest.fixture(scope="module")
def prefix(tiny_model):
    return distributions.context_prefix(tiny_model.params, tiny_model.config, np.array([CONTEXT]))


@pytest.fixture(scope="module")
def run(tiny_model, prefix):
    def run(requests, sampling, **options):
        return generate(tiny_model.params, tiny_model.config, prefix, requests, sampling, **options)

    return run


@pytest.fixture(scope="module")
def streamed(tiny_model, prefix):
    def streamed(request, sampling, **options):
        tokens = stream(tiny_model.params, tiny_model.config, prefix, request, sampling, **options)
        return list(tokens)

    return streamed


@pytest.fixture(scope="module")
def slowly(tiny_model):
    """By full forward passes over context, query and answer."""

    def slowly(query, max_tokens, stop_ids=(), min_tokens=0):
        answer = []
        while len(answer) < max_tokens:
            ids = [*CONTEXT, *query, *answer]
            padded = [*ids, *[0] * (96 - len(ids))]  # one shape, compiled once
            logits = np.array(tiny_model.logits(padded))[len(ids) - 1]
            if len(answer) < min_tokens:
                logits[list(stop_ids)] = -np.inf
            answer.append(int(np.argmax(logits)))
            if answer[-1] in stop_ids:
                break
        return answer

    return slowly


@pytest.fixture
def steps(monkeypatch):
    """The decoding steps done after every call of the compiled loop."""
    steps = []
    advance = engine.Batch.advance

    def recording(self, *arguments):
        found = advance(self, *arguments)
        steps.append(self.steps)
        return found

    monkeypatch.setattr(engine.Batch, "advance", recording)
    return steps


@pytest.fixture
def x64():
    yield lambda on: jax.config.update("jax_enable_x64", on)
    jax.config.update("jax_enable_x64", False)


def uneven(count: int) -> tuple[list[list[int]], list[Sampling]]:
    """Requests whose answers have 4 to 64 tokens, most of them few."""
    random = np.random.RandomState(0)
    lengths = np.clip(4 + random.exponential(12, count), 4, 64).astype(int)
    requests = [random.randint(3, 259, random.randint(4, 24)).tolist() for _ in lengths]
    return requests, [Sampling(max_tokens=int(length)) for length in lengths]


@pytest.mark.parametrize("slots", slow_beside([1, 3, 16], 1, 16))
def test_greedy_equals_full_forward_passes(run, slowly, slots):
    expected = [slowly(query, 9) for query in QUERIES]
    assert run(QUERIES, Sampling(max_tokens=9), slots=slots) == expected


def test_a_query_longer_than_a_chunk_is_read_in_several(run, slowly, monkeypatch):
    monkeypatch.setattr("jaxsp.models.generation.requests.CHUNK", 16)
    expected = [slowly(query, 9) for query in QUERIES]
    assert run(QUERIES, Sampling(max_tokens=9), slots=3) == expected


def test_an_answer_may_go_around_the_ring(run, slowly):
    """The second answer starts in the middle of the ring and ends before where it started."""
    samplings = [Sampling(max_tokens=n) for n in (9, 16, 16)]
    expected = [slowly(q, s.max_tokens) for q, s in zip(QUERIES, samplings, strict=False)]
    assert run(QUERIES[:3], samplings, slots=1) == expected


def test_without_a_prefix(tiny_model, run):
    nothing = decoder.empty_prefix(tiny_model.config)
    arguments = (tiny_model.params, tiny_model.config, nothing)
    whole = [[*CONTEXT, *query] for query in QUERIES]
    sampling = Sampling(max_tokens=6)
    assert generate(*arguments, whole, sampling) == run(QUERIES, sampling)


@pytest.mark.parametrize("family", slow_beside(FAMILIES, *tiny.ORDINARY))
def test_after_a_prefix_with_empty_slots(tmp_path, family):
    """In every family; the prefix is longer than the sliding windows."""
    tiny.write(tmp_path, with_tokenizer=False, model_type=family)
    model = jaxsp.load_model(tmp_path, dtype="float32", tokenizer=None)
    context = np.random.RandomState(1).randint(3, 259, 19)
    prefix = decoder.read_long(model.params, model.config, context[None], longest=8)
    assert (prefix.positions == EMPTY).sum() == 2
    found = generate(model.params, model.config, prefix, QUERIES[:3], Sampling(max_tokens=3), slots=1)
    for query, answer in zip(QUERIES, found, strict=False):
        start = len(context) + len(query) - 1
        logits = model.logits(np.pad([*context, *query, *answer], (0, 9 - len(query))))
        assert np.argmax(logits, axis=-1)[start : start + 3].tolist() == answer


@pytest.mark.slow
def test_with_64_bit_types(tiny_model, run, x64):
    sampling = Sampling(temperature=0.8, top_k=40, top_p=0.9, max_tokens=4)
    expected = run(QUERIES, sampling, slots=3, key=jax.random.key(0))
    x64(True)
    prefix = distributions.context_prefix(tiny_model.params, tiny_model.config, np.array([CONTEXT]))
    found = generate(
        tiny_model.params, tiny_model.config, prefix, QUERIES, sampling, slots=3, key=jax.random.key(0)
    )
    assert found == expected


def test_requests_read_together_are_answered_alike(run, monkeypatch):
    """The longest has 37 tokens: three chunks of 16. The last ones are no whole group."""
    expected = {max_tokens: run(QUERIES, Sampling(max_tokens=max_tokens)) for max_tokens in (3, 5)}
    monkeypatch.setattr(engine, "GROUP", 2)
    monkeypatch.setattr(engine, "MANY", 3)
    for slots in (1, 3):
        lengths = [3, 5, 3, 3, 5]
        samplings = [Sampling(max_tokens=length) for length in lengths]
        found = run(QUERIES, samplings, slots=slots, together=True)
        assert found == [expected[length][i] for i, length in enumerate(lengths)]


def test_a_slot_waits_for_a_whole_group(run, monkeypatch):
    """One of three slots stays free until another is; the last request is read by itself."""
    read, reads = engine._read, []

    def counted(given, rows, state):
        jax.debug.callback(lambda: reads.append(rows))
        return read(given, rows, state)

    monkeypatch.setattr(engine, "_read", counted)
    monkeypatch.setattr(engine, "GROUP", 2)
    monkeypatch.setattr(engine, "MANY", 3)
    loop: Any = engine._advance
    samplings = [Sampling(max_tokens=length) for length in (2, 6, 9, 3, 3)]
    for together, expected in ((True, 3), (False, 4)):
        loop.clear_cache()
        reads.clear()
        run(QUERIES, samplings, slots=3, together=together)
        jax.effects_barrier()
        assert len(reads) == expected
    loop.clear_cache()


def test_requests_may_be_any_sequences(run):
    expected = run([QUERIES[0]] * 2, Sampling(max_tokens=4))
    array = np.array([QUERIES[0]] * 2)
    sampling = Sampling(max_tokens=np.int64(4))
    for requests in (array, jnp.asarray(array), tuple(map(tuple, array)), list(array)):
        assert run(requests, sampling) == expected


@pytest.mark.slow
@pytest.mark.parametrize("group", [3, 8])
def test_requests_read_together_are_those_read_one_by_one(run, steps, monkeypatch, group):
    """Whatever the length of each, in chunks; and in the order of the queue."""
    monkeypatch.setattr("jaxsp.models.generation.requests.CHUNK", 16)
    jax.clear_caches()  # the sizes are no arguments
    random = np.random.RandomState(2)
    requests = [random.randint(3, 259, n).tolist() for n in (1, 40, 16, 17, 33, 2, 32, 5, 48, 9, 3)]
    samplings = [Sampling(max_tokens=n) for n in (3, 3, 3, 3, 9, 3, 3, 3, 9, 3, 3)]
    expected = run(requests, samplings, slots=1)
    monkeypatch.setattr(engine, "GROUP", group)
    steps.clear()
    assert run(requests, samplings, slots=6) == expected
    assert steps[-1] == 12


def test_answers_stop_each_at_their_own_stop_token(run, streamed, slowly):
    free = [slowly(query, 9) for query in QUERIES]
    stops = (free[0][2], free[2][5])  # these tokens now end a turn
    expected = [slowly(query, 9, stops) for query in QUERIES]
    assert len({len(answer) for answer in expected}) > 1
    sampling = Sampling(stop_ids=stops, max_tokens=9)
    assert run(QUERIES, sampling, slots=3) == expected
    assert [streamed(query, sampling) for query in QUERIES] == expected


def test_stop_tokens_are_banned_before_min_tokens(run, slowly):
    stop = slowly(QUERIES[0], 9)[2]
    limits = [(0, 9), (2, 9), (3, 9), (5, 9), (9, 9)]
    samplings = [Sampling(stop_ids=(stop,), min_tokens=low, max_tokens=high) for low, high in limits]
    expected = [slowly(QUERIES[0], high, (stop,), low) for low, high in limits]
    assert [len(answer) for answer in expected[:2]] == [3, 3]
    assert stop not in expected[2][:3]
    assert run([QUERIES[0]] * 5, samplings) == expected


def test_the_loop_ends_when_every_answer_has(tiny_model, run, steps):
    """With every token a stop token one is chosen."""
    every = tuple(range(tiny_model.config.vocab_size))
    lengths = [len(answer) for answer in run(QUERIES, Sampling(stop_ids=every, max_tokens=9))]
    assert lengths == [1] * 5
    assert steps == [1]


def test_answers_come_in_the_order_of_the_requests(run, slowly):
    """... and are reported as they end: the short ones first."""
    lengths = [40, 2, 20, 1, 12]
    samplings = [Sampling(max_tokens=length) for length in lengths]
    finished = {}
    found = run(QUERIES, samplings, on_finished=finished.__setitem__)
    assert found == [slowly(q, n) for q, n in zip(QUERIES, lengths, strict=True)]
    assert list(finished) == [1, 3, 4, 2, 0]
    assert [finished[i] for i in range(5)] == found


def test_one_slot_serves_first_come_first(run):
    finished = []
    requests, samplings = uneven(12)
    run(requests, samplings, slots=1, on_finished=lambda index, ids: finished.append(index))
    assert finished == list(range(12))


@pytest.mark.parametrize("slots", slow_beside([1, 3, 16], 16))
def test_a_slot_is_refilled_as_soon_as_its_sequence_ends(run, steps, slots):
    """In order of the queue: the steps are those of a simulation."""
    requests, samplings = uneven(40)
    run(requests, samplings, slots=slots)
    free = [0] * slots  # when each slot is
    for sampling in samplings:
        heapq.heapreplace(free, free[0] + sampling.max_tokens)
    assert steps[-1] == max(free)


@pytest.mark.slow
def test_uneven_answers_take_two_thirds_of_the_steps_of_static_batches(run, steps):
    requests, samplings = uneven(128)
    together = run(requests, samplings, slots=16)
    continuous, static = steps[-1], 0
    apart = []
    for at in range(0, 128, 16):
        apart += run(requests[at : at + 16], samplings[at : at + 16], slots=16)
        static += steps[-1]
    assert together == apart
    lengths = [sampling.max_tokens for sampling in samplings]
    assert static == sum(max(lengths[at : at + 16]) for at in range(0, 128, 16))
    assert continuous * 1.5 <= static


def test_nothing_is_compiled_anew(run, caplog):
    """Neither for what arrives when, nor for other options, limits, seeds or numbers of requests.

    There are two programs: one for greedy answers alone, and one for all else.
    """
    requests, samplings = uneven(40)
    greedy = Sampling(stop_strings=("a",), max_tokens=62), Sampling(stop_ids=(2, 9), max_tokens=60)
    others = (
        Sampling(temperature=0.7, top_k=5, top_p=0.9, max_tokens=60),
        Sampling(temperature=1.3, min_tokens=2, stop_ids=(2, 9), max_tokens=61),
        Sampling(min_tokens=3, max_tokens=62),
    )
    run(requests, samplings, slots=3, key=jax.random.key(0))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):

        def compiled() -> int:
            return sum("Compiling" in m and "_advance" in m for m in caplog.messages)

        for other in greedy:
            run(requests[:33], other, slots=3, key=jax.random.key(1), decode=as_letters)
        assert compiled() == 0
        for other in others:
            run(requests[:33], other, slots=3, key=jax.random.key(1), decode=as_letters)
        mixed = [*samplings[:20], *others * 7][: len(requests)]
        run(requests, mixed, slots=3, key=jax.random.key(2), decode=as_letters)
        assert compiled() == 1


@pytest.mark.parametrize(("slots", "most"), [(None, 1 / 4), (np.array([2], np.int32), 1)])
def test_decoding_does_not_copy_the_caches(tiny_model, slots, most):
    """Nor the others where some slots are computed: their own part is a quarter, of keys and of values."""
    config = tiny_model.config.replace(layers=16)
    params = decoder.parameter_shapes(config)
    prefix = decoder.empty_prefix(config, 6)
    table, chunk = Work(config, prefix, [[1, 2, 3]] * 4, [Sampling()] * 4, 4, None, None).table()
    state = engine._start({}, config, None, table, 4, 4096)
    given = engine._Given(params, config, prefix, table, chunk, np.int32(4))
    compiled = engine._advance.lower(given, state, np.zeros(4, bool), np.int32(9), slots).compile()
    cache = state.answer_LBAGF[0].nbytes
    memory = programs.memory(compiled)
    assert memory.alias_size_in_bytes > 2 * cache
    assert memory.temp_size_in_bytes < most * cache  # slices of a layer, its scores


# Several prefixes.


def join(prefixes: list[KeyValues]) -> KeyValues:
    """One row each."""
    return KeyValues(
        jnp.concatenate([prefix.keys for prefix in prefixes], axis=1),
        jnp.concatenate([prefix.values for prefix in prefixes], axis=1),
        jnp.concatenate([prefix.positions for prefix in prefixes]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_several_prefixes_answer_as_each_alone(tiny_model, prefix, temperature):
    """Prefixes of other content and length, with ``EMPTY`` slots before, behind, or nothing else."""
    params, config = tiny_model.params, tiny_model.config
    long = np.random.RandomState(1).randint(3, 259, (1, 19))
    prefixes = [
        prefix.append(decoder.empty_prefix(config, 17)),
        decoder.empty_prefix(config, 4).append(distributions.context_prefix(params, config, long)),
        decoder.empty_prefix(config, 23),
    ]
    requests, samplings = uneven(20)
    samplings = [dataclasses.replace(s, temperature=temperature) for s in samplings]
    options = {"slots": 3, "key": jax.random.key(5)}
    alone = [generate(params, config, one, requests, samplings, **options) for one in prefixes]
    assert all(a != b for a, b in itertools.combinations(alone, 2))
    after = np.random.RandomState(2).randint(0, 3, 20)
    found = generate(params, config, join(prefixes), requests, samplings, after=after, **options)
    assert found == [alone[row][i] for i, row in enumerate(after)]


def test_one_prefix_may_be_named(tiny_model, prefix, run):
    sampling = Sampling(max_tokens=9)
    assert run(QUERIES, sampling, after=[0] * 5) == run(QUERIES, sampling)


def test_decoding_does_not_copy_the_prefixes(tiny_model):
    config = tiny_model.config.replace(layers=16)
    params = decoder.parameter_shapes(config)
    several = join([decoder.empty_prefix(config, 4096)] * 3)
    work = Work(config, several, [[1]] * 4, [Sampling()] * 4, 4, None, None, after=[0, 1, 2, 0])
    table, chunk = work.table()
    state = engine._start({}, config, several, table, 4, 16)

    def step(params, prefix, state):
        return engine._step(engine._Given(params, config, prefix, table, chunk, np.int32(4)), state)

    compiled = jax.jit(step, donate_argnums=2).lower(params, several, state).compile()
    memory, copies = programs.memory(compiled), state.prefix.keys.nbytes
    assert memory.alias_size_in_bytes > 2 * copies
    assert memory.temp_size_in_bytes < copies / 4  # slices of a layer, its scores


# Sampling.


@pytest.mark.parametrize("sampling", [
    Sampling(temperature=0.8, max_tokens=16),
    Sampling(temperature=1.5, top_k=40, top_p=0.8, max_tokens=16),
])  # fmt: skip
def test_samples_do_not_depend_on_slots_or_neighbours(run, streamed, sampling):
    key = jax.random.key(3)
    requests = QUERIES
    expected = run(requests, sampling, slots=1, key=key)
    assert len({tuple(answer) for answer in expected}) == len(requests)
    assert run(requests, sampling, slots=3, key=key) == expected
    assert run(requests, sampling, key=key) == expected
    assert run(requests, sampling, key=jax.random.key(4)) != expected
    neighbours = [sampling if i % 2 else Sampling(max_tokens=7) for i in range(len(requests))]
    assert run(requests, neighbours, key=key)[1::2] == expected[1::2]
    assert streamed(requests[0], sampling, key=key) == expected[0]


def test_a_key_for_each_request_makes_its_place_irrelevant(run):
    keys, sampling = (
        jax.random.split(jax.random.key(3), len(QUERIES)),
        Sampling(temperature=0.8, max_tokens=16),
    )
    expected = run(QUERIES, sampling, slots=3, key=keys)
    assert run(QUERIES[::-1], sampling, slots=3, key=keys[::-1]) == expected[::-1]
    twice = run([QUERIES[0]] * 2, sampling, slots=3, key=keys[:2])
    assert twice[0] == expected[0] != twice[1]


# Stop strings.


def as_letters(ids: list[int]) -> str:
    """Two letters a token."""
    return "".join(f"{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in ids)


@pytest.mark.parametrize("place", [1, 6, 8, 12])
def test_a_stop_string_across_tokens_cuts_before_it(run, streamed, slowly, place):
    free = slowly(QUERIES[0], 16)
    text = as_letters(free)
    stop = text[2 * place + 1 : 2 * place + 5]  # from the middle of a token
    cut = text.index(stop) // 2
    sampling = Sampling(stop_strings=("no such text", stop), max_tokens=16)
    assert run([QUERIES[0]], sampling, decode=as_letters) == [free[:cut]]
    assert streamed(QUERIES[0], sampling, decode=as_letters) == free[:cut]


def test_a_stop_string_frees_its_slot(run, slowly, steps):
    free = [slowly(query, 16) for query in QUERIES]
    stop = as_letters(free[0][3:5])
    sampling = Sampling(stop_strings=(stop,), max_tokens=16)
    found = run(QUERIES, sampling, slots=1, decode=as_letters)
    assert found == [free[0][:3], *free[1:]]
    assert steps[-1] == engine.STEPS + 4 * 16


# Invalid requests and options.


@pytest.mark.parametrize(("requests", "sampling", "options", "message"), [
    ([[4], []], Sampling(), {}, "Request 1 is empty"),
    ([[4] * 7], Sampling(max_tokens=500), {}, r"Request 0 has 7 tokens; .*\(6\).*\(500\).*513.*512"),
    ([[4]], Sampling(temperature=0.5), {}, r"Temperature 0\.5 needs a key"),
    ([[4]], Sampling(stop_strings=("a",)), {}, "need decode"),
    ([[4]], Sampling(stop_ids=(259,)), {}, "Stop id 259 is not a token"),
    ([[4]], [Sampling(), Sampling()], {}, "1 requests, but 2 samplings"),
    ([[4]], Sampling(), {"slots": 0}, "slots must be at least 1; got 0"),
    ([[4], [5, 259]], Sampling(), {}, "Request 1 has the token id 259 at place 1; .*has 259: .*258"),
    ([[4, -1]], Sampling(), {}, "Request 0 has the token id -1 at place 1"),
    ([4, 5], Sampling(), {}, "Request 0 must be a list of token ids; got 4"),
    ([[4.5]], Sampling(), {}, r"Request 0 must be a list of token ids; got \[4\.5\]"),
    ([[4]], Sampling(), {"key": 0}, r"key must be one random key, as jax\.random\.key\(0\), or .*; got 0"),
    ([[4]], Sampling(), {"key": jax.random.split(jax.random.key(0))}, "one for each of the 1 requests"),
])  # fmt: skip
def test_mistakes_are_found_before_any_work(run, steps, requests, sampling, options, message):
    with pytest.raises(UserError, match=message):
        run(requests, sampling, **options)
    assert not steps


def test_a_prefix_of_several_rows_needs_to_know_which(tiny_model, prefix):
    several = join([prefix] * 3)
    arguments = tiny_model.params, tiny_model.config, several, QUERIES
    with pytest.raises(UserError, match=r"one row \(batch size 1\); got 3, which need after"):
        generate(*arguments, Sampling())
    wrong: list[Any] = [[0], [0, 1, 2, 3, 0], [0, 1, 2, -1, 0], [0.0] * 5]
    for after in wrong:
        with pytest.raises(UserError, match=r"from 0 to 2, for each of the 5 requests; got \[0"):
            generate(*arguments, Sampling(), after=after)
    longer = decoder.prefill(*arguments[:2], tiny_model.embed([[9]]), prefix)
    uneven = join([decoder.empty_prefix(tiny_model.config, 7), longer])
    with pytest.raises(UserError, match=r"Request 1 .* prefix \(7\) .* 513, more"):
        generate(*arguments[:2], uneven, [[4] * 6] * 2, Sampling(max_tokens=500), after=[0, 1])


def test_a_mistake_in_a_stream_is_found_when_it_is_made(tiny_model, prefix):
    with pytest.raises(UserError, match="Request 0 is empty"):
        stream(tiny_model.params, tiny_model.config, prefix, [], Sampling())


def test_the_window_can_be_filled(run):
    assert len(run([[4] * 7], Sampling(max_tokens=512 - 6 - 7))[0]) == 499


def test_no_requests_no_answers(run):
    assert run([], Sampling()) == []


# The teacher's answers.


def test_the_teachers_answers_are_greedy_and_reported(tiny_model, prefix, slowly):
    done: list[int] = []
    found = answers.answer_ids(tiny_model, prefix, QUERIES, max_tokens=6, on_batch=done.append)
    assert found == [slowly(query, 6, tiny_model.stop_ids) for query in QUERIES]
    assert done == [1, 2, 3, 4, 5]


def test_a_prompt_of_the_contexts_embeddings_answers_like_the_context(tiny_model, prefix):
    sigma = {"embeddings": tiny_model.embed(np.array(CONTEXT))}
    preamble = decoder.empty_prefix(tiny_model.config)
    same = distributions.prompt_prefix(tiny_model.params, tiny_model.config, sigma, preamble, "embedding")
    assert answers.answer_ids(tiny_model, same, QUERIES, max_tokens=6) == answers.answer_ids(
        tiny_model, prefix, QUERIES, max_tokens=6
    )


def test_options_of_one_request_leave_the_others_alone(run, slowly):
    base = Sampling(max_tokens=9)
    samplings = [dataclasses.replace(base, max_tokens=n) for n in (9, 4, 1, 9, 9)]
    samplings[3] = dataclasses.replace(base, temperature=5.0)
    found = run(QUERIES, samplings, key=jax.random.key(0))
    for i in (0, 1, 2, 4):
        assert found[i] == slowly(QUERIES[i], samplings[i].max_tokens)
    assert found[3] != slowly(QUERIES[3], 9)
