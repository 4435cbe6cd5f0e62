"""The report's pictures (matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxsp.evaluation.brackets import CONDITIONS

_COLOURS = {
    "full_context": "#222222",
    "prompt": "#0b7a75",
    "initial": "#b0a990",
    "truncated_context": "#d98e04",
    "no_context": "#b3261e",
}
_LABELS = {name: name.replace("_", " ") for name in CONDITIONS} | {"prompt": "soft prompt σ"}


def _figure(width: float, height: float):
    # The object interface: pyplot would choose a window system and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def training_curve(lines: list[dict[str, Any]], held_out: dict[str, Any], objective: str, file: Path) -> None:
    """Training loss and held-out KL over the steps, between the brackets.

    The loss of another objective than KL has an axis of its own, on the right.
    """
    figure, axes = _figure(7, 4)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "held_out_kl" in line]
    loss_axes = axes if objective == "kl" else axes.twinx()
    loss_lines = loss_axes.plot(
        [line["step"] for line in steps],
        [line["loss"] for line in steps],
        color="#9fb8ad",
        linewidth=1,
        label="training loss of the batch",
    )
    if loss_axes is not axes:
        loss_axes.set_ylabel(f"{objective} (as minimised)")
        loss_axes.spines["top"].set_visible(False)
    axes.plot(
        [line["step"] for line in evaluations],
        [line["held_out_kl"] for line in evaluations],
        color=_COLOURS["prompt"],
        marker="o",
        markersize=4,
        label="held-out KL of σ",
    )
    for name in ("no_context", "truncated_context", "full_context"):
        axes.axhline(
            held_out[name]["kl"], color=_COLOURS[name], linestyle="--", linewidth=1, label=_LABELS[name]
        )
    axes.set(xlabel="step", ylabel="KL to the full context (nats/token)", title="Training")
    axes.set_ylim(bottom=-0.02)
    handles = dict.fromkeys([*loss_lines, *axes.get_lines()])
    axes.legend(handles=list(handles), frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def by_position(curves: dict[str, list[float]], file: Path) -> None:
    """Mean held-out KL at each answer position, for each condition."""
    figure, axes = _figure(7, 4)
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, color=_COLOURS[name], label=_LABELS[name], linewidth=1.5)
    axes.set(
        xlabel="position in the answer (token)",
        ylabel="KL to the full context (nats)",
        title="Held-out KL by answer position",
    )
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def by_query(queries: list[dict[str, Any]], file: Path) -> None:
    """KL of σ beside that without context, for each held-out query, the worst on top."""
    rows = sorted((q for q in queries if q["split"] == "held_out"), key=lambda q: q["kl"])[-30:]
    figure, axes = _figure(8, 1.2 + 0.32 * len(rows))
    places = range(len(rows))
    axes.barh(places, [q["kl_no_context"] for q in rows], color="#e8c9c6", height=0.8, label="no context")
    axes.barh(places, [q["kl"] for q in rows], color=_COLOURS["prompt"], height=0.45, label=_LABELS["prompt"])
    axes.set_yticks(list(places), [_shortened(q["query"]) for q in rows], fontsize=8)
    axes.set(xlabel="KL to the full context (nats/token)", title="Held-out KL by query")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(file, dpi=150)


def _shortened(text: str, width: int = 52) -> str:
    # A dollar sign would switch matplotlib to formulas.
    return (text if len(text) <= width else text[: width - 1] + "…").replace("$", r"\$")
