"""jaxsp.study.writing: drafts that the model completes."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from jaxsp.study import writing
from jaxsp.study.seeds import Draft
from jaxsp.study.writing import completed
from jaxsp.teacher.problem import read_preamble

DOCUMENT = "The lid is made of steel. The cable is 90 cm long."


@pytest.fixture
def write(calm_model):
    """With room for the examples, which have a token a byte here."""
    model = dataclasses.replace(calm_model, config=calm_model.config.replace(window=2048))
    preamble = read_preamble(model)

    def run(drafts: list[Draft]) -> list[str | None]:
        return completed(model, preamble, drafts, DOCUMENT, jax.random.key(3))

    return run


def begun(count: int) -> list[Draft]:
    """Drafts of several lengths."""
    return [Draft(f"How {i}", (0,), "The lid is made of steel." * (1 + i % 3)) for i in range(count)]


def test_the_tokens_that_end_a_question_are_those_with_its_signs(calm_model):
    tokenizer, ends = calm_model.tokenizer, set(writing._end_ids(calm_model))
    texts = {i: tokenizer.decode([i]) for i in range(calm_model.config.vocab_size)}
    assert ends == {i for i, text in texts.items() if "?" in text or "\n" in text}
    assert ends


@pytest.mark.slow
def test_a_slot_that_is_free_at_once_changes_no_question(write, monkeypatch):
    """The texts are those that the host cuts at the signs."""
    monkeypatch.setattr(writing, "TEMPERATURE", 3.0)  # else a random model comes to no end
    found = write(begun(40))
    assert any(found)
    assert all(text is None or (text.startswith("How ") and "\n" not in text) for text in found)
    assert all(text is None or text.count("?") <= 1 for text in found)
    monkeypatch.setattr(writing, "_end_ids", lambda model: [])
    assert write(begun(40)) == found


def test_what_is_complete_stays_as_it_is(write):
    complete = Draft("Say it.", (0,), answer="It.")
    assert write([complete]) == ["Say it."]
    found = write([*begun(2), complete])
    assert found[2] == "Say it."
    assert len(found) == 3


def test_a_model_without_room_for_the_examples_writes_nothing(calm_model):
    drafts = [Draft("How", (0,), "The lid is red."), Draft("Say it.", (0,))]
    preamble, key = read_preamble(calm_model), jax.random.key(3)
    assert completed(calm_model, preamble, drafts, DOCUMENT, key) == [None, "Say it."]


def test_a_text_that_there_is_no_room_for_is_left_out(write):
    assert write([Draft("How", (0,), "very " * 1000), Draft("Say it.", (0,))]) == [None, "Say it."]


def test_it_says_how_many_tokens_it_wrote(calm_model):
    """A random model comes to no end."""
    model = dataclasses.replace(calm_model, config=calm_model.config.replace(window=2048))
    told: list[int] = []
    key = jax.random.key(3)
    completed(model, read_preamble(model), [*begun(2), Draft("Say it.", (0,))], DOCUMENT, key, told.append)
    assert told == [writing.MOST_TOKENS] * 2
