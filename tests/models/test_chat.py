"""The texts around a context and a query, and their token ids."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import jaxsp
from jaxsp.models.chat import ChatTexts, encode
from jaxsp.typing import UserError
from tests import tiny


def with_template(model, template):
    return dataclasses.replace(model, tokenizer=tiny.tokenizer(template))


def test_the_pieces_make_the_templates_own_prompt(tiny_model):
    tokenizer = tiny_model.tokenizer
    message = {"role": "user", "content": "The tank holds 1.2 l.\n\nHow much?"}
    whole = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    pieces = (
        tiny_model.preamble_ids,
        tiny_model.encode_context("The tank holds 1.2 l."),
        tiny_model.encode_query("How much?"),
    )
    assert all(ids.dtype == np.int32 and ids.ndim == 1 for ids in pieces)
    assert np.concatenate(pieces).tolist() == encode(tokenizer, whole, control=True)


def test_the_users_text_is_never_a_control_token(tiny_model):
    end = tiny_model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in tiny_model.encode_context("<|im_end|>")
    query = tiny_model.encode_query("<|im_end|>")
    assert (query == end).sum() == 1  # the template's
    assert tiny_model.tokenizer.decode(query).count("<|im_end|>") == 2


def test_nothing_is_legal(tiny_model):
    assert tiny_model.encode_context("").shape == (0,)
    assert tiny_model.tokenizer.decode(tiny_model.encode_query("")).startswith("\n\n<|im_end|>")


def test_without_a_template_the_layout_is_plain(tiny_model):
    plain = with_template(tiny_model, None)
    assert plain.chat == ChatTexts("<|endoftext|>", "\n\n", "\n")
    assert plain.preamble_ids.tolist() == [0]
    assert plain.tokenizer.decode(plain.encode_query("Q?")) == "\n\nQ?\n"


def test_a_saved_prompts_texts_replace_the_models(tiny_model):
    query = tiny_model.encode_query("Q?", ChatTexts("", " | ", "\nA:"))
    assert tiny_model.tokenizer.decode(query) == " | Q?\nA:"


def test_a_template_that_drops_the_text(tiny_model):
    for template in ("{{ messages[0]['content'] | length }}", "x"):
        with pytest.raises(UserError, match="does not keep the user's text"):
            with_template(tiny_model, template).chat  # noqa: B018


def test_without_a_tokenizer(tiny_directory):
    model = jaxsp.load_model(tiny_directory, dtype="float32", tokenizer=None)
    for ask in (
        lambda: model.chat,
        lambda: model.preamble_ids,
        lambda: model.encode_context("a"),
        lambda: model.encode_query("a"),
    ):
        with pytest.raises(UserError, match="loaded without a tokenizer; load it with one"):
            ask()


def test_a_token_that_the_model_does_not_have(tiny_model):
    model = with_template(tiny_model, tiny.CHAT_TEMPLATE)
    model.tokenizer.add_tokens(["zebra"])
    for ask in (model.encode_context, model.encode_query):
        with pytest.raises(UserError, match=r"'zebra' has the id 259, outside the model's"):
            ask("a zebra")
