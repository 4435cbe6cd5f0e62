"""Whether answers keep the facts."""

from __future__ import annotations

import pytest

import jaxsp
from jaxsp.data.documents import Query
from jaxsp.evaluation.facts import agrees, is_right, lost, says, stands_in, whole_words
from tests.conftest import CONTEXT, QUERIES


@pytest.mark.parametrize(
    ("answer", "fact", "expected"),
    [
        ("The price is 249 euros.", "249 euros", True),
        ("The price is 2,490 euros.", "249", False),
        ("The price is 12.00 euros.", "12", False),
        ("Call 555-0142 now", "555-0142", True),
        ("Call 555-0143", "555-0142", False),
        ("KATZE", "katze", True),
        ("", "x", False),
        ("दिन", "दान", False),
        ("水箱容量为1.2升。", "容量", True),
        ("It is ± 5", "±", True),
        ("It is 5", "±", False),
    ],
)
def test_a_fact_is_said_or_not(answer, fact, expected):
    assert says(answer, fact) is expected


def test_every_decisive_run_in_its_order():
    ids, decisive = [5, 20, 4, 9, 7, 8, 2], [False, True, True, True, False, True, True]
    assert agrees(ids, decisive, [5, 20, 4, 9, 7, 8, 2])
    assert agrees(ids, decisive, [1, 20, 4, 9, 1, 1, 8, 2, 3])  # in other words
    assert not agrees(ids, decisive, [20, 4, 7, 9, 8, 2])  # a number torn apart
    assert not agrees(ids, decisive, [8, 2, 20, 4, 9])
    assert not agrees(ids, decisive, [20, 4, 9, 8])
    assert agrees(ids, decisive, [20, 4, 9, 8], stop_ids=[2])
    assert agrees(ids, [False] * 7, [])


def test_the_words_of_what_is_lost():
    ids, decisive = [5, 20, 4, 9, 7, 8, 2], [False, True, True, False, True, False, True]
    assert lost(ids, decisive, [20, 4, 9, 1], stop_ids=[2]) == [False] * 4 + [True] + [False] * 2
    assert lost(ids, decisive, [7, 20, 4]) == [False] * 4 + [True, False, True]
    texts = ["The", " K", "7", " costs", " 2", "49", " euros", "."]
    assert whole_words(texts, [False, False, True, False, True, True, True, True]) == ["K7", "249 euros"]
    assert whole_words(["容量", "为1.2升"], [False, True]) == ["容量为1.2升"]
    assert whole_words(["a", "\n", "b"], [False, True, False]) == []
    assert whole_words(["Yes", " ?!"], [False, True]) == ["?!"]


def test_right_where_it_is_known():
    assert is_right("It is 249 euros in Oslo", Query("?", expect=("249", "oslo"))) is True
    assert is_right("It is 249 euros", Query("?", expect=("249", "oslo"))) is False
    assert is_right("refund", Query("?", answer="Refund.")) is True
    assert is_right("anything", Query("?")) is None
    pattern = Query("?", expect=("/4[.,]5 ?kg|caf\u00e9/", "heavy"))
    assert is_right("Heavy: 4,5KG", pattern) is True
    assert is_right("cafe\u0301, heavy", pattern) is True
    assert is_right("4,5 kg", pattern) is is_right("heavy: 45 kg", pattern) is False
    assert is_right("/x/", Query("?", answer="/x/")) is True  # an answer is no pattern
    assert is_right("x", Query("?", answer="/y|x/")) is False


def test_figures_and_names_stand_in_the_document():
    assert stands_in("The cable is 90 cm.", CONTEXT) is True
    assert stands_in("The cable is 91 cm.", CONTEXT) is False
    assert stands_in("It was made in Bergen.", CONTEXT) is False
    assert stands_in("It was made in Bergen.", CONTEXT, "Was it Bergen?") is True
    assert stands_in("It is long.", CONTEXT) is None


@pytest.mark.slow
def test_a_report_says_what_is_right_and_how_good_the_teacher_is(calm_model):
    """A model of random weights knows nothing: its teacher is weak, and the report says so first."""
    held_out = [Query("Is it?", expect=("surely",)), Query("What?", answer="zzz")]
    result = jaxsp.compress(
        calm_model, CONTEXT, QUERIES, held_out=held_out, prompt_length=4, steps=0, max_answer_tokens=4,
        kind="key_value", progress=False,
    )  # fmt: skip
    report, brackets = result.report, result.report["held_out"]["brackets"]
    for name, row in brackets.items():
        assert row["facts_right"] == row["accuracy"] == 0.0, name
    assert brackets["full_context"]["decisive_agreement"] == 1.0
    assert brackets["no_context"]["decisive_agreement"] == 0.0
    assert 0 <= brackets["prompt"]["decisive_agreement"] <= 1
    assert report["teacher"]["weak"]
    assert "0 of 2 held-out answers are right" in report["teacher"]["text"]
    assert "a larger model" in report["teacher"]["text"]
    asked = [query for query in report["queries"] if query["split"] == "held_out"]
    assert [query["right"] for query in asked] == [False, False]
    assert report["right"] == {"known": 2, "full_context": 0, "prompt": 0, "no_context": 0}
    cut = report["cut_answers"]
    assert (cut["max_answer_tokens"], cut["train_answers"]) == (4, len(QUERIES))
    assert set(cut["held_out"]) == set(brackets)
    assert asked[1]["captured"] is False
    assert report["prefix_bytes"]["full_context"] > report["prefix_bytes"]["prompt"]
