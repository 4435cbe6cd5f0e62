"""The sentences that lost answers most likely stand in."""

from __future__ import annotations

from jaxsp.study import lost as module
from jaxsp.study.lost import lost, passages
from jaxsp.study.text import Sentence

DOCUMENT = """# The kettle

- Capacity: 1.2 litres
- Weight of it: 4.5 kilograms

The cable is 90 cm long. The lid is made of steel. It is made in Norway.
"""


def query(
    text: str, full: str = "", prompt: str = "", captured: bool = False, split: str = "held_out"
) -> dict:
    answers = {"answer_full_context": full, "answer_prompt": prompt}
    return {"query": text, "split": split, "captured": captured, **answers}


def marked(document: str, *queries: dict) -> dict[str, tuple[int, ...]]:
    found = passages(document, queries)
    assert "".join(piece.text for piece in found) == document
    return {piece.text: piece.lost for piece in found if piece.lost}


def test_lost_are_the_held_out_queries_that_are_not_captured():
    rows = [query("a"), query("b", captured=True), {"query": "c", "split": "train"}]
    assert lost(rows) == rows[:1]


def test_a_sentence_is_marked_by_what_the_query_and_the_lost_words_share_with_it():
    found = marked(
        DOCUMENT,
        query("How long is the cable?", "It is 90 cm long.", "It is 80 cm long."),
        query("Where does it come from?", "It comes from Norway.", "It comes from Bergen."),
        query("And the lid?", "It is of steel.", "It is of glass."),
        query("What is its length?", "90 cm", "80 cm"),
    )
    assert found == {
        "The cable is 90 cm long.": (0, 3),
        "It is made in Norway.": (1,),
        "The lid is made of steel.": (2,),
    }


def test_sentences_that_overlap_are_marked_for_all(monkeypatch):
    text = "The cable is 90 cm long. The lid is steel."
    whole, part = Sentence(text, 0, len(text)), Sentence(text[:24], 0, 25)
    monkeypatch.setattr(module, "sentences", lambda document: [part, whole])
    asked = query("And the lid?", "Steel.", "Glass."), query("How long is the cable?", "90 cm", "80 cm")
    marks = [piece.lost for piece in passages(text, asked) if piece.lost]
    assert sorted(number for some in marks for number in some) == [0, 1]


def test_what_stands_nowhere_marks_nothing():
    assert marked(DOCUMENT, query("Who wrote the novel?", "Somebody else.", "Nobody.")) == {}
    assert marked("", query("a", "b", "c")) == {}


def test_sentences_that_nobody_asks_for_are_passages_too():
    texts = ["Capacity: 1.2 litres", "Weight of it: 4.5 kilograms", "The cable is 90 cm long."]
    texts += ["The lid is made of steel.", "It is made in Norway."]
    asked = [query("How long is the cable?", "It is 90 cm long.", "It is 80 cm long.")]
    found = passages(DOCUMENT, asked, {"sentences": texts, "asked": [0, 3, 4]})
    assert "".join(piece.text for piece in found) == DOCUMENT
    marks = {piece.text: (piece.lost, piece.asked) for piece in found if piece.lost or not piece.asked}
    assert marks == {"- Weight of it: 4.5 kilograms": ((), False), "The cable is 90 cm long.": ((0,), False)}
    # Of another document nothing is known.
    other = passages(DOCUMENT, asked, {"sentences": texts[1:], "asked": []})
    assert all(piece.asked for piece in other)


def test_long_documents_are_cut_where_nothing_is_marked(monkeypatch):
    monkeypatch.setattr(module, "MOST_TEXT", 1000)
    filler = " ".join(f"Word number {i} is here." for i in range(200))
    document = f"{filler}\n\nThe cable is blue.\n\n{filler}"
    found = passages(document, [query("What colour has the cable?", "blue", "red")])
    assert [piece.lost for piece in found] == [(), (0,), ()]
    assert found[1].text == "The cable is blue."
    assert max(len(piece.text) for piece in found) < 2 * module.KEPT + 10
    assert " […] " in found[0].text
