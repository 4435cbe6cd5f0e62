"""The running batch in a thread of its own: jobs come by a bounded queue, tokens go out by callbacks."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from jaxsp.errors import UserError
from jaxsp.models.generation import Live, Sampling
from jaxsp.models.generation.likely import Likely
from jaxsp.serve.refusal import Refusal

LOOK_SECONDS = 0.03
"""Time between two looks at the batch, about: how old news may be."""

MOST_STEPS = 8
"""Decoding steps between two looks, however short they are."""

LONGEST_PAUSE = 30.0
"""Seconds between two attempts to make a batch, at most; the first pause is a tenth of one."""

_LOG = logging.getLogger("jaxsp")


class News(NamedTuple):
    """Tokens of an answer since the last news; or, in place of further ones, why there are none."""

    ids: list[int]
    likely: Likely | None
    ended: bool
    error: Refusal | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A request to the batch.

    Attributes:
      ids: token ids to read behind the prefix.
      sampling: rule by which tokens are chosen.
      prefix: index of the prefix.
      seed: of the draws.
      likely: whether the tokens' probabilities are wanted.
      deliver: called with the news, in the scheduler's thread.
    """

    ids: list[int]
    sampling: Sampling
    prefix: int
    seed: int
    likely: bool
    deliver: Callable[[News], None]


class Scheduler:
    """Lets jobs join the batch in their order as soon as there is room, and tells them their tokens.

    Args:
      make_batch: makes the batch, at the start and after an error.
      slots: requests that are answered at once.
      queue: requests that may wait.
      warm_up: whether to compile all at once; else each program is compiled when it is first needed.
    """

    def __init__(
        self, make_batch: Callable[[], Live], slots: int, queue: int, *, warm_up: bool = True
    ) -> None:
        self._make_batch, self._slots, self._most = make_batch, slots, slots + queue
        self._changed = threading.Condition()
        # By all threads, under the condition's lock:
        self._queue = collections.deque[Job]()
        self._left: set[Job] = set()
        self._jobs: dict[Job, float | None] = {}  # all that are not finished; since when they have a slot
        self._durations = collections.deque[float](maxlen=32)
        self._closed = False
        # By the batch's own thread:
        self._batch: Live | None = make_batch()
        if warm_up:
            self._batch.warm_up()
        self._joining = collections.deque[Job]()
        self._rows: dict[int, Job] = {}
        self._step_seconds = LOOK_SECONDS
        self._thread = threading.Thread(target=self._run, name="jaxsp-batch", daemon=True)
        self._thread.start()

    @property
    def count(self) -> int:
        """Requests that wait or are under way."""
        return len(self._jobs)

    def check_room(self, arriving: int = 0) -> None:
        """Checks that another job may come.

        Args:
          arriving: jobs that are still being read.

        Raises:
          Refusal: too many are there already, or the server is closing.
        """
        with self._changed:
            if self._closed:
                raise Refusal("The server is closing.", status=503, type="server_error")
            if (count := len(self._jobs) + arriving) >= self._most:
                seconds = self._retry_after()
                raise Refusal(
                    f"{count} requests are waiting or being answered, as many as may; try again in"
                    f" {seconds} s.",
                    status=429,
                    type="rate_limit_error",
                    code="queue_full",
                    headers={"retry-after": str(seconds)},
                )

    def submit(self, job: Job) -> None:
        """Lets a job wait for its turn.

        Raises:
          Refusal: as ``check_room``.
        """
        with self._changed:
            self.check_room()
            self._jobs[job] = None
            self._queue.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Takes a job out, wherever it is; it hears no more."""
        with self._changed:
            if job not in self._jobs:
                return
            self._finish(job)
            if job in self._queue:
                self._queue.remove(job)
            else:
                self._left.add(job)
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread; jobs that are not finished are refused."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _retry_after(self) -> int:
        """Seconds until a slot is free, about."""
        known = self._durations
        mean = sum(known) / len(known) if known else 1.0
        return max(1, min(60, math.ceil(mean / self._slots)))

    def _run(self) -> None:
        pause = 0.0
        while self._wait(pause):
            try:
                if self._batch is None:
                    pause = min(2 * pause or 0.1, LONGEST_PAUSE)  # if it fails
                    self._batch = self._make_batch()
                pause = 0.0
                self._turn(self._batch)
            except Exception:  # of the device: these requests are lost, the server is not
                _LOG.exception("The batch failed, and is made anew.")
                self._batch = None
                self._refuse(self._lost(), "The server failed; its log says why.", 500)
        self._refuse(list(self._jobs), "The server is closing.", 503)

    def _lost(self) -> list[Job]:
        """The jobs that a failure ends: those of the batch; where there was none, all that wait."""
        with self._changed:
            lost = [*self._rows.values(), *self._joining]
            if not lost:
                lost = list(self._queue)
                self._queue.clear()
            self._rows = {}
            self._joining.clear()
            self._left.clear()  # they had a row there
        return lost

    def _wait(self, pause: float) -> bool:
        """Waits for something to do, after a pause; false if the server closes."""
        with self._changed:
            if pause:
                self._changed.wait_for(lambda: self._closed, pause)
            # Jobs that have left are nothing to do by themselves: they have a row, or no place any more.
            self._changed.wait_for(lambda: self._queue or self._rows or self._closed)
            return not self._closed

    def _turn(self, batch: Live) -> None:
        """Lets jobs leave and join, then decodes until the next look."""
        with self._changed:
            left, self._left = self._left, set()
            gone = [row for row, job in self._rows.items() if job in left]
            for _ in range(min(batch.free + len(gone), len(self._queue))):
                self._joining.append(self._queue.popleft())
        for row in gone:
            batch.drop(row)
            del self._rows[row]
        while self._joining:
            job = self._joining[0]
            try:
                row = batch.add(job.ids, job.sampling, after=job.prefix, seed=job.seed, likely=job.likely)
                self._rows[row] = job
            except UserError as error:
                self._refuse([job], str(error), 400)
            self._joining.popleft()
        if not self._rows:
            return
        before, start = batch.steps, time.monotonic()
        found = batch.advance(max(1, min(MOST_STEPS, int(LOOK_SECONDS / self._step_seconds))))
        self._step_seconds = (time.monotonic() - start) / max(1, batch.steps - before)
        with self._changed:
            for row, *_ in found:
                if self._jobs.get(self._rows[row], start) is None:
                    self._jobs[self._rows[row]] = start
        for row, ids, ended, likely in found:
            job = self._rows.pop(row) if ended else self._rows[row]
            if ended:
                self._finish(job)
            if ids or ended:
                job.deliver(News(ids, likely, ended))

    def _finish(self, job: Job) -> None:
        with self._changed:
            if (since := self._jobs.pop(job, None)) is not None:
                self._durations.append(time.monotonic() - since)

    def _refuse(self, jobs: list[Job], message: str, status: int) -> None:
        kind = "invalid_request_error" if status == 400 else "server_error"
        for job in jobs:
            if job in self._jobs:  # else it has left meanwhile
                self._finish(job)
                job.deliver(News([], None, True, Refusal(message, status=status, type=kind)))
