"""Charts: places of numbers."""

from __future__ import annotations

import math

import pytest

from jaxsp.evaluation.charts import bars, chart


def bar(value, low=None, high=None):
    return {"name": "a", "label": "A", "value": value, "low": low, "high": high}


def test_bars_share_a_scale_that_intervals_fit_in():
    found = bars([bar(1.0, 0.5, 4.0), bar(2.0)])
    assert [(one.width, one.span) for one in found] == [(25.0, (12.5, 100.0)), (50.0, None)]


def test_bars_stay_in_the_drawing():
    assert [one.width for one in bars([bar(-0.5), bar(0.5), bar(1.5)], most=1.0)] == [0.0, 50.0, 100.0]
    assert [one.value for one in bars([bar(math.nan), bar(0.0), bar(None)])] == [0.0]


@pytest.mark.parametrize(
    ("values", "is_log"),
    [([0.01, 1.0], True), ([0.0, 1.0], False), ([-1.0, 1.0], False), ([0.5, 1.0], False)],
)
def test_a_scale_is_logarithmic_where_values_span_much(values, is_log):
    found = chart({"a": ("A", list(enumerate(values)))}, {})
    assert found is not None
    assert found.is_logarithmic is is_log
    (line,) = found.lines
    heights = [y for _, y in line.places]
    assert heights[0] > heights[1]  # from the top
    assert all(0 <= place <= 100 for xy in line.places for place in xy)
    assert all(-0.01 <= place <= 100.01 for _, place in found.y_ticks)
    by_height = [float(text) for text, _ in sorted(found.y_ticks, key=lambda tick: -tick[1])]
    assert by_height == sorted(by_height)


def test_levels_go_across_and_count_for_the_scale():
    found = chart({"a": ("A", [(0, 1.0), (4, 2.0)])}, {"b": ("B", 8.0), "c": ("C", math.inf)})
    assert found is not None
    assert [line.name for line in found.lines] == ["a", "b"]
    assert [x for x, _ in found.lines[1].places] == [0.0, 100.0]
    assert found.lines[1].places[0][1] < found.lines[0].places[1][1]
    assert ("0", 0.0) in found.x_ticks
    assert ("4", 100.0) in found.x_ticks


@pytest.mark.parametrize("points", [[], [(0, math.nan)]])
def test_nothing_is_no_chart(points):
    assert chart({"a": ("A", points)}, {"b": ("B", 1.0)}) is None


@pytest.mark.parametrize("value", [0.0, 1e-12, 5.0, -3.0, 1e300])
def test_a_single_point(value):
    found = chart({"a": ("A", [(0, value)])}, {})
    assert found is not None
    assert all(math.isfinite(place) for place in found.lines[0].places[0])
