"""Several runs side by side: what differs between their settings, one table, and the page."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsp.errors import UserError
from jaxsp.evaluation import charts
from jaxsp.evaluation.page import render, series
from jaxsp.teacher.another import name_of_kl

UNIMPORTANT = ("checkpoint_every", "parallel", "mesh")
"""Settings that decide nothing of the result."""

VALUES = 4
"""Values of a setting that are said at most."""

BRACKETS = ("prompt", "truncated_context", "no_context")
"""Those whose KL the table has."""

MOST_BARS, MOST_ANSWERS, MOST_CURVES = 60, 12, 8
"""Runs whose bars, whose answers, and whose curves a page shows at most: there is a colour for each curve."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      name: as the user knows it.
      report: the fields of its ``report.json``.
      document: the text that σ stands for, or ``None``.
      page: address of its own page, seen from the page of all, or ``None``.
      lines: its training's metrics, a dict a step, if they are known.
    """

    name: str
    report: Mapping[str, Any]
    document: str | None = None
    page: str | None = None
    lines: Sequence[Mapping[str, Any]] = ()

    @functools.cached_property
    def held_out(self) -> dict[str, Mapping[str, Any]]:
        """The measurements of each held-out query, by its text."""
        return {query["query"]: query for query in self.report["queries"] if query["split"] == "held_out"}

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that decides its result, but for the texts."""
        report = self.report
        found = {name: value for name, value in report["settings"].items() if name not in UNIMPORTANT}
        teacher, versions = report.get("taught_by"), report.get("environment", {}).get("versions", {})
        own = {name: report[name] for name in ("model", "dtype", "quantization")}
        return {**own, "teacher": teacher and teacher["name"], **found, "jaxsp": versions.get("jaxsp")}

    @property
    def name_of_kl(self) -> str:
        """The name of what the report calls KL."""
        return name_of_kl(self.report.get("taught_by"))

    @functools.cached_property
    def figures(self) -> dict[str, Any]:
        """The row of the table, by name; ``None`` where something is not known."""
        report, brackets = self.report, self.report["held_out"]["brackets"]
        gap, right = report["gap_closed"], report.get("right")
        captured = [bool(query["captured"]) for query in self.held_out.values()]
        return {
            "gap": gap["value"],
            "gap_low": gap["low"],
            "gap_high": gap["high"],
            **{name: brackets.get(name, {}).get("kl") for name in BRACKETS},
            "decisive": brackets["prompt"].get("decisive_agreement"),
            "captured": (sum(captured), len(captured)),
            "right": right and (right["prompt"], right["known"]),
            "slots": report["prompt_length"],
            "tokens": report["context_tokens"],
            "seconds": report.get("seconds", {}).get("total"),
        }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs that can be compared.

    Attributes:
      runs: in the order given.
      differing: the values of the settings that differ, one a run.
      text: what differs, in a sentence or two.
      same_queries: whether all were measured on the same held-out queries.
    """

    runs: list[Run]
    differing: dict[str, list[Any]]
    text: str
    same_queries: bool


def compare(runs: Sequence[Run], *, of_many: bool = False) -> Comparison:
    """The comparison of runs.

    Args:
      runs: two or more.
      of_many: they are the jobs of one run, which may have documents and queries of their own.

    Raises:
      UserError: they can't be compared, and why.
    """
    first, *others = runs
    if not of_many:
        for other in others:
            _check(first, other)
    settings = [run.settings for run in runs]
    names = dict.fromkeys(name for own in settings for name in own)
    values = {name: [own.get(name) for own in settings] for name in names}
    differing = {name: own for name, own in values.items() if any(value != own[0] for value in own)}
    same = all(run.held_out.keys() == first.held_out.keys() for run in others)
    text = _in_words(differing)
    if not same:
        text += " Each is measured on held-out queries of its own: compare the gap closed, not the KL."
    elif {"model", "dtype", "quantization", "teacher"} & differing.keys():
        text += " The KL of each is to what its own teacher says."
    return Comparison(list(runs), differing, text, same)


def _check(first: Run, other: Run) -> None:
    """Raises ``UserError`` if two runs can't be compared."""

    def refuse(reason: str) -> None:
        raise UserError(f"{other.name} can't be compared with {first.name}: {reason}.")

    if None not in (first.document, other.document) and first.document != other.document:
        refuse("they stand in for other documents")
    ours, theirs = first.held_out.keys(), other.held_out.keys()
    if ours != theirs:
        refuse(
            f"they are measured on other held-out queries ({len(ours)} and {len(theirs)}, of which"
            f" {len(ours & theirs)} are the same); give all runs the same file with --held-out"
        )
    if first.name_of_kl != other.name_of_kl:
        refuse("of the teacher of one only the answers are known, so that its KL is another figure")


def _in_words(differing: Mapping[str, Sequence[Any]]) -> str:
    """The differences, in a sentence."""
    if not differing:
        return "All their settings are the same."
    parts = []
    for name, values in differing.items():
        distinct = list(dict.fromkeys(map(in_words, values)))
        more = f" and {len(distinct) - VALUES} more" if distinct[VALUES:] else ""
        parts.append(f"{name.replace('_', ' ')} ({', '.join(distinct[:VALUES])}{more})")
    listed = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    return f"They differ in {listed}."


def in_words(value: Any) -> str:
    """A setting's value for people.

    Example:
      >>> in_words(None), in_words(0.02), in_words("")
      ('–', '0.02', '(empty)')
    """
    if value is None:
        return "–"
    return (f"{value:g}" if isinstance(value, float) else str(value)) or "(empty)"


def html(found: Comparison) -> str:
    """The page of a comparison.

    Args:
      found: as ``compare`` gives it.
    """
    shown = found.runs[:MOST_BARS]
    gaps = [
        {"name": "prompt", "label": run.name, "value": run.figures["gap"], "low": run.figures["gap_low"],
         "high": run.figures["gap_high"]}
        for run in shown
    ]  # fmt: skip
    kl = []
    for run in shown:
        interval = run.report["held_out"].get("kl_intervals", {}).get("prompt", {})
        kl.append({"name": "prompt", "label": run.name, **interval, "value": run.figures["prompt"]})
    curves = {f"run-{i}": (run.name, series(run.lines, "held_out_kl")) for i, run in enumerate(found.runs)}
    queries = list(found.runs[0].held_out.values()) if found.same_queries else []
    return render(
        "compare.html.jinja",
        found=found,
        gaps=charts.bars(gaps, most=1.0),
        kl=charts.bars(kl),
        cut=len(found.runs) - len(shown),
        training=charts.chart(curves, {}) if len(curves) <= MOST_CURVES else None,
        settings=[
            [in_words(values[i]) for values in found.differing.values()] for i in range(len(found.runs))
        ],
        queries=queries if len(found.runs) <= MOST_ANSWERS else [],
    )
