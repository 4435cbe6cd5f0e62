"""jaxsp.study.choice: the sentences that queries are made for beside those given."""

from __future__ import annotations

import pytest

from jaxsp.data.documents import Query
from jaxsp.settings import make_settings
from jaxsp.study import choice
from jaxsp.study.choice import to_fill, to_measure, to_train


def test_sentences_without_a_query_are_asked_for():
    times = [1, 0, 2, 1, 0, 1]
    for given in (3, 9, 90):
        assert to_fill(times, given=given, added=0, most=None) == [1, 4]
    assert to_fill([2, 1], given=90, added=0, most=None) == []


def test_what_was_added_takes_room():
    assert to_fill([0] * 66, given=9, added=62, most=None) == [0, 33]
    assert to_fill([0, 0, 0], given=9, added=1, most=2) == [0]
    assert to_fill([0, 0, 0], given=9, added=3, most=2) == []


@pytest.mark.parametrize(("given", "expected"), [(5, 64), (200, 200)])
def test_as_many_as_are_given_or_a_few_at_most(given, expected):
    """If there is no room for all, it is some from the whole of the document."""
    found = to_fill([0] * 1000, given, added=0, most=None)
    assert len(found) == expected
    assert found == sorted(set(found))
    assert found[0] < 20
    assert found[-1] > 900
    assert choice.FEW == 64


FORMS = ("question", "question", "question", "quote", "mention", "about")
WEIGHTS = {"question": 3, "quote": 1, "mention": 1, "about": 1}


@pytest.mark.parametrize(
    ("cut", "expected"), [((), [0, 1, 2, 3]), ((0, 1), [2, 3, 4, 5]), ((0, 1, 2, 3), [4, 5, 0, 1])]
)
def test_answers_that_are_cut_count_where_there_are_not_enough_others(cut, expected):
    queries, settings = [Query(f"q{i}", seed=seed) for i, seed in enumerate(FORMS)], make_settings({})
    depends = {i: {0} for i in range(len(FORMS))}
    assert to_train(depends, queries, 0, 1, settings, WEIGHTS, cut) == expected


def test_a_question_whose_answer_is_cut_is_not_held_out_if_there_are_others():
    queries, settings = [Query(f"q{i}", seed=seed) for i, seed in enumerate(FORMS)], make_settings({})
    depends = {i: {0} for i in range(len(FORMS))}
    for whole in (0, 1, 2):
        assert to_measure(depends, queries, 0, settings, cut={0, 1, 2} - {whole}) == [whole]
    assert to_measure(depends, queries, 0, settings, cut=(0, 1, 2))[0] in (0, 1, 2)
