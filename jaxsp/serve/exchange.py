"""One request on its way through the batch, as the event loop sees it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
from collections.abc import AsyncIterator
from typing import Any

from jaxsp.models.generation import Sampling
from jaxsp.serve.answer import Answer, Token
from jaxsp.serve.refusal import Refusal
from jaxsp.serve.replies import DONE, Form, event, failed
from jaxsp.serve.scheduler import Job, News, Scheduler
from jaxsp.serve.schema import Wish
from jaxsp.serve.served import Served


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a request.

    Attributes:
      query_tokens: tokens that it has behind σ.
      answer_tokens: tokens that it gets.
      body_bytes: size of its JSON.
      seconds: time until its answer has ended, waiting included.
      idle_seconds: time for its body to come, and for a piece of its answer to be taken.
    """

    query_tokens: int = 1024
    answer_tokens: int = 512
    body_bytes: int = 2**20
    seconds: float = 600.0
    idle_seconds: float = 30.0


class Exchange:
    """A request that is waiting or being answered; it must be closed.

    Args:
      scheduler: answers it.
      served: the soft prompt that it is for.
      wish: what is asked for.
      ids: its tokens behind σ.
      limits: of the server.

    Raises:
      Refusal: it is too long, or too many are waiting.
    """

    def __init__(
        self, scheduler: Scheduler, served: Served, wish: Wish, ids: list[int], limits: Limits
    ) -> None:
        longest = _longest(served, wish, len(ids), limits)
        self._wish, self._served, self._read, self._seconds = wish, served, len(ids), limits.seconds
        self._answer = Answer(served.model.tokenizer, wish.stop, served.stop_ids)
        self._news: asyncio.Queue[News] = asyncio.Queue()
        tokenizer, fingerprint = served.model.tokenizer, served.model.fingerprint
        self._form = Form(wish.messages is not None, wish.model, fingerprint, tokenizer)
        self._scheduler, loop = scheduler, asyncio.get_running_loop()

        def deliver(news: News) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._news.put_nowait, news)

        sampling = Sampling(
            temperature=wish.temperature, top_p=wish.top_p, stop_ids=served.stop_ids, max_tokens=longest
        )
        seed = secrets.randbits(32) if wish.seed is None else wish.seed
        wants = wish.alternatives is not None
        self._job = Job(ids, sampling, served.index, seed, wants, deliver)
        scheduler.submit(self._job)

    def close(self) -> None:
        """Frees its place, if it has not ended."""
        self._scheduler.cancel(self._job)

    async def whole(self) -> dict[str, Any]:
        """The answer at once.

        Raises:
          Refusal: it took too long, or the server failed.
        """
        async for _ in self._texts():
            pass
        tokens, reason = self._tokens(), self._answer.reason
        assert reason is not None  # all is there
        return self._form.whole(self._answer.text, reason, tokens, self._usage())

    async def events(self) -> AsyncIterator[bytes]:
        """The answer in pieces, the last one an error if there is one."""
        more = {"usage": None} if self._wish.include_usage else {}
        try:
            if (first := self._form.first(more)) is not None:
                yield event(first)
            async for text in self._texts():
                tokens, reason = self._tokens(), self._answer.reason
                if text or tokens or reason:
                    yield event(self._form.piece(text, reason, tokens, more))
            if more:
                yield event(self._form.usage(self._usage()))
            yield DONE
        except Refusal as refusal:
            yield failed(refusal)

    async def _texts(self) -> AsyncIterator[str]:
        """The text that is certain with each news."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._seconds
        while self._answer.reason is None:
            try:
                news = await asyncio.wait_for(self._news.get(), deadline - loop.time())
            except TimeoutError:
                self.close()
                raise took_too_long(self._seconds) from None
            if news.error is not None:
                raise news.error
            text = self._answer.add(news.ids, news.ended, news.likely, self._wish.alternatives or 0)
            if self._answer.reason is not None:
                self.close()  # at a stop text, of which the batch doesn't know
            yield text

    def _tokens(self) -> list[Token] | None:
        return None if self._wish.alternatives is None else self._answer.tokens()

    def _usage(self) -> dict[str, Any]:
        return self._served.usage(self._read, len(self._answer.ids))


def took_too_long(seconds: float) -> Refusal:
    """The refusal of a request whose time is over."""
    return Refusal(
        f"The answer took more than {seconds:g} s; ask for fewer tokens, or try again later.",
        status=504,
        type="server_error",
        code="timeout",
    )


def _longest(served: Served, wish: Wish, count: int, limits: Limits) -> int:
    """Tokens that the answer may have.

    Raises:
      Refusal: there is no room for any.
    """
    if not count:
        raise Refusal("prompt is empty; write a text to go on with.", param="prompt")
    if count > served.longest(limits.query_tokens):
        raise served.too_long(wish, str(count), limits.query_tokens)
    longest = min(limits.answer_tokens, served.room - count)
    return longest if wish.max_tokens is None else min(wish.max_tokens, longest)
