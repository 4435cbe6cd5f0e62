"""The messages of a chat as texts in turn: what the user and the model have said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxsp.errors import UserError, check_unicode
from jaxsp.serve.refusal import Refusal, wrong

SEPARATOR = "\n\n"
"""Stands between messages of one role, and behind a system text in front of a user's message."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_KEYS = {"role", "content", "name", "refusal", "annotations", "audio", "tool_calls", "function_call"}


class Message(NamedTuple):
    """One message; ``role`` is system, user or assistant."""

    role: str
    text: str
    place: str


def read_messages(value: Any) -> list[Message]:
    """The messages of a request, checked.

    Raises:
      Refusal: they are no list of messages with texts.

    Example:
      >>> read_messages([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
      [Message(role='user', text='Hi', place='messages[0]')]
    """
    if not (isinstance(value, list) and value):
        raise wrong("messages", "a list of messages that is not empty", value)
    return [_message(f"messages[{i}]", message) for i, message in enumerate(value)]


def _message(place: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise wrong(place, 'an object {"role", "content"}', message)
    role = message.get("role")
    if not (isinstance(role, str) and role in _ROLES):
        raise wrong(f"{place}.role", "system, developer, user or assistant", role)
    for key, held in message.items():
        if key not in _KEYS:
            raise Refusal(f"{place} has an unknown key {key!r:.60}.", param=place)
        if held and key not in ("role", "content", "name", "annotations"):
            raise Refusal(f"{place}.{key} is not supported: messages are texts here.", param=f"{place}.{key}")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = "\n".join(_part(f"{place}.content[{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise wrong(f"{place}.content", "a text", content)
    if role != "assistant" and not content.strip():
        raise Refusal(f"{place}.content is empty; write a text.", param=f"{place}.content")
    check_words(content, f"{place}.content")
    return Message(_ROLES[role], content, place)


def _part(place: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if kind in ("text", "input_text", "output_text") else None
    if not isinstance(text, str):
        raise wrong(place, 'a text part {"type": "text", "text"}', kind or part)
    return text


def check_words(text: str, param: str) -> None:
    """Raises ``Refusal`` if Unicode has no such text."""
    try:
        check_unicode(text, param)
    except UserError as error:
        raise Refusal(str(error), param=param) from None


def texts_in_turn(messages: Sequence[Message], is_known: Callable[[str], bool]) -> list[str]:
    """The texts of the user and the model in turn, the user first and last.

    Args:
      messages: in their order.
      is_known: whether a system text is a part of the prompt anyway, and left out.

    Raises:
      Refusal: the chat doesn't begin or end with a user's message.

    Example:
      >>> chat = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("user", "d")]
      >>> texts_in_turn([Message(*one, "") for one in chat], lambda text: False)
      ['Be brief.\\n\\na', 'b', 'c\\n\\nd']
    """
    texts: list[str] = []
    system: list[str] = []
    for role, text, place in messages:
        if role == "system":
            system += [] if is_known(text) else [text]
            continue
        if not texts and role == "assistant":
            raise Refusal(
                f"{place} is the assistant's; a chat begins with a message of the user, in which the document"
                " stands. Leave it out.",
                param=place,
            )
        if role == "user":
            text, system = SEPARATOR.join([*system, text]), []
        if (len(texts) % 2 == 1) == (role == "user"):  # the same as before
            texts[-1] = SEPARATOR.join(filter(None, (texts[-1], text)))
        else:
            texts.append(text)
    if len(texts) % 2 == 0 or messages[-1].role != "user":
        place = messages[-1].place
        raise Refusal(f"{place} is the last one, and must be the user's: it is answered.", param=place)
    return texts
