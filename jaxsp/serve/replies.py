"""Answers as OpenAI's interface writes them: whole, or as the pieces of a stream."""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from jaxsp.serve.answer import Likelihood, Token, token_bytes, token_text
from jaxsp.serve.refusal import Refusal

DONE = b"data: [DONE]\n\n"
"""The end of a stream."""


def event(content: Any) -> bytes:
    """A piece of a stream (server-sent events)."""
    return b"data: " + to_bytes(content) + b"\n\n"


def failed(refusal: Refusal) -> bytes:
    """The piece that ends a stream in an error."""
    return b"data: " + refusal.body + b"\n\n"


def to_bytes(content: Any) -> bytes:
    """JSON in UTF-8."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


@dataclasses.dataclass(frozen=True)
class Form:
    """The form of one request's answer.

    Attributes:
      chat: whether it is that of a chat.
      model: name of the soft prompt.
      fingerprint: of the frozen model's weights.
      tokenizer: gives the texts of tokens.
      id: of the answer.
      created: time in seconds.
    """

    chat: bool
    model: str
    fingerprint: str
    tokenizer: Any
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(
        self, text: str, reason: str, tokens: Sequence[Token] | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        """An answer at once; ``tokens`` if their probabilities are wanted."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {}
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(said, text, reason, tokens)],
            "usage": usage,
        }

    def first(self, more: dict[str, Any]) -> dict[str, Any] | None:
        """The piece that begins the stream of a chat."""
        if not self.chat:
            return None
        delta = {"delta": {"role": "assistant", "content": ""}}
        return {
            **self._head("chat.completion.chunk"),
            "choices": [self._choice(delta, "", None, None)],
            **more,
        }

    def piece(
        self, text: str, reason: str | None, tokens: Sequence[Token] | None, more: dict[str, Any]
    ) -> dict[str, Any]:
        """A piece; the last one has the reason for which the answer ends."""
        said = {"delta": {"content": text} if text else {}} if self.chat else {}
        choice = self._choice(said, text, reason, tokens)
        return {**self._head("chat.completion.chunk"), "choices": [choice], **more}

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The piece behind the last one, with the usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"jaxsp-{self.fingerprint[:12]}",
        }

    def _choice(
        self, said: dict[str, Any], text: str, reason: str | None, tokens: Sequence[Token] | None
    ) -> dict[str, Any]:
        own = said if self.chat else {"text": text}
        logs = None
        if tokens is not None:
            logs = self._chat_logs(tokens) if self.chat else self._completion_logs(tokens)
        return {"index": 0, **own, "logprobs": logs, "finish_reason": reason}

    def _chat_logs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = [
            {**self._log(token.chosen), "top_logprobs": [self._log(one) for one in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _log(self, one: Likelihood) -> dict[str, Any]:
        text, data = self._text(one), token_bytes(self.tokenizer, one.token)
        return {"token": text, "logprob": one.log, "bytes": data}

    def _completion_logs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "tokens": [self._text(token.chosen) for token in tokens],
            "token_logprobs": [token.chosen.log for token in tokens],
            "top_logprobs": [{self._text(one): one.log for one in token.top} for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _text(self, one: Likelihood) -> str:
        return token_text(self.tokenizer, one.token)
