"""Users of a server, each with one question after the other: how soon answers begin, and their tokens."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import http.client
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit


@dataclasses.dataclass(frozen=True)
class Load:
    """A load that was served.

    Attributes:
      seconds: until the last answer had ended.
      first_token_seconds: of each request, until its first text.
      tokens: of each answer.
    """

    seconds: float
    first_token_seconds: list[float]
    tokens: list[int]


def load(url: str, model: str, questions: Sequence[str], users: int, max_tokens: int) -> Load:
    """Asks all questions, by so many users at once.

    Args:
      url: the server's, ending in ``/v1``.
      model: name of the model.
      questions: messages, each a chat of its own.
      users: number of requests under way at a time.
      max_tokens: longest answer.
    """
    left = iter(questions)  # its ``next`` is one step of the interpreter

    def user(_: int) -> list[tuple[float, int]]:
        return [ask(url, model, question, max_tokens) for question in left]

    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(users) as pool:
        found = list(itertools.chain.from_iterable(pool.map(user, range(users))))
    seconds = time.perf_counter() - started
    return Load(seconds, [first for first, _ in found], [tokens for _, tokens in found])


def ask(url: str, model: str, question: str, max_tokens: int) -> tuple[float, int]:
    """Seconds until the first text of a streamed answer, and the number of its tokens."""
    place = urlsplit(url)
    assert place.hostname
    body = {
        "model": model, "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    connection = http.client.HTTPConnection(place.hostname, place.port)
    started, first, usage = time.perf_counter(), None, dict[str, Any]()
    try:
        headers = {"content-type": "application/json"}
        connection.request("POST", f"{place.path}/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {response.read(500)!r}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            piece = json.loads(line[6:])
            usage = piece.get("usage") or usage
            said = [choice for choice in piece["choices"] if choice["delta"].get("content")]
            if said and first is None:
                first = time.perf_counter() - started
    finally:
        connection.close()
    # An answer may be without text: a stop at once.
    return time.perf_counter() - started if first is None else first, usage["completion_tokens"]
