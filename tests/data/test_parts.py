"""jaxsp.data.parts: nothing of a document is lost between its parts, and a query finds its own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxsp.data.parts import OVERLAP, Part, cut, search

SENTENCES = [f"The {thing} of the K{i} weighs {i} grams." for i, thing in enumerate(["tank", "lid"] * 12)]
PROSE = " ".join(SENTENCES)
LINES = "\n".join(SENTENCES)


def encode(text):
    """A token a byte."""
    return np.frombuffer(text.encode(), np.uint8)


@given(
    st.lists(st.sampled_from(["word", "a", ". ", "\n", "é", "語", " ", "? Yes", "- "]), min_size=9), st.data()
)
def test_every_character_is_in_a_part_and_none_is_too_long(words, data):
    text, most = "x" + "".join(words), data.draw(st.sampled_from([16, 20, 50]))
    parts = cut(text, most, encode)
    covered = np.zeros(len(text), bool)
    for part in parts:
        covered[part.start : part.end] = True
        assert part.text == text[part.start : part.end].strip()
        assert 0 < len(part.ids) <= most
        np.testing.assert_array_equal(part.ids, encode(part.text))
    assert all(there or character.isspace() for there, character in zip(covered, text, strict=True))
    assert all(a.start < b.start and a.end < b.end for a, b in itertools.pairwise(parts))


@pytest.mark.parametrize("text", [PROSE, LINES])
def test_parts_are_whole_sentences_that_overlap_and_are_equally_long(text):
    most = 320
    parts = cut(text, most, encode)
    assert len(parts) == 4  # 840 bytes; as few as can be with the overlap
    for part in parts:
        assert part.text.endswith("grams.")
        assert part.text.startswith("The")
    for a, b in itertools.pairwise(parts):
        shared = text[b.start : a.end].strip()
        assert shared in SENTENCES  # the one that an eighth has room for
        assert len(shared) <= 2 * most // OVERLAP
    sizes = [len(part.ids) for part in parts]
    assert max(sizes) - min(sizes) <= 2 * len(SENTENCES[-1])


def test_a_sentence_longer_than_a_part_is_cut_between_words():
    parts = cut("one two three four " * 20, 40, encode)
    assert all(part.text.split(" ")[0] in ("one", "two", "three", "four") for part in parts)


def test_tokens_that_are_more_together_than_piece_by_piece():
    """As where an encoding depends on the end of a text."""

    def greedy(text):
        return np.zeros(len(text) + len(text) // 10, np.uint8) if len(text) > 60 else encode(text)

    assert all(len(part.ids) <= 100 for part in cut(PROSE, 100, greedy))


def test_a_stretch_is_shared_with_the_part_that_has_it():
    part = Part(10, 20, "", np.zeros(0, int))
    assert [part.shared(span) for span in ((0, 10), (5, 12), (12, 15), (19, 99))] == [0, 2, 3, 1]


def test_rare_words_find_their_text():
    texts = [*SENTENCES, "The the the tank tank tank of of of a machine that is not named here at all."]
    queries = [f"What is the weight of the {thing} of the K{i}?" for i, thing in ((3, "lid"), (8, "tank"))]
    assert search(texts, queries).tolist() == [3, 8]
    assert search(texts, ["Где?", ""]).tolist() == [0, 0]
    # Of two texts with the same words the shorter is about them.
    assert search([f"{PROSE} Ravens.", "Ravens nest."], ["ravens"]).tolist() == [1]
