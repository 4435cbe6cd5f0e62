"""jaxsp.study.text: sentences where they stand, and chunks under their headings."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, strategies as st

from jaxsp.study.seeds import quote, what_is
from jaxsp.study.text import Document, first_words, sentences

MARKDOWN = """# Cups and plates

A cup holds 0.2 l, i.e. little. It is red.

## Prices

- Price of a cup: 3 euros
- Price of a plate:
  5 euros. Postage is extra!

| size | weight |
|------|--------|
| S    | 100 g  |
| L    | 250 g  |

```
first = 1
second = 2
```
"""


def count(text: str) -> int:
    return len(text.split())


def test_sentences_items_rows_and_lines_each_with_its_headings():
    found = sentences(MARKDOWN)
    assert [s.text for s in found] == [
        "A cup holds 0.2 l, i.e. little.",
        "It is red.",
        "Price of a cup: 3 euros",
        "Price of a plate: 5 euros.",
        "Postage is extra!",
        "S | 100 g",
        "L | 250 g",
        "first = 1",
        "second = 2",
    ]
    assert found[1].headings == ("Cups and plates",)
    assert all(s.headings == ("Cups and plates", "Prices") for s in found[2:])
    assert [s.columns for s in found[5:7]] == ["size | weight"] * 2


def test_html_is_read_without_its_tags():
    """A text of tags and comments alone has no sentence."""
    text = '<div class="note">\n  <p>The lid is red.</p>\n</div>\n\n<!-- this\nof two lines -->\n\nIt is new.'
    found = sentences(text)
    assert [s.text for s in found] == ["The lid is red.", "It is new."]
    assert text[found[0].start : found[0].end].strip() == "<p>The lid is red.</p>"
    assert sentences('<img src="a.png">\n\n<!-- nothing -->\n\n--- *** ---\n\n<br/>\n') == []


@pytest.mark.parametrize("number", range(9))
def test_a_document_without_a_sentence_lacks_it_and_nothing_else(number):
    one = sentences(MARKDOWN)[number]
    without = MARKDOWN[: one.start] + MARKDOWN[one.end :]
    assert "".join(one.text.split()) not in "".join(without.replace("|", "").split())
    others = [s.text for i, s in enumerate(sentences(MARKDOWN)) if i != number]
    assert [s.text for s in sentences(without)] == others


@given(st.text(alphabet="aB.!? \n#-|>`1é語", max_size=80))
def test_any_text_has_sentences_that_stand_in_it_in_order(text):
    found = sentences(text)
    assert all(0 <= s.start < s.end <= len(text) for s in found)
    assert all(a.end <= b.start for a, b in itertools.pairwise(found))


def test_chunks_are_whole_sentences_under_one_heading():
    document = Document.of(MARKDOWN, count, most=14)
    assert [i for chunk in document.chunks for i in chunk.sentences] == list(range(9))
    for chunk in document.chunks:
        headings = {document.sentences[i].headings for i in chunk.sentences}
        assert headings == {chunk.headings}
        assert all(heading in chunk.text for heading in chunk.headings)
    assert len(document.chunks) > 3
    table = next(c for c in document.chunks if document.sentences[c.sentences[0]].columns)
    assert "size | weight" in table.text


def test_a_false_variant_has_the_figure_of_another_sentence():
    document = Document.of("It costs 3 euros. It weighs 5 kilograms. It is red.", count)
    assert document.false_variant(0) == "It costs 5 euros."
    assert document.false_variant(2) == ""


def test_rare_words_stand_once_in_the_document():
    document = Document.of("The red kettle is here. The red cup is there.", count)
    assert document.rare_words(0) == ["kettle", "here"]
    spaceless = Document.of("它的容量为1.2升，颜色为深绿色。它的重量为4.5公斤，颜色为深绿色。", count)
    assert [spaceless.rare_words(i) for i in (0, 1)] == [["它的容量为1.2升"], ["它的重量为4.5公斤"]]


def test_first_words():
    assert first_words("one two three four five six", 1 / 3) == "one two"
    assert first_words("one two", 1 / 2) == ""


@pytest.mark.parametrize(
    ("text", "english"), [("The cat is in the house of a man.", True), ("Die Katze ist im Haus.", False)]
)
def test_english_is_known_by_its_commonest_words(text, english):
    assert Document.of(text, count).is_english is english


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("- Weight of the press: 4.5 kilograms", ["4.5 kilograms", "Weight"]),
        ("The order number is KF-208.", ["KF-208", "number"]),
        ("Call 555-0142 on Mondays.", ["555-0142", "Mondays"]),
        ("It was made by Ida Lund in 1932.", ["1932", "Ida Lund"]),
        ("Der Tank fasst 1,2 Liter.", ["1,2 Liter", "Tank"]),
        ("| size | weight |\n|---|---|\n| S | 100 g |", ["100 g"]),
    ],
)
def test_the_facts_of_a_sentence_the_likeliest_to_be_asked_for_first(text, first):
    assert Document.of(text, count).facts_of(0)[: len(first)] == first


def test_a_table_whose_head_has_empty_cells_is_asked_for():
    text = "| | size | |\n|---|---|---|\n| mug | 9 cm | red |\n| jug | 20 cm | |\n"
    document = Document.of(text, count)
    asked = [draft.text for chunk in document.chunks for draft in what_is.drafts(document, chunk)]
    assert asked == ["What is the size of mug?", "What is the size of jug?"]


def test_what_stands_everywhere_is_no_fact_of_a_sentence():
    document = Document.of("The K7 is red. The K7 is big. The K7 is new.", count)
    assert document.facts_of(0) == ["red"]


def test_a_quote_is_asked_for_by_words_that_begin_no_other_sentence():
    """Sentences that are repeated are one; what can't be told from another one is not quoted."""
    text = (
        "The lid is red and small. The lid is made of steel. It is new.\n\nIt is new. It is new and stays so."
    )
    whole = Document.of(text, lambda text: len(text.split()))
    asked = [draft.text for chunk in whole.chunks for draft in quote.drafts(whole, chunk)]
    beginnings = [query.split('"')[1] for query in asked]
    assert beginnings == ["The lid is red", "The lid is made", "It is new and"]
    assert whole.begins_one("The lid is r")
    assert not whole.begins_one("The lid is")
