"""An error as OpenAI's interface writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class Refusal(Exception):
    """A request that gets an error for an answer.

    Attributes:
      status: of HTTP.
      content: the JSON that is sent: ``{"error": {"message", "type", "param", "code"}}``.
      headers: further headers of the response.

    Example:
      >>> Refusal("There is no model 'a'.", status=404, code="model_not_found").content["error"]["code"]
      'model_not_found'
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.content: dict[str, Any] = {
            "error": {"message": message, "type": type, "param": param, "code": code}
        }
        self.headers = dict(headers or {})

    @property
    def body(self) -> bytes:
        """The content as it is sent; halves of characters that a client sent are spelled out."""
        return json.dumps(self.content).encode()


def wrong(param: str, wish: str, value: Any) -> Refusal:
    """The refusal of a field's value.

    Example:
      >>> str(wrong("top_p", "a number above 0 and at most 1", 3))
      'top_p must be a number above 0 and at most 1, not 3.'
    """
    return Refusal(f"{param} must be {wish}, not {value!r:.60}.", param=param)
