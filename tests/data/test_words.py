"""Words in any script."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given, strategies as st

from jaxsp.data.words import pattern, plain, runs, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It holds 1.2 litres, KF-208.", ["it", "holds", "1.2", "litres", "kf", "208"]),
        ("दिन और दान", ["दिन", "और", "दान"]),
        ("Cafe\u0301", ["caf\u00e9"]),
        ("水箱为1.2升。", ["水", "箱", "为", "1.2", "升"]),
        ("น้ำ 5", ["น้", "ำ", "5"]),
        ("\U0001e92b\U0001e944a", ["\U0001e92b\U0001e944a"]),  # a mark beyond the first plane
        ("물 탱크", ["물", "탱크"]),
        ("→ ±!", []),
    ],
)
def test_words_of_any_script(text, expected):
    assert words(text) == expected


@given(st.text())
def test_no_letter_is_lost_and_both_forms_of_a_text_have_the_same_words(text):
    for split in (words, runs):
        assert split(text) == split(unicodedata.normalize("NFD", text)) == split(plain(text))
        left = plain(text)
        for word in split(text):
            left = left.partition(word)[2]
        found = "".join(split(text))
        assert [c for c in plain(text) if c.isalpha()] == [c for c in found if c.isalpha()]


@given(st.text(alphabet="aZ é9_.,-\n"))
def test_texts_of_letters_are_read_as_they_were_in_0_1(text):
    assert words(text) == re.findall(r"\d+(?:[.,]\d+)*|[^\W\d]+", text.casefold())
    assert runs(text) == re.findall(r"\w+", text.lower())


def test_a_pattern_stands_between_slashes():
    assert pattern("/") is pattern("//") is pattern("and/or") is pattern("/etc") is None
    found = pattern("/caf\u00e9|4[.,]5/")
    assert found is not None
    assert found.search("It weighs 4,5 kg.")
    assert found.search("CAF\u00c9")
