"""A file may say anything: it is read as it should be, or one sentence says what is wrong.

No other exception, no more memory than some times the file's size, no more than a few seconds, and where
there is a checksum never silently something else. ``pytest -m fuzz -n2`` takes about ten minutes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
import traceback
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxsp.errors import UserError
from tests.fuzz.mutations import mutated
from tests.fuzz.table import READERS, Reader

SECONDS, MEMORY = 5, 64 << 20
MOST = 5
"""Faults of a reader, of different places, after which it is left."""

SLOW = ("chat template", "command line", "jobs", "cache list", "tokenizer of transformers", "its settings")
"""Readers of which the quick run tries one input."""
SLOWEST = "report anew"
"""Draws pictures."""


class TooSlow(BaseException):
    """It takes too many seconds of the processor."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def outcome(reader: Reader, folder: Path) -> Any:
    """The thing read, or ``None`` for a sentence; raises what is neither."""
    size = (folder / reader.file).stat().st_size
    try:
        return repr(reader.read(folder))
    except UserError as error:
        message = str(error)
        assert message.strip(), "an error without words"
        assert "\n" not in message.strip(), f"more than a line: {message!r:.300}"
        assert len(message) < 5000 + 2 * size, f"a long sentence: {message!r:.300}"
        return None


def fault(reader: Reader, folder: Path, data: bytes, sound: set[Any], is_sealed: bool) -> str | None:
    """The fault of what a reader makes of some bytes, in words; ``None`` if there is none."""
    (folder / reader.file).write_bytes(data)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    try:
        with limited():
            found = outcome(reader, folder)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [
            f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}jaxsp{os.sep}" in f.filename
        ]
        place = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in [last, *ours[::-1]][:4])
        return f"{type(error).__name__} at {place}: {error!s:.200}"
    peak = tracemalloc.get_traced_memory()[1] - before
    if peak > reader.times * len(data) + MEMORY:
        return f"memory: {peak:,} bytes for {len(data):,}"
    # One without its seal is of an older version.
    is_known = found is None or found in sound or (is_sealed and b'"seal"' not in data)
    if reader.checked and not is_known:
        return f"silently other: {found:.200}"
    return None


def faults(name: str, folder: Path, count: int, start: int = 0) -> list[str]:
    """Tries so many inputs of a reader; gives the faults, of each place the first."""
    reader, found = READERS[name], dict[str, str]()
    inputs = reader.inputs(folder)
    sound = set()
    for data in inputs:
        (folder / reader.file).write_bytes(data)
        sound.add(outcome(reader, folder))
    assert None not in sound or name in HOSTILE, f"{name}: an input is not sound"
    tracemalloc.start()
    try:
        for number in range(start, start + count):
            seed = f"{name}-{number}"
            data = mutated(reader.form, inputs, seed)
            if (wrong := fault(reader, folder, data, sound, b'"seal"' in inputs[0])) is not None:
                found.setdefault(
                    wrong.partition(": ")[0], f"{seed}: {wrong} ({len(data)} bytes {data[:60]!r})"
                )
                if len(found) >= MOST:
                    break
    finally:
        tracemalloc.stop()
    return list(found.values())


HOSTILE = {"queries, Parquet", "queries, tsv"}
"""Readers that refuse some of their inputs as they are: types that are no texts."""


@pytest.fixture
def folder(tmp_path, monkeypatch, unchecked):
    monkeypatch.setenv("JAXSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield tmp_path
    logging.disable(logging.NOTSET)


def test_a_few_inputs_of_each_reader(folder):
    wrong = []
    for name in [name for name in READERS if name != SLOWEST]:
        place = folder / name.replace(" ", "_")
        place.mkdir()
        count = 1 if name in SLOW else 6
        wrong += faults(name, place, count, start=1 << 20)
    assert not wrong, "\n".join(wrong)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", READERS)
def test_many_inputs(name, folder, capfd):
    started = time.perf_counter()
    wrong = faults(name, folder, READERS[name].count)
    with capfd.disabled():
        print(f"\n{READERS[name].count:,} inputs, {time.perf_counter() - started:.0f} s: {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.fuzz
def test_there_are_many(capfd):
    count = sum(reader.count for reader in READERS.values())
    with capfd.disabled():
        print(f"\n{count:,} inputs of {len(READERS)} readers")
    assert count >= 100_000
