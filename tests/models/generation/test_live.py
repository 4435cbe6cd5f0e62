"""Requests that come and go get the answers that each gets alone."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import numpy as np
import pytest

from jaxsp import distributions
from jaxsp.models.generation import (
    Live,
    Sampling,
    engine,
    generate,
    live as live_module,
    sampling as sampling_module,
)
from jaxsp.typing import KeyValues, UserError

SLOTS, QUERY, ANSWER = 3, 40, 32


@pytest.fixture(scope="module")
def prefixes(tiny_model):
    """Prefixes of several lengths; one has biases."""
    params, config = tiny_model.params, tiny_model.config
    random = np.random.RandomState(3)
    found = [
        distributions.context_prefix(params, config, random.randint(3, 259, (1, n))) for n in (6, 19, 11)
    ]
    bias = random.standard_normal(found[2].keys.shape[:4]).astype(np.float32)
    return [*found[:2], dataclasses.replace(found[2], bias=jax.numpy.asarray(bias))]


@pytest.fixture
def live(tiny_model, prefixes, monkeypatch):
    """With two sizes, so that it changes between them."""
    monkeypatch.setattr(live_module, "SMALLEST", 16)
    sizes = {"slots": SLOTS, "query_tokens": QUERY, "answer_tokens": ANSWER}
    return Live(tiny_model.params, tiny_model.config, prefixes, **sizes)


@dataclasses.dataclass(frozen=True)
class Request:
    ids: list[int]
    sampling: Sampling
    after: int
    seed: int


def requests(count: int) -> list[Request]:
    """Greedy ones and others, of all lengths."""
    random = np.random.RandomState(5)
    return [
        Request(
            random.randint(3, 259, random.randint(1, QUERY + 1)).tolist(),
            Sampling(
                temperature=(0.0, 0.0, 1.0, 1.7)[i % 4],
                top_p=(1.0, 0.8)[i % 2],
                top_k=(0, 40)[i // 2 % 2],
                stop_ids=(2, 9) if i % 3 else (),
                max_tokens=int(random.randint(1, ANSWER + 1)),
            ),
            int(random.randint(3)),
            i,
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def alone(tiny_model, prefixes):
    """The answers of ``generate``, where all are there from the start."""
    several = KeyValues.side_by_side(KeyValues.alike(prefixes))

    def alone(asked: list[Request]) -> list[list[int]]:
        return generate(
            tiny_model.params, tiny_model.config, several, [one.ids for one in asked],
            [one.sampling for one in asked], after=[one.after for one in asked],
            key=jax.vmap(jax.random.key)(np.array([one.seed for one in asked], np.uint32)),
        )  # fmt: skip

    return alone


def add(live: Live, request: Request, **options) -> int:
    return live.add(request.ids, request.sampling, after=request.after, seed=request.seed, **options)


def served(live: Live, asked: list[Request], steps, arrivals, dropped=()) -> dict[int, list[int]]:
    """The answers, where requests arrive as there is room, and some are dropped after their first tokens."""
    waiting, rows = list(range(len(asked))), {}
    answers: dict[int, list[int]] = {i: [] for i in waiting}
    while waiting or live.busy:
        for _ in range(min(arrivals(), live.free, len(waiting))):
            i = waiting.pop(0)
            rows[add(live, asked[i])] = i
        for news in live.advance(steps()):
            i = rows[news.row]
            answers[i] += news.ids
            assert not news.likely
            if news.ended:
                del rows[news.row]
            elif i in dropped and answers[i]:
                live.drop(news.row)
                del rows[news.row]
    assert live.free == 2 * SLOTS
    return answers


def test_answers_do_not_depend_on_when_who_comes_and_leaves(live, alone):
    asked = requests(40)
    expected = alone(asked)
    random = np.random.RandomState(1)
    dropped = {i for i in range(40) if i % 7 == 3 and len(expected[i]) > 8}
    assert dropped
    found = served(live, asked, lambda: random.randint(1, 6), lambda: random.randint(4), dropped)
    for i, answer in found.items():
        if i in dropped:
            assert 0 < len(answer) < len(expected[i]) or answer == expected[i]
            assert answer == expected[i][: len(answer)], i
        else:
            assert answer == expected[i], i
    again = served(live, asked[::-1], lambda: 3, lambda: 9)
    assert [again[i] for i in range(40)] == expected[::-1]


def test_nothing_is_compiled_after_the_start(live, caplog):
    asked = requests(12)
    jax.clear_caches()  # other tests have compiled much
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        live.warm_up()
    assert any("Compiling" in message for message in caplog.messages)
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        served(live, asked, lambda: 3, lambda: 2)
        live.drop(add(live, asked[0], likely=True))
        add(live, asked[1], likely=True)
        while live.busy:
            live.advance(5)
    compiled = [message for message in caplog.messages if "Compiling" in message]
    assert not compiled


def test_there_is_as_much_room_as_is_needed(live):
    sizes = live._levels
    assert sizes == [(32, 16), (64, 32)]
    assert live._batch.sizes == sizes[1]
    live.add([5] * 32, Sampling(max_tokens=20))
    found = [(live.advance(4), live._batch.sizes) for _ in range(5)]
    assert [size for _, size in found] == [sizes[0]] * 4 + [sizes[1]]
    live.add([5] * 33, Sampling(max_tokens=1))
    live.advance(1)
    assert live._batch.sizes == sizes[1]
    live.add([5], Sampling(max_tokens=2))
    live.advance(1)
    assert live._batch.sizes == sizes[0]


def test_a_step_computes_as_many_slots_as_are_needed(tiny_model, prefixes, alone, monkeypatch):
    """Whichever they are: here the only one left is the last that got a slot."""
    loop: Any = engine._advance
    computed, decoded = [], engine._decoded

    def counted(given, state, steps):
        computed.append(len(state.running_B))
        return decoded(given, state, steps)

    monkeypatch.setattr(engine, "_decoded", counted)
    loop.clear_cache()
    sizes = {"slots": 9, "query_tokens": QUERY, "answer_tokens": ANSWER}
    live = Live(tiny_model.params, tiny_model.config, prefixes, **sizes)
    assert live._batch.widths == [1, 4, 9]
    asked = [dataclasses.replace(one, sampling=Sampling(max_tokens=2)) for one in requests(5)]
    asked[4] = dataclasses.replace(asked[4], sampling=Sampling(max_tokens=20, temperature=1.0))
    rows = [add(live, request) for request in asked]
    found = live.advance(3)
    while live.busy:
        found += live.advance(2)
    loop.clear_cache()
    assert computed == [9, 1]  # each is traced once
    tokens = [[i for news in found if news.row == row for i in news.ids] for row in rows]
    assert tokens == alone(asked)


def test_steps_are_counted_whatever_the_room(live):
    """The room grows and shrinks between; the ring's column never leaves the ring."""
    for max_tokens, steps in ((20, 20), (2, 22), (32, 54)):
        live.add([5], Sampling(max_tokens=max_tokens))
        while live.busy:
            before = live.steps
            live.advance(3)
            assert 0 < live.steps - before <= 3
            assert 0 <= live._batch._state.column < live._batch.sizes[1]
        assert live.steps == steps


