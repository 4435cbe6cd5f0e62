"""The batch's thread, with a batch that does what a test says: failures, jobs that leave, and time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jaxsp.models.generation import Sampling
from jaxsp.models.generation.live import News as LiveNews
from jaxsp.serve import scheduler as scheduler_module
from jaxsp.serve.refusal import Refusal
from jaxsp.serve.scheduler import Job, News, Scheduler
from tests.serve.running import until


class Batch:
    """One slot; each look gives a token, until ``max_tokens`` are there."""

    def __init__(self, advanced: Callable[[], None] = lambda: None) -> None:
        self.advanced, self.steps, self.free = advanced, 0, 2
        self.rows: dict[int, int] = {}

    def warm_up(self) -> None:
        pass

    def add(self, ids: list[int], sampling: Sampling, **options: Any) -> int:
        row = next(row for row in range(2) if row not in self.rows)
        self.free -= 1
        self.rows[row] = int(sampling.max_tokens)
        return row

    def drop(self, row: int) -> None:
        self.free += 1
        del self.rows[row]

    def advance(self, steps: int) -> list[LiveNews]:
        self.advanced()
        row = next(iter(self.rows))
        self.rows[row] -= 1
        self.steps += 1
        ended = not self.rows[row]
        if ended:
            self.drop(row)
        return [LiveNews(row, [5], ended, None)]


@contextlib.contextmanager
def scheduler(make_batch: Callable[[], Any], queue: int = 8) -> Iterator[Scheduler]:
    made = Scheduler(make_batch, 1, queue)
    try:
        yield made
    finally:
        made.close()


def submit(to: Scheduler, max_tokens: int = 1) -> tuple[Job, list[News]]:
    news: list[News] = []
    job = Job([1], Sampling(max_tokens=max_tokens), 0, 0, False, news.append)
    to.submit(job)
    return job, news


def ended(news: list[News]) -> bool:
    return bool(news) and news[-1].ended


def test_who_leaves_while_all_fails_leaves_nothing_to_do(monkeypatch, caplog):
    """The step fails in which a client leaves, and then there is no new batch for a while."""
    inside, go_on, made = threading.Event(), threading.Event(), list[float]()

    def fail() -> None:
        inside.set()
        assert go_on.wait(20)
        raise RuntimeError("the device is gone")

    def make() -> Batch:
        made.append(time.monotonic())
        if 1 < len(made) < 5:
            raise RuntimeError("no memory")
        return Batch(fail if len(made) == 1 else lambda: None)

    monkeypatch.setattr(scheduler_module, "LONGEST_PAUSE", 0.2)
    with scheduler(make) as own:
        first, unheard = submit(own)
        assert inside.wait(20)
        _, others = submit(own)
        own.cancel(first)
        go_on.set()
        assert until(lambda: ended(others))
        assert others[-1].error is not None
        assert others[-1].error.status == 500
        time.sleep(0.3)
        assert (len(made), unheard, own.count) == (2, [], 0)  # nobody asks: nothing is made
        lost = [submit(own)[1] for _ in range(2)]
        assert until(lambda: all(map(ended, lost)))
        last: list[News] = []
        while len(made) < 5:
            _, last = submit(own)
            assert until(lambda last=last: ended(last))
        assert last == [News([5], None, True)]
    assert made[2] - made[1] >= 0.1
    assert made[3] - made[2] >= 0.2
    assert "the device is gone" in caplog.text
    assert "no memory" in caplog.text


def test_time_in_the_queue_does_not_count_until_a_slot_is_free():
    """Each answer takes a fifth of a second: so long it may take until a slot is free."""
    with scheduler(lambda: Batch(lambda: time.sleep(0.1)), queue=19) as own:
        all_news = [submit(own, 2)[1] for _ in range(20)]
        with pytest.raises(Refusal) as full:
            own.check_room()
        assert full.value.headers == {"retry-after": "1"}
        assert until(lambda: all(map(ended, all_news)))
        assert sum(own._durations) / len(own._durations) == pytest.approx(0.2, abs=0.1)
