"""Fields of requests: read, refused by name, or not used."""

from __future__ import annotations

import pytest

from jaxsp.serve.refusal import Refusal
from jaxsp.serve.schema import read_chat, read_completion

CHAT = {"model": "a", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "a", "prompt": "Hi"}


def test_defaults_are_those_of_ask():
    wish = read_chat(CHAT)
    assert (wish.temperature, wish.top_p, wish.max_tokens, wish.stream) == (0, 1, None, False)
    assert (wish.stop, wish.seed, wish.alternatives) == ((), None, None)
    assert read_completion(COMPLETION).max_tokens == 16
    assert read_completion({**COMPLETION, "logprobs": 0}).alternatives == 0


def test_null_is_a_field_left_out():
    names = ["max_tokens", "temperature", "top_p", "stop", "seed", "stream", "stream_options", "n", "tools"]
    assert read_chat({**CHAT, **dict.fromkeys(names)}) == read_chat(CHAT)


@pytest.mark.parametrize(("given", "expected"), [
    ({"max_tokens": 3}, {"max_tokens": 3}),
    ({"max_tokens": 3, "max_completion_tokens": 4}, {"max_tokens": 4}),
    ({"temperature": 1, "top_p": 0.5, "seed": -7}, {"temperature": 1.0, "top_p": 0.5, "seed": -7}),
    ({"stop": "a"}, {"stop": ("a",)}),
    ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
    ({"stop": []}, {"stop": ()}),
    ({"stream": True, "stream_options": {"include_usage": True}}, {"stream": True, "include_usage": True}),
    ({"logprobs": True}, {"alternatives": 0}),
    ({"logprobs": True, "top_logprobs": 20}, {"alternatives": 20}),
    ({"logprobs": False}, {"alternatives": None}),
    ({"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "tools": []}, {}),
    ({"response_format": {"type": "text"}, "tool_choice": "none"}, {}),
    ({"user": "Ann", "metadata": {"a": "b"}, "store": False}, {}),
])  # fmt: skip
def test_what_a_chat_may_ask_for(given, expected):
    wish = read_chat({**CHAT, **given})
    assert {name: getattr(wish, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("prompt", "expected"), [("Hi", "Hi"), (["Hi"], "Hi"), ([1, 2], [1, 2]), ([[1]], [1])]
)
def test_a_prompt_is_a_text_or_token_ids(prompt, expected):
    assert read_completion({"model": "a", "prompt": prompt}).prompt == expected


@pytest.mark.parametrize(("given", "param", "said"), [
    ({"max_tokens": 0}, "max_tokens", "a whole number from 1 to 2147483647, not 0"),
    ({"max_tokens": True}, "max_tokens", "not True"),
    ({"max_tokens": 1.5}, "max_tokens", "not 1.5"),
    ({"max_tokens": "9"}, "max_tokens", "not '9'"),
    ({"temperature": -0.1}, "temperature", "a number from 0 to 2, not -0.1"),
    ({"temperature": 2.1}, "temperature", "not 2.1"),
    ({"temperature": True}, "temperature", "not True"),
    ({"top_p": 0}, "top_p", "above 0 and at most 1, not 0"),
    ({"top_p": 1.1}, "top_p", "not 1.1"),
    ({"stop": ""}, "stop", "none empty"),
    ({"stop": ["a"] * 5}, "stop", "up to 4"),
    ({"stop": [3]}, "stop", "a text"),
    ({"stop": "\ud83d"}, "stop", "no text in Unicode"),
    ({"seed": 1.0}, "seed", "a whole number"),
    ({"seed": 2**63}, "seed", "a whole number"),
    ({"stream": "yes"}, "stream", "true or false, not 'yes'"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
    ({"stream": True, "stream_options": {"a": 1}}, "stream_options", "an object"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20, not 21"),
    ({"logprobs": 3}, "logprobs", "true or false, not 3"),
    ({"n": 2}, "n", "n 2 is not supported"),
    ({"n": True}, "n", "n True is not supported"),
    ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
    ({"logit_bias": {"3": 1}}, "logit_bias", "not supported"),
    ({"tools": [{}]}, "tools", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"temprature": 1}, "temprature", "There is no field 'temprature'; did you mean temperature?"),
    ({"x" * 300: 1}, "x" * 60, "There is no field"),
    ({"model": ""}, "model", "a text, not ''"),
    ({"model": 3}, "model", "a text, not 3"),
    ({"model": None}, "model", "model is missing"),
    ({"messages": None}, "messages", "messages is missing"),
])  # fmt: skip
def test_what_a_chat_may_not_ask_for_is_named(given, param, said):
    with pytest.raises(Refusal) as found:
        read_chat({**CHAT, **given})
    assert said in str(found.value)
    assert found.value.content["error"]["param"] == param
    assert found.value.content["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("given", "said"), [
    ({"prompt": ""}, "prompt must be a text or token ids, not empty"),
    ({"prompt": []}, "not empty"),
    ({"prompt": 3}, "not 3"),
    ({"prompt": [1.5]}, "not [1.5]"),
    ({"prompt": [True]}, "not [True]"),
    ({"prompt": ["a", "b"]}, "prompt has several texts"),
    ({"prompt": None}, "prompt is missing"),
    ({"logprobs": 6}, "from 0 to 5, not 6"),
    ({"logprobs": True}, "from 0 to 5, not True"),
    ({"echo": True}, "echo True is not supported"),
    ({"best_of": 2}, "best_of 2 is not supported"),
    ({"suffix": "b"}, "suffix 'b' is not supported"),
    ({"messages": []}, "There is no field 'messages'"),
])  # fmt: skip
def test_what_a_completion_may_not_ask_for_is_named(given, said):
    with pytest.raises(Refusal) as found:
        read_completion({**COMPLETION, **given})
    assert said in str(found.value)
