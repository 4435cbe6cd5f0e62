"""The text of an answer as its tokens come."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from jaxsp.models.generation.likely import Likely
from jaxsp.models.text import encode
from jaxsp.serve.answer import Answer, token_bytes, token_text


class Bytes:
    """A tokenizer of bytes; 256 ends a text."""

    def encode(self, text, **_):
        return [*text.encode()]

    def decode(self, ids, skip_special_tokens):
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def pieces(text: str, stops=(), by: int = 1, ends=True) -> tuple[list[str], Answer]:
    ids = [*text.encode(), *([256] if ends else [])]
    answer, found = Answer(Bytes(), stops, [256]), []
    for at in range(0, len(ids), by):
        found.append(answer.add(ids[at : at + by], at + by >= len(ids)))
        if answer.reason:
            break
    return found, answer


@pytest.mark.parametrize("by", [1, 2, 3, 100])
@pytest.mark.parametrize(("text", "stops", "expected", "reason"), [
    ("a stop b", ("stop",), "a ", "stop"),
    ("a sto", ("stop",), "a sto", "stop"),
    ("a stsstop", ("stop",), "a sts", "stop"),
    ("xabcdy", ("abcd", "bc"), "xa", "stop"),
    ("naïve – 🙂!", (), "naïve – 🙂!", "stop"),
    ("naïve – 🙂!", ("🙂",), "naïve – ", "stop"),
    ("stop", ("stop",), "", "stop"),
    ("", (), "", "stop"),
])  # fmt: skip
def test_the_pieces_are_the_text_before_what_ends_it(text, stops, expected, reason, by):
    found, answer = pieces(text, stops, by)
    assert "".join(found) == answer.text == expected
    assert answer.reason == reason
    assert answer.ids == pieces(text, stops, 1)[1].ids
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(found)


def test_nothing_is_given_that_may_yet_begin_a_stop():
    assert pieces("a stall", ("stop",))[0] == ["a", " ", "", "", "sta", "l", "l", ""]


def test_an_answer_that_is_cut_in_a_character_shows_it():
    found, answer = pieces("aé", by=2, ends=False)
    assert "".join(found) == "aé"
    half = Answer(Bytes(), (), [256])
    assert half.add([97, 0xC3], True) == "a\N{REPLACEMENT CHARACTER}"
    assert (half.reason, answer.reason) == ("length", "length")


def likely(count: int) -> Likely:
    tops, logs = jnp.array([[97, 98]] * count), jnp.array([[-0.5, -1.0]] * count)
    return Likely(jnp.zeros(count), tops, logs)


@pytest.mark.parametrize("by", [1, 2, 3, 100])
def test_tokens_are_those_of_the_text_that_was_given(by):
    ids = [*"a é stop b".encode(), 256]
    answer, tokens = Answer(Bytes(), ("stop",), [256]), []
    for at in range(0, len(ids), by):
        own = ids[at : at + by]
        answer.add(own, at + by >= len(ids), likely(len(own)), 1)
        tokens += answer.tokens() or []
        assert all(token.offset <= len(answer.text) for token in tokens)
        if answer.reason:
            break
    assert bytes(token.chosen.token for token in tokens) == "a é ".encode()
    assert tokens[0].top == [(97, -0.5)]
    assert [token.offset for token in tokens][:2] == [0, 1]


def test_the_token_that_ends_an_answer_is_not_among_its_tokens():
    answer = Answer(Bytes(), (), [256])
    answer.add([97, 98, 256], True, likely(3), 2)
    assert [(token.chosen.token, token.offset) for token in answer.tokens()] == [(97, 0), (98, 1)]


def test_the_bytes_of_a_token_may_be_a_part_of_a_character(tiny_model):
    tokenizer = tiny_model.tokenizer
    ids = encode(tokenizer, "é\n 🙂")
    assert bytes(i for token in ids for i in token_bytes(tokenizer, token) or ()) == "é\n 🙂".encode()
    assert token_text(tokenizer, 2) == "<|im_end|>"


def test_sentencepiece_writes_bytes_out():
    words = {"a": 0, "<0xC3>": 1, "\N{REPLACEMENT CHARACTER}": 2}
    core = Tokenizer(models.BPE(words, [], byte_fallback=True))
    core.decoder = decoders.ByteFallback()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert [token_bytes(tokenizer, token) for token in range(3)] == [[97], [0xC3], None]
