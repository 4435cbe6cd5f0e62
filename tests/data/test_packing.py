"""Packing: everything fits, nothing is lost, little is wasted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxsp.data.examples import batch_indices, make_rows
from jaxsp.data.packing import Packing
from jaxsp.typing import EMPTY

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=60).map(np.array)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(lengths=LENGTHS, batch_size=st.integers(1, 20), devices=st.integers(1, 9))
def test_any_number_of_devices_holds_the_same_batch(lengths, batch_size, devices):
    packing = Packing.of(lengths, batch_size)
    spread = packing.over(devices, int(lengths.max()))
    assert spread.rows % devices == 0
    for cursor in (0, 17, 100):
        drawn = packing.draw(lengths, cursor, [3])
        assert spread.assign_rows(lengths[drawn].tolist()) is not None


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 200), st.integers(1, 5))
def test_sequences_of_one_length_are_counted_as_they_would_be_drawn(length, rows, more, count):
    packing, lengths = Packing(rows, length + more), np.full(count, length)
    drawn = len(packing.draw(lengths, 0, [0]))
    assert packing._padding(lengths) == pytest.approx(1 - drawn * length / packing.tokens, abs=1e-12)


def test_every_device_has_work():
    lengths = np.array(MUSEUM)
    packing = Packing.of(lengths, 8)
    spread = packing.over(8, int(lengths.max()))
    drawn = packing.draw(lengths, 0, [0])
    assigned = spread.assign_rows(lengths[drawn].tolist())
    assert assigned is not None
    assert len(set(assigned)) == min(8, len(drawn))
    assert spread.length < packing.length


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(lengths=LENGTHS, batch_size=st.integers(1, 20), cursor=st.integers(0, 300))
def test_a_batch_fits_and_is_the_streams_next_part(lengths, batch_size, cursor):
    packing = Packing.of(lengths, batch_size)
    drawn = packing.draw(lengths, cursor, [7])
    assert len(drawn) >= 1
    assigned = packing.assign_rows(lengths[drawn].tolist())
    assert assigned is not None
    for row in range(packing.rows):
        assert lengths[drawn][np.array(assigned) == row].sum() <= packing.length
    stream = batch_indices(len(lengths), cursor, len(drawn) + 1, [7])
    np.testing.assert_array_equal(drawn, stream[: len(drawn)])
    assert packing.rows * packing.length - lengths[drawn].sum() < packing.rows * lengths.max()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(jobs=st.lists(LENGTHS, min_size=1, max_size=4), batch_size=st.integers(1, 20))
def test_a_shared_shape_holds_the_batches_of_all(jobs, batch_size):
    """The draws of each job are decided by its own shape; the shared one only has room for it."""
    own = [Packing.of(lengths, batch_size) for lengths in jobs]
    batches = []
    for lengths, packing in zip(jobs, own, strict=True):
        batches += [lengths[packing.draw(lengths, cursor, [1])] for cursor in (0, 9, 55)]
    shared = Packing.shared(own, batches)
    assert all(shared.assign_rows(batch.tolist()) is not None for batch in batches)
    if len(set(own)) == 1:
        assert shared == own[0]
    longer = np.array([shared.length + 5])
    grown = shared.grown(longer)
    assert grown.assign_rows(longer.tolist()) is not None
    assert grown.rows == shared.rows
    assert shared.grown(batches[0]) == shared


def test_few_shapes_serve_all_that_is_read_once():
    shapes = {Packing.for_all(np.full(n, size)) for n in range(20, 60) for size in range(50, 64)}
    assert len(shapes) <= 6


def test_what_does_not_fit_is_refused():
    assert Packing(2, 10).assign_rows([10, 5, 5]) is not None
    assert Packing(2, 10).assign_rows([6, 6, 6]) is None
    rows = make_rows([[3] * 6] * 3, [[2]] * 3)
    with pytest.raises(ValueError, match="3 sequences of 18 tokens don't fit"):
        Packing(2, 10).pack(rows, np.arange(3))


def test_packed_rows_hold_the_sequences():
    rows = make_rows([[5, 6], [7], [20, 21, 22]], [[8, 2], [9, 10, 11, 2], [4]])
    hidden = np.arange(3 * 4 * 2, dtype=np.float32).reshape(3, 4, 2)
    rows = rows.with_targets(hidden=hidden)
    packed = Packing(1, 11).pack(rows, np.array([0, 1, 2]))
    assert packed.segment_ids is not None
    assert packed.tokens[0].tolist() == [5, 6, 8, 7, 9, 10, 11, 20, 21, 22, 0]
    assert packed.offsets[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, EMPTY]
    assert packed.segment_ids[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, EMPTY]
    assert packed.answer_index[0, :7].tolist() == [1, 2, 3, 4, 5, 6, 9]
    assert packed.targets["tokens"][0, :7].tolist() == [8, 2, 9, 10, 11, 2, 4]
    assert packed.mask[0].tolist() == [True] * 7 + [False] * 4
    np.testing.assert_array_equal(packed.targets["hidden"][0, :7], hidden[rows.mask])
    assert (len(packed), packed.sequences) == (1, 3)
    assert rows.sequences == 3
    blank = packed.take([0, 1])
    assert blank.segment_ids is not None
    assert blank.sequences == rows.take([0, 1, 2, 3]).sequences == 3
    assert (blank.segment_ids[1] == EMPTY).all()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=20))
def test_what_is_packed_comes_back(sizes):
    rows = make_rows([[3] * query for query, _ in sizes], [[5] * answer for _, answer in sizes])
    hidden = np.random.RandomState(0).randn(*rows.mask.shape, 2) * rows.mask[..., None]
    rows = rows.with_targets(hidden=hidden)
    packing = Packing(2, 45)
    batches = packing.in_order(rows)
    assert np.concatenate(batches).tolist() == list(range(len(sizes)))
    values = [packing.pack(rows, index).targets["hidden"] for index in batches]
    np.testing.assert_array_equal(packing.unpack(values, rows, batches), hidden)
    fewest = -(-int(rows.lengths.sum()) // 90)
    assert fewest <= len(batches) <= 2 * fewest


def test_a_batch_of_nothing():
    rows = make_rows([[5, 6]], [[8, 2]])
    empty = Packing(2, 5).pack(rows, np.zeros(0, int))
    assert (empty.offsets == EMPTY).all()
    assert not empty.mask.any()
    assert empty.sequences == 0


# Tokens of query and answer of the questions of experiments/documents/museum, with SmolLM2's answers.
MUSEUM = [
    48, 50, 61, 55, 60, 61, 61, 63, 64, 61, 63, 63, 61, 61, 56, 63, 60, 62, 65, 62,
    64, 60, 63, 51, 62, 63, 52, 61, 55, 61, 61, 62, 56, 62, 60, 62, 67, 64, 61, 58,
    61, 63, 65, 43, 62, 62, 63, 34, 64, 63, 32, 69, 66, 65, 64, 63, 65, 48, 66, 61,
    62, 62, 61, 62, 63, 65, 65, 64, 60, 61, 57, 61, 63, 66, 24, 62, 66, 66, 64, 62,
    61, 61, 64, 63, 61, 42,
]  # fmt: skip


@pytest.mark.parametrize("batch_size", [4, 8, 16, 32, 64])
def test_little_is_wasted(batch_size):
    lengths = np.array(MUSEUM)
    packing, cursor, used = Packing.of(lengths, batch_size), 0, []
    for _ in range(200):
        drawn = packing.draw(lengths, cursor, [0])
        cursor += len(drawn)
        used.append(lengths[drawn].sum() / (packing.rows * packing.length))
    assert 1 - np.mean(used) <= 0.10
    assert cursor / 200 == pytest.approx(batch_size, rel=0.1)
