"""Several processes as one run: joining, agreeing, sharing work, and noticing that another is gone.

With a single process, every function here does nothing but what its name says of one.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np

from jaxsp.files import parse_json
from jaxsp.typing import UserError

Thing = TypeVar("Thing")

PATIENCE = 60
"""Seconds in which all processes must have come."""

_HEARTBEAT = 30  # seconds of silence after which a process is taken to be gone


def join(coordinator: str | None, process_id: int | None, processes: int | None) -> bool:
    """Makes this process one of several, before jax is used; says whether there are others.

    On a TPU pod the processes find each other. Elsewhere the first one listens at ``coordinator``.

    Args:
      coordinator: host:port of the process 0.
      process_id: number of this one, from 0.
      processes: number of processes.

    Raises:
      UserError: some of the three are given and others not, or one is invalid. If the others don't
        come in time the process ends with a message: nothing else can stop a waiting jax.
    """
    if coordinator is None and process_id is None and processes is None:
        _start_crash_reporter()
        with _no_longer_than(PATIENCE, "The other hosts of this TPU pod have not come"):
            jax.distributed.initialize()
        return jax.process_count() > 1
    if coordinator is None or process_id is None or processes is None:
        raise UserError("--coordinator, --process-id and --num-processes go together; give all three.")
    host, _, port = coordinator.rpartition(":")
    if not (host and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise UserError(f"--coordinator must be host:port, not {coordinator!r}; ports are 1 to 65535.")
    if processes < 1:
        raise UserError(f"--num-processes must be at least 1, not {processes}.")
    if not 0 <= process_id < processes:
        raise UserError(
            f"--process-id must lie from 0 to {processes - 1} (--num-processes - 1), not {process_id}."
        )
    _start_crash_reporter()
    who = "Not all the others have come to" if process_id == 0 else "Nobody answers at"
    with _no_longer_than(PATIENCE, f"{who} the coordinator's address {coordinator}"):
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            initialization_timeout=10 * PATIENCE,  # ours is sooner, and says what is wrong
            heartbeat_timeout_seconds=_HEARTBEAT,
        )
    return processes > 1


def shutdown(code: int) -> NoReturn:
    """Ends this process, of several without waiting for the others, who may be gone."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if _crash_reporter is not None:
        _crash_reporter.communicate(b"bye")
        os._exit(code)
    raise SystemExit(code)


_crash_reporter: subprocess.Popen[bytes] | None = None

_REPORTER_SOURCE = """
import sys
if sys.stdin.read() != "bye":
    print("jaxsp: This process was ended, most likely as another process of the run is gone; see what they"
          " said last, and start all again with --resume.", file=sys.stderr)
"""


def _start_crash_reporter() -> None:
    """Lets a process of its own say why this one ended: jax aborts when another is gone, past Python."""
    global _crash_reporter
    _crash_reporter = subprocess.Popen(
        [sys.executable, "-c", _REPORTER_SOURCE], stdin=subprocess.PIPE, start_new_session=True
    )
    atexit.register(lambda: _crash_reporter and _crash_reporter.communicate(b"bye"))


@contextlib.contextmanager
def _no_longer_than(seconds: float, complaint: str) -> Iterator[None]:
    def give_up() -> NoReturn:
        print(
            f"jaxsp: {complaint} within {seconds:g} s. Start all processes, with the same --coordinator"
            " and --num-processes.",
            file=sys.stderr,
            flush=True,
        )
        shutdown(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_alone = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it this process does all of its work by itself, as if there were no others."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def alone_while(results: Iterator[Thing]) -> Iterator[Thing]:
    """The same results, each made ``alone``; whoever takes them is not."""
    while True:
        with alone():
            try:
                result = next(results)
            except StopIteration:
                return
        yield result


def rank_and_count() -> tuple[int, int]:
    """Which process this is, and of how many that work together."""
    return (0, 1) if _alone else (jax.process_index(), jax.process_count())


def are_several() -> bool:
    """Whether other processes work with this one."""
    return rank_and_count()[1] > 1


def is_first() -> bool:
    """Whether this is the process that writes and reports."""
    return rank_and_count()[0] == 0


def on_first_process(function: Callable[[], Any]) -> Any:
    """The value of ``function`` in the first process, as JSON carries it; the others wait for it.

    Raises:
      UserError: it did there: then everywhere.
    """
    if not are_several():
        return function()
    message: dict[str, Any] = {}
    if is_first():
        try:
            message = {"value": function()}
        except UserError as error:
            message = {"error": str(error)}
    message = _exchange(message)[0]
    if "error" in message:
        raise UserError(message["error"])
    return message["value"]


def assert_same(settings: dict[str, Any]) -> None:
    """Raises ``UserError``, everywhere, if the processes were given different settings or data."""
    if not are_several():
        return
    first, *others = _exchange(settings)
    for i, theirs in enumerate(others, start=1):
        different = [
            f"{name} is {first.get(name)!r} in process 0 and {theirs.get(name)!r} in process {i}"
            for name in settings
            if theirs.get(name) != first.get(name)
        ]
        if different:
            raise UserError(f"The processes disagree: {'; '.join(different)}. Give all the same.")


def strided_shard(things: int) -> range:
    """Which of so many things this process does: every n-th."""
    process, processes = rank_and_count()
    return range(process, things, processes)


def contiguous_shards(things: Sequence[Thing]) -> list[Sequence[Thing]]:
    """A list cut into a shard for each process, without gaps, all as long as each other or one longer."""
    _, count = rank_and_count()
    ends = [process * len(things) // count for process in range(count + 1)]
    return [things[start:end] for start, end in itertools.pairwise(ends)]


def gather_strided(values: Sequence[Any] | np.ndarray, things: int) -> Any:
    """All things in order, of which each process has those of ``strided_shard``.

    Args:
      values: a list of what JSON can carry, or an array ``[share, ...]``.
      things: number of things.
    """
    if not are_several():
        return values
    if isinstance(values, np.ndarray):
        shape = -1, *values.shape[1:]
        everyone = _exchange_bytes(values.tobytes())
        shares = [np.frombuffer(data, values.dtype).reshape(shape) for data in everyone]
    else:
        shares = _exchange(values)
    ordered = [shares[i % len(shares)][i // len(shares)] for i in range(things)]
    return np.stack(ordered) if isinstance(values, np.ndarray) else ordered


@contextlib.contextmanager
def peer_failure_as_user_error() -> Iterator[None]:
    """Turns the failure of an exchange between processes into a ``UserError``."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise _gone(error) from error


def _gone(error: Exception) -> UserError:
    message = str(error).splitlines()[0]
    return UserError(
        f"Another process of this run is gone or can't be reached ({message:.120}); start all again with"
        " --resume."
    )


def _exchange(value: Any) -> list[Any]:
    everyone = _exchange_bytes(json.dumps(value).encode())
    return [parse_json(data, "Another process", object, finite=False) for data in everyone]


def _exchange_bytes(data: bytes) -> list[bytes]:
    """Every process's bytes, by its number."""
    from jax.experimental.multihost_utils import process_allgather

    try:
        sizes = np.asarray(process_allgather(np.int32(len(data)))).reshape(-1)
        padded = np.zeros(int(sizes.max()), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        rows = np.asarray(process_allgather(padded)).reshape(len(sizes), -1)
    except ValueError as error:  # what a lost connection is here, in some versions
        raise _gone(error) from error
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
