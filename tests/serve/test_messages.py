"""Messages of a chat: what is said in turn, and what can't be read."""

from __future__ import annotations

import pytest

from jaxsp.serve.messages import read_messages, texts_in_turn
from jaxsp.serve.refusal import Refusal

USER, ANSWER, SYSTEM = ({"role": role, "content": f"{role}'s"} for role in ("user", "assistant", "system"))


def turns(*messages, known=()):
    return texts_in_turn(read_messages(list(messages)), known.__contains__)


@pytest.mark.parametrize(("messages", "expected"), [
    ([USER], ["user's"]),
    ([USER, ANSWER, USER], ["user's", "assistant's", "user's"]),
    ([SYSTEM, USER], ["system's\n\nuser's"]),
    ([{**SYSTEM, "role": "developer"}, USER], ["system's\n\nuser's"]),
    ([USER, ANSWER, SYSTEM, USER], ["user's", "assistant's", "system's\n\nuser's"]),
    ([USER, SYSTEM, ANSWER, USER], ["user's", "assistant's", "system's\n\nuser's"]),
    ([USER, USER, ANSWER, ANSWER, USER],
     ["user's\n\nuser's", "assistant's\n\nassistant's", "user's"]),
    ([USER, {"role": "assistant", "content": ""}, USER], ["user's", "", "user's"]),
    ([USER, {"role": "assistant", "content": None}, USER], ["user's", "", "user's"]),
    ([USER, {"role": "assistant", "content": ""}, ANSWER, USER], ["user's", "assistant's", "user's"]),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
     ["a\nb"]),
    ([{**USER, "name": "Ann"}], ["user's"]),
    ([USER, {**ANSWER, "refusal": None, "tool_calls": [], "annotations": []}, USER],
     ["user's", "assistant's", "user's"]),
])  # fmt: skip
def test_what_is_said_in_turn(messages, expected):
    assert turns(*messages) == expected


def test_a_system_text_that_the_prompt_has_is_left_out():
    assert turns(SYSTEM, USER, known=["system's"]) == ["user's"]
    assert turns(SYSTEM, {**SYSTEM, "content": "b"}, USER, known=["system's"]) == ["b\n\nuser's"]


@pytest.mark.parametrize(("messages", "said"), [
    ([ANSWER, USER], r"messages\[0\] is the assistant's; a chat begins with a message of the user"),
    ([SYSTEM, ANSWER, USER], r"messages\[1\] is the assistant's"),
    ([USER, ANSWER], r"messages\[1\] is the last one, and must be the user's"),
    ([USER, SYSTEM], r"messages\[1\] is the last one"),
    ([SYSTEM], r"messages\[0\] is the last one"),
])  # fmt: skip
def test_a_chat_begins_and_ends_with_the_user(messages, said):
    with pytest.raises(Refusal, match=said):
        turns(*messages)


@pytest.mark.parametrize(("messages", "said"), [
    (None, "messages must be a list of messages that is not empty, not None"),
    ([], "not empty"),
    ("Hi", "messages must be a list"),
    (["Hi"], r"messages\[0\] must be an object"),
    ([{"content": "Hi"}], r"messages\[0\].role must be system, developer, user or assistant, not None"),
    ([{"role": "tool", "content": "Hi"}], r"messages\[0\].role must be .* not 'tool'"),
    ([{"role": ["user"], "content": "Hi"}], r"messages\[0\].role"),
    ([{"role": "user"}], r"messages\[0\].content must be a text, not None"),
    ([{"role": "user", "content": 3}], r"messages\[0\].content must be a text, not 3"),
    ([{"role": "user", "content": " \n"}], r"messages\[0\].content is empty"),
    ([{"role": "user", "content": []}], r"messages\[0\].content is empty"),
    ([{"role": "user", "content": ["Hi"]}], r"messages\[0\].content\[0\] must be a text part"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
     r"must be a text part .* not 'image_url'"),
    ([{"role": "user", "content": "a\ud83d"}], r"messages\[0\].content is no text in Unicode"),
    ([{**USER, "tool_calls": [{}]}], r"messages\[0\].tool_calls is not supported"),
    ([{**USER, "mood": "good"}], r"messages\[0\] has an unknown key 'mood'"),
])  # fmt: skip
def test_what_is_no_message_is_named(messages, said):
    with pytest.raises(Refusal, match=said) as found:
        read_messages(messages)
    assert found.value.status == 400
    assert found.value.content["error"]["param"].startswith("messages")
