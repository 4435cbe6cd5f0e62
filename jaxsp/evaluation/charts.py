"""The geometry of a page's charts: places in percent of a drawing, which the templates draw as SVG."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MANY_TIMES, SMALLEST = 20.0, 1e-9
"""Largest over smallest value from which a scale is logarithmic, if none is smaller than the second."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """A horizontal bar with its interval.

    Attributes:
      name: key of what it shows.
      label: the same in words.
      value: the number.
      low: lower end of the interval; ``None``: there is none.
      high: its upper end.
      width: where the bar ends, in percent.
      span: where the interval begins and ends, in percent, or ``None``.
    """

    name: str
    label: str
    value: float
    low: float | None
    high: float | None
    width: float
    span: tuple[float, float] | None


def bars(rows: Iterable[Mapping[str, Any]], most: float | None = None) -> list[Bar]:
    """Bars from 0 on one scale.

    Args:
      rows: with ``name``, ``label``, ``value`` and, if there is an interval, ``low`` and ``high``.
      most: the value at the right end; by default the largest there is.

    Example:
      >>> (bar,) = bars([{"name": "a", "label": "a", "value": 1.0, "low": 0.0, "high": 2.0}])
      >>> bar.width, bar.span
      (50.0, (0.0, 100.0))
    """
    rows = [row for row in rows if _is_number(row["value"])]
    ends = [row["high"] if _is_number(row.get("high")) else row["value"] for row in rows]
    end: float = most or max(ends, default=1.0) or 1.0

    def place(value: float) -> float:
        return round(min(max(100 * value / end, 0.0), 100.0), 2)

    found = []
    for row in rows:
        known = _is_number(row.get("low")) and _is_number(row.get("high"))
        low, high = (row["low"], row["high"]) if known else (None, None)
        span = (place(row["low"]), place(row["high"])) if known else None
        found.append(Bar(row["name"], row["label"], row["value"], low, high, place(row["value"]), span))
    return found


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve, or a level that goes across.

    Attributes:
      name: key of what it shows.
      label: the same in words.
      points: numbers as they are, (x, y).
      places: the same in percent from the left and from the top.
      last: the last y.
    """

    name: str
    label: str
    points: list[tuple[float, float]]
    places: list[tuple[float, float]]

    @property
    def last(self) -> float:
        return self.points[-1][1]


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves over one pair of axes.

    Attributes:
      lines: the curves and levels.
      x_ticks: numbers on the axis with their places, in percent.
      y_ticks: likewise, from the top.
      is_logarithmic: whether y is.
    """

    lines: list[Line]
    x_ticks: list[tuple[str, float]]
    y_ticks: list[tuple[str, float]]
    is_logarithmic: bool


def chart(
    curves: Mapping[str, tuple[str, Sequence[tuple[float, float]]]], levels: Mapping[str, tuple[str, float]]
) -> Chart | None:
    """A chart of curves, between levels that go across; ``None`` if there is nothing to draw.

    Args:
      curves: label and points of each, by name.
      levels: label and y of each, by name.
    """
    known = {
        name: (label, [(x, y) for x, y in points if _is_number(y)])
        for name, (label, points) in curves.items()
    }
    known = {name: (label, points) for name, (label, points) in known.items() if points}
    if not known:
        return None
    across = {name: (label, y) for name, (label, y) in levels.items() if _is_number(y)}
    xs = [x for _, points in known.values() for x, _ in points]
    ys = [y for _, points in known.values() for _, y in points] + [y for _, y in across.values()]
    left, right = min(xs), max(max(xs), min(xs) + 1)
    is_log = min(ys) >= SMALLEST and max(ys) / min(ys) > MANY_TIMES
    bottom, top = (min(ys), max(ys)) if is_log else (min(min(ys), 0.0), max(ys))
    ticks = _powers(bottom, top) if is_log else _steps(bottom, top)
    bottom, top = min(bottom, ticks[0]), max(top, ticks[-1])

    def height(y: float) -> float:
        if is_log:
            y, low, high = math.log(y), math.log(bottom), math.log(top)
        else:
            low, high = bottom, top
        return round(100 * (high - y) / ((high - low) or 1.0), 2)

    def across_at(x: float) -> float:
        return round(100 * (x - left) / (right - left), 2)

    lines = [
        Line(name, label, points, [(across_at(x), height(y)) for x, y in points])
        for name, (label, points) in known.items()
    ]
    for name, (label, y) in across.items():
        lines.append(Line(name, label, [(left, y), (right, y)], [(0.0, height(y)), (100.0, height(y))]))
    whole = [x for x in _steps(left, right) if left <= x <= right and x == int(x)]
    x_ticks = [(f"{x:g}", across_at(x)) for x in whole]
    return Chart(lines, x_ticks, [(f"{y:g}", height(y)) for y in ticks], is_log)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _steps(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from below ``low`` to above ``high``, about ``count`` apart."""
    span = (high - low) or abs(high) or 1.0
    size = 10.0 ** math.floor(math.log10(span / count))
    step = next(size * times for times in (1, 2, 5, 10) if span / (size * times) <= count)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic scale, from below ``low`` to above ``high``."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    times = (1, 2, 5) if last - first <= 2 else (1,)
    found = [round(10.0**i * k, 12) for i in range(first, last + 1) for k in times]
    inside = [y for y in found if low <= y <= high]
    below = [y for y in found if y < low][-1:]
    above = [y for y in found if y > high][:1]
    return [*below, *inside, *above]
