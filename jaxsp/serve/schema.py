"""Requests as OpenAI's clients send them, checked field by field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxsp.errors import suggestion
from jaxsp.serve.messages import Message, check_words, read_messages
from jaxsp.serve.refusal import Refusal, wrong

MOST_STOPS, MOST_ALTERNATIVES = 4, 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """A request, checked, whichever of the two kinds it is.

    Attributes:
      model: name of a soft prompt.
      messages: those of a chat; or
      prompt: a text to go on with, or its token ids.
      max_tokens: longest answer; ``None``: as long as there is room.
      temperature: 0 takes the most probable token.
      top_p: as in ``Sampling``.
      stop: texts before which the answer ends.
      seed: of the draws; ``None``: one is drawn.
      stream: whether the answer comes in pieces.
      include_usage: whether the pieces end with the usage.
      alternatives: tokens whose probabilities are wanted beside that of the one chosen; ``None``: no
        probabilities at all.
    """

    model: str
    messages: list[Message] | None = None
    prompt: str | list[int] | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    alternatives: int | None = None


def read_chat(body: Mapping[str, Any]) -> Wish:
    """A request to ``/v1/chat/completions``.

    Raises:
      Refusal: a field is missing, wrong, unknown or not supported.

    Example:
      >>> read_chat({"model": "manual", "messages": [{"role": "user", "content": "Hi"}], "seed": 3}).seed
      3
    """
    given = _read(body, _CHAT, _ONLY_CHAT)
    longest = given.pop("max_completion_tokens", None)
    wanted, alternatives = given.pop("logprobs", False), given.pop("top_logprobs", None)
    if alternatives and not wanted:
        raise Refusal("top_logprobs needs logprobs: true.", param="top_logprobs")
    if longest is not None:
        given["max_tokens"] = longest
    if "messages" not in given:
        raise Refusal("messages is missing: the chat to answer.", param="messages")
    return Wish(**given, alternatives=(alternatives or 0) if wanted else None)


def read_completion(body: Mapping[str, Any]) -> Wish:
    """A request to ``/v1/completions``; without ``max_tokens`` it gets 16, as OpenAI's.

    Raises:
      Refusal: as ``read_chat``.

    Example:
      >>> read_completion({"model": "manual", "prompt": "The tank"}).max_tokens
      16
    """
    given = _read(body, _COMPLETION, _ONLY_COMPLETION)
    if "prompt" not in given:
        raise Refusal("prompt is missing: the text to go on with.", param="prompt")
    alternatives = given.pop("logprobs", None)
    return Wish(**{"max_tokens": 16, **given}, alternatives=alternatives)


def _read(body: Mapping[str, Any], fields: Mapping[str, Any], only: Mapping[str, tuple]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in body.items():
        if name in _UNUSED or value is None:
            continue
        if name in only:
            if not any(_same(value, one) for one in only[name]):
                raise Refusal(f"{name} {value!r:.60} is not supported; leave it out.", param=name)
        elif name in fields:
            found[name] = fields[name](name, value)
        else:
            meant = suggestion(name[:60], [*fields, *only]) or "; leave it out."
            raise Refusal(f"There is no field {name!r:.60}{meant}", param=name[:60])
    if "model" not in found:
        raise Refusal("model is missing: the name of a soft prompt; /v1/models lists them.", param="model")
    options = found.pop("stream_options", {})
    if options and not found.get("stream"):
        raise Refusal("stream_options needs stream: true.", param="stream_options")
    return {**found, **options}


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _text(name: str, value: Any) -> str:
    if not (isinstance(value, str) and value):
        raise wrong(name, "a text", value)
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, "true or false", value)
    return value


def _whole(least: int, most: int) -> Callable[[str, Any], int]:
    def read(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise wrong(name, f"a whole number from {least} to {most}", value)
        return value

    return read


def _number(name: str, value: Any, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise wrong(name, f"a number from 0 to {most:g}", value)
    return float(value)


def _temperature(name: str, value: Any) -> float:
    return _number(name, value, 2)


def _top_p(name: str, value: Any) -> float:
    if not (found := _number(name, value, 1)):
        raise wrong(name, "a number above 0 and at most 1", value)
    return found


def _stop(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    good = isinstance(texts, list) and len(texts) <= MOST_STOPS
    if not (good and all(isinstance(text, str) and text for text in texts)):
        raise wrong(name, f"a text, or up to {MOST_STOPS} of them, none empty", value)
    for text in texts:
        check_words(text, name)
    return tuple(texts)


def _stream_options(name: str, value: Any) -> dict[str, bool]:
    if not isinstance(value, dict) or value.keys() - {"include_usage", "include_obfuscation"}:
        raise wrong(name, 'an object {"include_usage"}', value)
    return {"include_usage": _flag(f"{name}.include_usage", value.get("include_usage") or False)}


def _prompt(name: str, value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str) and value:
        check_words(value, name)
        return value
    if isinstance(value, list) and value and all(type(i) is int for i in value):
        return value
    if isinstance(value, list) and len(value) > 1 and isinstance(value[0], str | list):
        raise Refusal(
            "prompt has several texts; send each as a request of its own: they are answered together.",
            param=name,
        )
    raise wrong(name, "a text or token ids, not empty", value)


_LARGE = 2**31 - 1
_BOTH: dict[str, Callable[[str, Any], Any]] = {
    "model": _text,
    "max_tokens": _whole(1, _LARGE),
    "temperature": _temperature,
    "top_p": _top_p,
    "stop": _stop,
    "seed": _whole(-(2**63), 2**63 - 1),
    "stream": _flag,
    "stream_options": _stream_options,
}
_CHAT = {
    **_BOTH,
    "messages": lambda name, value: read_messages(value),
    "max_completion_tokens": _whole(1, _LARGE),
    "logprobs": _flag,
    "top_logprobs": _whole(0, MOST_ALTERNATIVES),
}
_COMPLETION = {**_BOTH, "prompt": _prompt, "logprobs": _whole(0, 5)}

_ONLY: dict[str, tuple] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
"""Fields with the values that change nothing."""
_ONLY_CHAT = {
    **_ONLY,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
}
_ONLY_COMPLETION = {**_ONLY, "best_of": (1,), "echo": (False,), "suffix": ("",)}
_UNUSED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "verbosity",
}  # fmt: skip
"""Fields that describe the request."""
