"""jaxsp.study.choice: the sentences that queries are made for beside those given."""

from __future__ import annotations

import pytest

from jaxsp.study import choice
from jaxsp.study.choice import to_fill


def test_sentences_without_a_query_come_first():
    times = [1, 0, 2, 1, 0, 1]
    assert to_fill(times, given=9, added=0, most=None) == [0, 1, 4]  # a third of them
    assert to_fill(times, given=3, added=0, most=None) == [1, 4]  # beyond it those that nobody asks for
    assert to_fill(times, given=90, added=0, most=None) == [0, 1, 3, 4, 5]  # what two ask for needs no more
    assert to_fill(times, given=90, added=0, most=None, ways=1) == [1, 4]
    assert to_fill([2, 3], given=90, added=0, most=None) == []


def test_what_was_added_takes_room():
    assert to_fill([1, 1, 1], given=9, added=2, most=None) == [0]
    assert to_fill([0, 1, 1], given=9, added=2, most=None) == [0]
    assert to_fill([0, 0, 0], given=9, added=1, most=2) == [0]


@pytest.mark.parametrize(("given", "expected"), [(5, 64), (200, 200)])
def test_the_queries_given_stay_the_half_at_least_of_many(given, expected):
    """Where there is no room for all, some from the whole of the document."""
    found = to_fill([0] * 1000, given, added=0, most=None)
    assert len(found) == expected
    assert found == sorted(set(found))
    assert found[0] < 20
    assert found[-1] > 900
    assert choice.FEW == 64
