"""The two that σ is compared with, as models of their own: after the whole document, and after nothing.

Each has a batch for itself. In that of the soft prompts every request would take the memory of the longest
prefix, and the time to read it at each token: what σ saves.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsp.errors import UserError
from jaxsp.evaluation.report import bytes_of
from jaxsp.files import size
from jaxsp.models import decoder
from jaxsp.models.generation import Live
from jaxsp.serve.exchange import Limits
from jaxsp.serve.refusal import Refusal
from jaxsp.serve.scheduler import Scheduler
from jaxsp.serve.served import Served, Shelf
from jaxsp.typing import KeyValues

DOCUMENT, NOTHING = "document", "nothing"

MOST_OPEN = 2
"""Documents that are kept at once; the one not asked for longest makes room for another."""

MOST_SLOTS = 4
"""Requests that are answered at once after each."""


class Key(NamedTuple):
    """The texts before the requests: equal for soft prompts of one document."""

    kind: str
    before: tuple[int, ...]
    context: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class Bracket:
    """One of the two, of a soft prompt.

    Attributes:
      name: of the model: ``name:document`` or ``name:nothing``.
      kind: ``document`` or ``nothing``.
      of: the soft prompt.
    """

    name: str
    kind: str
    of: Served

    @functools.cached_property
    def key(self) -> Key:
        """The texts that it has read."""
        before = tuple(self.of.prompt.manifest["slots"]["before_ids"])
        return Key(self.kind, before, self.of.prompt.context if self.kind == DOCUMENT else None)

    @property
    def held(self) -> int:
        """Tokens that stand where σ does."""
        return self.of.prompt.manifest["context_tokens"] if self.kind == DOCUMENT else 0

    @property
    def entry(self) -> dict[str, Any]:
        """The model in ``/v1/models``."""
        return self.unread.entry

    @property
    def missing(self) -> str | None:
        """Why it can't be asked, a sentence; ``None``: it can."""
        if self.kind == NOTHING:
            return None
        if self.of.prompt.context is None:
            return "The document is not in the soft prompt's folder (context.txt)."
        window = self.of.model.config.window
        if (left := window - len(self.key.before)) < self.held + 2:
            return (
                f"The document has {self.held:,} tokens; the model's window of {window:,} has room for"
                f" {max(0, left - 2):,}."
            )
        return None

    def context_ids(self) -> list[int]:
        """Token ids of what stands where σ does."""
        if self.kind == NOTHING:
            return []
        own, model = self.of.prompt, self.of.model
        return model.check_ids(own.chat.context_ids(model.tokenizer, own.context or "")).tolist()

    @functools.cached_property
    def unread(self) -> Served:
        """The model before it has read anything: all but its prefix, which is σ's."""
        return dataclasses.replace(self.of, name=self.name, index=0, kind=self.kind, held=self.held)


class _Opened:
    """A bracket's batch, or the work that makes it, and the requests that wait for it."""

    def __init__(self, reading: asyncio.Task[tuple[KeyValues, Scheduler]]) -> None:
        self.reading, self.waiting = reading, 0

    @property
    def scheduler(self) -> Scheduler | None:
        done = self.reading.done() and not self.reading.cancelled() and self.reading.exception() is None
        return self.reading.result()[1] if done else None

    @property
    def is_idle(self) -> bool:
        return not self.waiting and self.scheduler is not None and not self.scheduler.count