def test_who_has_ended_costs_the_others_nothing(live, monkeypatch):
    """A greedy answer goes on without the draw that a sampled one needed, whose slot is at rest."""
    loop: Any = engine._advance
    draws, sample = [], sampling_module._sample

    def counted(logits_BV, *options):
        jax.debug.callback(lambda: draws.append(True))
        return sample(logits_BV, *options)

    monkeypatch.setattr(sampling_module, "_sample", counted)
    loop.clear_cache()
    try:
        live.add([5], Sampling(max_tokens=20))
        live.add([6], Sampling(temperature=1.0, top_p=0.5, max_tokens=3))
        for steps, expected in ((3, 3), (8, 3)):
            live.advance(steps)
            jax.effects_barrier()
            assert len(draws) == expected
    finally:
        loop.clear_cache()


def test_one_that_leaves_frees_its_slot_and_its_row(live):
    long = [Request([5 + i], Sampling(max_tokens=ANSWER), 0, 0) for i in range(2 * SLOTS)]
    rows = [add(live, request) for request in long]
    assert live.free == 0
    assert {news.row for news in live.advance(2)} == set(rows[:SLOTS])
    live.drop(rows[0])  # under way
    live.drop(rows[4])  # waits
    live.drop(rows[4])  # again: nothing happens
    assert live.free == 2
    new = add(live, long[0])
    found = {news.row: news.ids for news in live.advance(2)}
    assert set(found) == {rows[1], rows[2], rows[3]}  # the next that waited has the slot
    live.drop(rows[1])
    live.drop(rows[2])
    assert {news.row for news in live.advance(1)} == {rows[3], rows[5], new}


def test_probabilities_come_with_the_tokens(live, tiny_model, alone):
    asked = dataclasses.replace(requests(1)[0], after=0, sampling=Sampling(max_tokens=9))
    add(live, dataclasses.replace(asked, ids=[7, 8]))
    row = add(live, asked, likely=True)
    news = []
    while live.busy:
        news += live.advance(2)
    own = [one for one in news if one.row == row]
    assert all(one.likely is None for one in news if one.row != row)
    expected = alone([asked] * 2)[0]
    assert [i for one in own for i in one.ids] == expected
    tops = np.concatenate([one.likely.ids_RAN for one in own])
    chosen = np.concatenate([one.likely.chosen_RA for one in own])
    logs = np.concatenate([one.likely.log_RAN for one in own])
    assert tops.shape == logs.shape == (9, 20)
    assert tops[:, 0].tolist() == expected  # greedy
    np.testing.assert_array_equal(logs[:, 0], chosen)
    assert (np.diff(logs, axis=1) <= 0).all()
    assert (np.exp(logs).sum(axis=1) < 1 + 1e-5).all()


@pytest.mark.parametrize(("ids", "sampling", "said"), [
    ([], Sampling(max_tokens=1), "The request is empty"),
    ([259], Sampling(max_tokens=1), "The request has the token id 259"),
    ([5] * (QUERY + 1), Sampling(max_tokens=1), "The request has 41 tokens; there is room for 40"),
    ([5], Sampling(max_tokens=ANSWER + 1), "has 33 tokens to answer; there is room for 32"),
    ([5], Sampling(max_tokens=600), "more than the model's window of 512"),
    ([5], Sampling(stop_ids=tuple(range(9)), max_tokens=1), "has 9 stop ids; there is room for 8"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(live, ids, sampling, said):
    with pytest.raises(UserError, match=said):
        live.add(ids, sampling)
    assert live.free == 2 * SLOTS


def test_there_is_room_for_twice_the_slots(live):
    for _ in range(2 * SLOTS):
        live.add([5], Sampling(max_tokens=1))
    with pytest.raises(UserError, match="no room for more than 6 requests at once"):
        live.add([5], Sampling(max_tokens=1))
