"""The texts around a context and a query, and their token ids."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import jaxsp
from jaxsp.models import chat_renderer
from jaxsp.models.chat import ChatOptions, ChatTexts, render
from jaxsp.models.text import encode
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


def test_an_added_word_is_read_as_any_other(tiny_model):
    """Its embedding may never have been trained, or the model has none."""
    model = with_template(tiny_model, tiny.CHAT_TEMPLATE)
    model.tokenizer.add_tokens(["zebra"])
    for ask in (model.encode_context, model.encode_query):
        assert "zebra" in model.tokenizer.decode(ids := ask("a zebra"))
        assert max(ids) < 259
    with pytest.raises(UserError, match=r"'zebra' has the id 259, outside the model's"):
        model.check_ids([259])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("{{ messages[-1].content | lower }}", "lower"),
        ("{{ messages[-1].content | truncate(300) }}", "truncate"),
        ("{{ messages[-1].content | striptags }}", "striptags"),
        ("{{ messages[-1].content | replace('\n\n', '\n') }}", "replace"),
        ("{{ messages[-1].content.split() | join(' ') }}", "split"),
        ("{{ messages[-1].content | tojson }}", "tojson"),
        ("{{ messages[-1].content | escape }}", "escape"),
        ("{{ messages[-1].content | title }}", "title"),
    ],
)
def test_a_template_that_changes_the_text(tiny_model, change, name):
    with pytest.raises(UserError, match="does not keep the user's text as it is"):
        with_template(tiny_model, change).chat  # noqa: B018


@pytest.mark.parametrize(
    "template",
    [
        "{{",
        "{% for %}",
        "{{ messages[0].nothing.more }}",
        "{{ raise_exception('Only images.') }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% include 'x' %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'a' * 3 * 10**9 }}",
        "{% for a in range(99999) %}{{ 'x' * 99 }}{% endfor %}",
        "{{ undefined_thing() }}",
    ],
)
def test_a_template_that_fails(tiny_model, template):
    with pytest.raises(UserError, match=r"chat template can't be used: .+\. Remove it") as found:
        with_template(tiny_model, template).chat  # noqa: B018
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 600


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 9) }}",
    ],
)
def test_a_template_that_never_ends(tiny_model, template, monkeypatch):
    monkeypatch.setattr(chat_renderer, "SECONDS", 1)
    with pytest.raises(UserError, match="chat template can't be used: it takes more than 1 s"):
        with_template(tiny_model, template).chat  # noqa: B018


def test_texts_are_those_that_transformers_writes(tiny_model):
    """Loops, filters, whitespace, a date, the mark for trainers."""
    template = (
        "{%- set ns = namespace(first=true) -%}\n"
        "{%- for m in messages %}\n    {%- if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "    {{- '<|im_start|>' + m.role + '\n' + m.content }}\n"
        "  {% generation %}<|im_end|>{% endgeneration %}\n"
        "{%- endfor %}\n{{ {'a': 'ü', 'b': [1]} | tojson }} {{ strftime_now('%Y') }} {{ bos_token }}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = with_template(tiny_model, template).tokenizer
    message = {"role": "user", "content": "Hi <b>"}
    expected = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    variables = {**tokenizer.special_tokens_map, "add_generation_prompt": True}
    assert render(template, [[message]], variables) == [expected]


def test_thinking_is_off_where_the_template_knows_it(tiny_model):
    template = tiny.CHAT_TEMPLATE.replace(
        "<|im_start|>assistant\n",
        "<|im_start|>assistant\n{% if not enable_thinking %}<think></think>{% endif %}",
    )
    model = with_template(tiny_model, template)
    assert model.chat.after.endswith("assistant\n<think></think>")
    thinking = dataclasses.replace(model, chat_options=ChatOptions(variables={"enable_thinking": True}))
    assert thinking.chat.after.endswith("assistant\n")


def test_where_a_turn_ends_the_template_says(tmp_path):
    """The tokenizer's end of text is another token."""
    directory = tiny.write(tmp_path / "model", eos_token_id=0)
    settings = directory / "tokenizer_config.json"
    content = json.loads(settings.read_text()) | {"eos_token": "<|endoftext|>"}
    settings.write_text(json.dumps(content))
    model = jaxsp.load_model(directory, dtype="float32")
    assert model.stop_ids == (0, 2)
    assert model.encode_answer("Yes.")[-1] == 2


def test_options_that_cannot_be():
    with pytest.raises(UserError, match="Unknown slot 'assistant'; choose one of user, system"):
        ChatOptions(slot="assistant")
    with pytest.raises(UserError, match="either a system text or the slot system"):
        ChatOptions(slot="system", system="Be brief.")