class Brackets:
    """The brackets of all soft prompts, each read at the first request for it; to be used in one event loop.

    Args:
      shelf: the soft prompts.
      limits: of a request.
      slots: requests that are answered at once.
      queue: requests that may wait, for each.
    """

    def __init__(self, shelf: Shelf, limits: Limits, *, slots: int, queue: int) -> None:
        self._shelf, self._limits = shelf, limits
        self._slots, self._queue = min(slots, MOST_SLOTS), queue
        self._known: dict[str, Bracket] = {}
        self._opened = collections.OrderedDict[Key, _Opened]()
        self._readers = concurrent.futures.ThreadPoolExecutor(2, "jaxsp-reader")

    def find(self, name: str) -> Bracket | None:
        """The bracket of a name; ``None`` if it is not of this form."""
        of, _, kind = name.rpartition(":")
        if name not in self._known and kind in (DOCUMENT, NOTHING):
            if name in self._shelf or of not in self._shelf:
                return None
            self._known[name] = Bracket(name, kind, self._shelf[of])
        return self._known.get(name)

    @property
    def count(self) -> int:
        """Requests that wait or are under way."""
        return sum(one.scheduler.count for one in self._opened.values() if one.scheduler)

    @property
    def in_words(self) -> str | None:
        """A sentence on the memory that documents will take; ``None`` if none can be asked."""
        config, known = self._shelf.model.config, dict[Key, int]()
        for served in self._shelf.values():
            bracket = Bracket("", DOCUMENT, served)
            if bracket.missing is None:
                known[bracket.key] = len(bracket.key.before) + decoder.round_size(bracket.held)
        if not known:
            return None
        longest = sorted(known.values())[-MOST_OPEN:]
        most = sum(bytes_of(functools.partial(decoder.empty_prefix, config, length)) for length in longest)
        what = f"up to {MOST_OPEN} whole documents" if len(known) > MOST_OPEN else "the whole document"
        what = "the whole documents" if 1 < len(known) <= MOST_OPEN else what
        return f"The page also asks {what}: from the first question on, keys and values of {size(most)}."

    async def open(self, bracket: Bracket, encoder: concurrent.futures.Executor) -> tuple[Served, Scheduler]:
        """The model, ready to answer, and its batch; nothing may be awaited before a request is in it.

        Args:
          bracket: from ``find``.
          encoder: the thread that texts are encoded in.

        Raises:
          Refusal: it can't be asked, or there is no room for it.
        """
        if (missing := bracket.missing) is not None:
            raise Refusal(missing, status=404, param="model", code="model_not_found")
        key = bracket.key
        if key not in self._opened:
            self._make_room(key.kind)
            self._opened[key] = _Opened(asyncio.ensure_future(self._read(bracket, encoder)))
        self._opened.move_to_end(key)
        one = self._opened[key]
        one.waiting += 1
        try:
            prefix, scheduler = await asyncio.shield(one.reading)
        except Exception:
            if self._opened.get(key) is one:
                del self._opened[key]
            raise
        finally:
            one.waiting -= 1
        return dataclasses.replace(bracket.unread, prefix=prefix), scheduler

    def close(self) -> None:
        """Ends all batches; requests that are not finished are refused."""
        self._readers.shutdown()
        for one in self._opened.values():
            if one.scheduler is not None:
                one.scheduler.close()
        self._opened.clear()

    def _make_room(self, kind: str) -> None:
        """Closes the batch of this kind that was not asked for longest, if there are as many as may be."""
        own = [key for key in self._opened if key.kind == kind]
        if len(own) < MOST_OPEN:
            return
        key = next((key for key in own if self._opened[key].is_idle), None)
        if key is None:
            raise Refusal(
                f"{len(own)} other documents are being asked, as many as may at once; try again in 10 s.",
                status=429,
                type="rate_limit_error",
                code="queue_full",
                headers={"retry-after": "10"},
            )
        if (scheduler := self._opened.pop(key).scheduler) is not None:
            scheduler.close()

    async def _read(
        self, bracket: Bracket, encoder: concurrent.futures.Executor
    ) -> tuple[KeyValues, Scheduler]:
        loop = asyncio.get_running_loop()
        try:
            ids = await loop.run_in_executor(encoder, bracket.context_ids)
            return await loop.run_in_executor(self._readers, self._prepared, bracket, ids)
        except UserError as error:
            raise Refusal(str(error), param="model") from None
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise Refusal(
                f"There is no memory left to read the {bracket.kind}; start the server with fewer --slots.",
                status=503,
                type="server_error",
            ) from error

    def _prepared(self, bracket: Bracket, ids: list[int]) -> tuple[KeyValues, Scheduler]:
        """The prefix, and a batch that answers after it; its program is compiled by the first request."""
        model, limits = bracket.of.model, self._limits
        before = np.array([bracket.key.before], np.int32)
        prefix = decoder.read_long(model.params, model.config, before)
        prefix = decoder.read_long(model.params, model.config, np.array([ids], np.int32), prefix)
        room = model.config.window - prefix.end - 1

        def make_batch() -> Live:
            return Live(
                model.params,
                model.config,
                [prefix],
                slots=self._slots,
                query_tokens=min(limits.query_tokens, room),
                answer_tokens=min(limits.answer_tokens, room),
                stops=max(len(bracket.of.stop_ids), 1),
            )

        return prefix, Scheduler(make_batch, self._slots, self._queue, warm_up=False)
