"""One request on its way through the batch, as the event loop sees it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
from collections.abc import AsyncIterator
from typing import Any

from jaxsp.evaluation.certainty import certainty
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
      least: certainty that the answer needs, to be judged by ``is_sure``; ``None``: it is not judged.
      instead_of: an exchange whose answer was not sure; this one has what is left of its time.

    Raises:
      Refusal: it is too long, or too many are waiting.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        served: Served,
        wish: Wish,
        ids: list[int],
        limits: Limits,
        *,
        least: float | None = None,
        instead_of: Exchange | None = None,
    ) -> None:
        longest = _longest(served, wish, len(ids), limits)
        self._wish, self._served, self._read, self._seconds = wish, served, len(ids), limits.seconds
        self._least, self._certainty, self._held_back = least, 0.0, ""
        self._deadline = asyncio.get_running_loop().time() + limits.seconds
        self._discarded = 0
        if instead_of is not None:
            self._deadline, self._discarded = instead_of._deadline, len(instead_of._answer.ids)
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
        wants = wish.alternatives is not None or least is not None
        self._job = Job(ids, sampling, served.index, seed, wants, deliver)
        scheduler.submit(self._job)

    def close(self) -> None:
        """Frees its place, if it has not ended."""
        self._scheduler.cancel(self._job)

    @property
    def context(self) -> str:
        """The context of its answer: ``sigma``, ``full`` or ``none``."""
        return self._served.context

    async def is_sure(self) -> bool:
        """Whether the answer is sure enough, which is known at its end, or at its first token that is not.

        A stream has the whole answer in one piece then.

        Raises:
          Refusal: as ``whole``.
        """
        async for text in self._texts():
            self._held_back += text
            if self._least is not None and self._certainty < self._least:
                return False
        return True

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
            async for text in self._pieces():
                tokens, reason = self._tokens(), self._answer.reason
                if text or tokens or reason:
                    yield event(self._form.piece(text, reason, tokens, more))
            if more:
                yield event(self._form.usage(self._usage()))
            yield DONE
        except Refusal as refusal:
            yield failed(refusal)

    async def _pieces(self) -> AsyncIterator[str]:
        """The text that was held back, which is all of it, or what is certain with each news."""
        if self._answer.reason is not None:
            yield self._held_back
        async for text in self._texts():
            yield text

    async def _texts(self) -> AsyncIterator[str]:
        """The text that is certain with each news."""
        loop = asyncio.get_running_loop()
        while self._answer.reason is None:
            try:
                news = await asyncio.wait_for(self._news.get(), self._deadline - loop.time())
            except TimeoutError:
                self.close()
                raise took_too_long(self._seconds) from None
            if news.error is not None:
                raise news.error
            before = len(self._answer.ids)
            text = self._answer.add(news.ids, news.ended, news.likely, self._wish.alternatives or 0)
            if self._least is not None and news.likely is not None:  # a stop text may leave some out
                best_A = news.likely.log_RAN[: len(self._answer.ids) - before, 0]
                self._certainty = min(self._certainty, certainty(best_A))
            if self._answer.reason is not None:
                self.close()  # at a stop text, of which the batch doesn't know
            yield text

    def _tokens(self) -> list[Token] | None:
        return None if self._wish.alternatives is None else self._answer.tokens()

    def _usage(self) -> dict[str, Any]:
        return self._served.usage(self._read, len(self._answer.ids), self._discarded)


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
