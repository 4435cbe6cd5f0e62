"""``LanguageModel``: what it reads, and what it refuses."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

import jaxsp
from jaxsp.models import decoder, language_model
from jaxsp.models.generation import Sampling, generate
from jaxsp.typing import UserError


def test_an_added_token_beyond_the_vocabulary(tiny_model):
    for ids in ([4, 300], [[5, 6], [7, 300]]):
        with pytest.raises(UserError, match="id 300, outside the model's vocabulary of 259"):
            tiny_model.logits(ids)
    with pytest.raises(UserError, match="id -5, outside"):
        tiny_model.check_ids([4, -5])


def test_sequences_that_the_model_cannot_read(tiny_model):
    with pytest.raises(UserError, match="513 tokens are more than the model's window of 512"):
        tiny_model.logits([[3] * 513])
    with pytest.raises(UserError, match="513 tokens are more"):
        decoder.read_long(tiny_model.params, tiny_model.config, np.full((1, 513), 3))
    for nothing in ([], [[]], np.zeros((2, 0), int)):
        with pytest.raises(UserError, match="no tokens"):
            tiny_model.logits(nothing)


def test_an_answer_comes_in_pieces_that_are_the_whole(tiny_model):
    prefix = jaxsp.distributions.context_prefix(
        tiny_model.params, tiny_model.config, tiny_model.preamble_ids[None]
    )
    pieces = list(tiny_model.stream_answer(prefix, "How long?", max_tokens=9))
    ids = tiny_model.encode_query("How long?")
    sampling = Sampling(stop_ids=tiny_model.stop_ids, max_tokens=9)
    (answer,) = generate(tiny_model.params, tiny_model.config, prefix, [ids], sampling)
    whole = tiny_model.tokenizer.decode(answer, skip_special_tokens=True)
    assert "".join(pieces) == whole
    with pytest.raises(UserError, match=r"The question has \d+ tokens, more than .* ask a shorter one"):
        next(tiny_model.stream_answer(prefix, "long " * 500))


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_half_a_character_is_held_back_until_the_end(tiny_model, monkeypatch, lost):
    ids = tiny_model.tokenizer.encode("aé水b🙂", add_special_tokens=False)
    ids = ids[: len(ids) - lost]
    monkeypatch.setattr(language_model, "stream", lambda *_: iter(ids))
    prefix = types.SimpleNamespace(end=0)
    *pieces, last = [piece for piece in tiny_model.stream_answer(prefix, "What?") if piece]
    assert pieces[:4] == ["a", "é", "水", "b"]
    assert last == ("🙂" if not lost else "\N{REPLACEMENT CHARACTER}")
    assert "".join([*pieces, last]) == tiny_model.tokenizer.decode(ids)


def test_a_project_may_be_moved(tiny_model):
    """A run's identity has the last part of its model's folder; the weights' hash tells the rest."""
    names = {name: dataclasses.replace(tiny_model, name=name).short_name for name in ("/a/b/m", "org/m", "m")}
    assert names == {"/a/b/m": "m", "org/m": "org/m", "m": "m"}
