"""jaxsp.study.filters: which queries and answers are left out."""

from __future__ import annotations

import pytest

from jaxsp.study.filters import Seen, is_answer, is_sane, scripts

DOCUMENT = "The cable of the K7 is 90 centimetres long."


@pytest.mark.parametrize(
    ("text", "sane"),
    [
        ("How long is the cable?", True),
        ("How many centimetres?", True),
        ("Wie lang ist das Kabel?", False),
        ("What?", False),
        ("", False),
        ("Какой длины кабель?", False),
        ("这根电线有多长?", False),
        (" ".join(["long"] * 50), False),
    ],
)
def test_a_query_is_sane_by_length_and_language(text, sane):
    assert is_sane(text, DOCUMENT) is sane


def test_a_document_in_another_script_is_asked_in_it():
    assert is_sane("这根电线有多长?", "这根电线长九十厘米。")
    assert scripts("aé語") == {"LATIN", "CJK"}


GERMAN = "Das Kabel der K7 ist 90 Zentimeter lang. Der Tank ist von Braun in Hamburg und hat ein Sieb."


@pytest.mark.parametrize(
    ("text", "sane"),
    [
        ("Wie lang ist das Kabel?", True),
        ("Von wem ist der Tank?", True),
        ("Is the tank of Braun in Hamburg?", False),
        ("How does the Tank of Braun look?", False),
        ("Quelle est la longueur du câble?", False),
    ],
)
def test_a_document_in_another_language_is_asked_in_it(text, sane):
    """Small models fall back to English; names and words that both languages have don't make it German."""
    assert is_sane(text, GERMAN) is sane


def test_nearly_the_same_query_is_not_new():
    seen = Seen(["What is the phone number of the repair service?"])
    assert not seen.is_new("what is the phone number of the repair service")
    assert not seen.is_new("So what is the phone number of the repair service?")
    assert seen.is_new("What is the address of the repair service?")
    assert seen.is_new("What is the phone number?")
    seen.add("What is the phone number?")
    assert not seen.is_new("What is the phone number?")


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("It is 90 centimetres long.", True),
        ("I'm sorry, but I can't help with that.", False),
        ("The text does not mention the cable.", False),
        ("The warranty does not cover limescale.", True),
        ("...", False),
    ],
)
def test_a_refusal_is_no_answer(text, good):
    assert is_answer(text) is good
