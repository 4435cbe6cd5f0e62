"""The experiment's pictures (matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.objectives.analysis import LARGER_IS_BETTER, MEASURED_BY, REFERENCES


def heat_map(table: Mapping[str, Mapping[str, Mapping[str, float]]], file: Path) -> None:
    """Rows: trained on; columns: measured by. The colour is what is left of the way to the full context."""
    rows = [name for name in table if name not in REFERENCES]

    def left(row: str, metric: str) -> float:
        turn = abs if metric == "entropy_shift" else lambda v: -v if metric in LARGER_IS_BETTER else v
        ours, full, none = (
            turn(table[name][metric]["value"]) for name in (row, "full_context", "no_context")
        )
        return (ours - full) / (none - full) if none != full else 0.0

    figure = Figure(figsize=(11, 1.6 + 0.55 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    shares = [[left(row, metric) for metric in MEASURED_BY] for row in rows]
    image = axes.imshow(shares, cmap="YlOrBr", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(rows):
        for x, metric in enumerate(MEASURED_BY):
            colour = "white" if shares[y][x] > 0.6 else "black"
            axes.text(x, y, f"{table[row][metric]['value']:.3f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(MEASURED_BY)), MEASURED_BY, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="measured by (held-out questions)", ylabel="trained on")
    figure.colorbar(image, label="0: full, 1: no context")
    figure.savefig(file, dpi=130)


def long_answers(found: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """The share of free-running answers that still follow the teacher's, one small picture an objective."""
    names = [name for name in found if name != "no_context"]
    figure = Figure(figsize=(2.6 * len(names), 5.2), layout="constrained")
    panels = figure.subplots(2, len(names), sharey="row", squeeze=False)
    for (above, below), name in zip(panels.T, names, strict=True):
        for who, colour in (("no_context", "#b3261e"), (name, "#0b7a75")):
            curve, bins = found[who]["agreement"], found[who]["rouge_l"]
            n = [point["words"] for point in curve]
            above.plot(n, [point["value"] for point in curve], color=colour)
            above.fill_between(
                n, [p["low"] for p in curve], [p["high"] for p in curve], color=colour, alpha=0.15
            )
            below.errorbar(
                range(len(bins)),
                [b["value"] for b in bins],
                [
                    [max(0.0, b["value"] - b["low"]) for b in bins],
                    [max(0.0, b["high"] - b["value"]) for b in bins],
                ],
                color=colour, marker="o", capsize=3, label="no context" if who == "no_context" else "σ",
            )  # fmt: skip
        labels = [f"{b['from']}-{b['to']}" if b["to"] < 1000 else f"{b['from']}+" for b in bins]
        below.set_xticks(range(len(bins)), labels)
        above.set(title=name, xlabel="first words", ylim=(0, 1))
        below.set(xlabel="words of the teacher's answer", ylim=(0, 1))
    panels[0, 0].set_ylabel("share of answers that agree")
    panels[1, 0].set_ylabel("ROUGE-L")
    panels[1, 0].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
