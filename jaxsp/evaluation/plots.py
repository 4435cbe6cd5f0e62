"""The report's pictures (matplotlib)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxsp.evaluation.brackets import BRACKETS
from jaxsp.terminal import visible

_COLOURS = {
    "full_context": "#222222",
    "prompt": "#0b7a75",
    "initial": "#b0a990",
    "truncated_context": "#d98e04",
    "own_context": "#5b7fa6",
    "retrieved_part": "#6a4c93",
    "first_part": "#3d7ea6",
    "no_context": "#b3261e",
}
_LABELS = {name: name.replace("_", " ") for name in BRACKETS} | {"prompt": "soft prompt σ"}


def _axes(width: float, height: float):
    from matplotlib.figure import Figure  # not pyplot: it chooses a window system and keeps every figure

    axes = Figure(figsize=(width, height), layout="constrained").add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _save(axes: Any, file: Path, handles: list[Any] | None = None) -> None:
    """Writes the picture, with the legend beside it: on the plot it would hide what is measured."""
    handles = axes.get_legend_handles_labels()[0] if handles is None else handles
    axes.figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    axes.figure.savefig(file, dpi=150)


def _bracket_lines(axes: Any, held_out: dict[str, Any], *names: str) -> None:
    for name in names:
        style = {"color": _COLOURS[name], "label": _LABELS[name], "linestyle": "--", "linewidth": 1}
        axes.axhline(held_out[name]["kl"], **style)


def training_curve(lines: list[dict[str, Any]], held_out: dict[str, Any], objective: str, file: Path) -> None:
    """Training loss and held-out KL over the steps, between the brackets.

    The loss of another objective than KL has an axis of its own, on the right.
    """

    def series(name: str) -> tuple[list[int], list[float]]:
        known = [line for line in lines if name in line]
        return [line["step"] for line in known], [line[name] for line in known]

    axes = _axes(8.5, 4)
    loss_axes = axes if objective == "kl" else axes.twinx()
    loss_lines = loss_axes.plot(
        *series("loss"), color="#9fb8ad", linewidth=1, label="training loss of the batch"
    )
    if loss_axes is not axes:
        loss_axes.set_ylabel(f"{objective} (as minimised)")
        loss_axes.spines["top"].set_visible(False)
    axes.plot(
        *series("held_out_kl"), color=_COLOURS["prompt"], marker="o", markersize=4, label="held-out KL of σ"
    )
    _bracket_lines(axes, held_out, "no_context", "truncated_context", "full_context")
    axes.set(xlabel="step", ylabel="KL to the full context (nats/token)", title="Training")
    axes.set_ylim(bottom=-0.02)
    _save(axes, file, handles=list(dict.fromkeys([*loss_lines, *axes.get_lines()])))


def by_position(curves: dict[str, list[float]], file: Path) -> None:
    """Mean held-out KL at each answer position, for each bracket."""
    axes = _axes(8.5, 4)
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, color=_COLOURS[name], label=_LABELS[name], linewidth=1.5)
    axes.set(xlabel="position in the answer (token)", ylabel="KL to the full context (nats)")
    axes.set_title("Held-out KL by answer position")
    _save(axes, file)


def by_length(curve: dict[str, float], held_out: dict[str, Any], file: Path) -> None:
    """Held-out KL of the prompts that σ holds, over their length."""
    axes = _axes(8.5, 4)
    lengths = [int(length) for length in curve]
    axes.plot(lengths, list(curve.values()), color=_COLOURS["prompt"], marker="o", label=_LABELS["prompt"])
    _bracket_lines(axes, held_out, "no_context", "full_context")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, curve)
    axes.set(xlabel="slots", ylabel="KL to the full context (nats/token)", title="Held-out KL by length")
    axes.set_ylim(bottom=-0.02)
    _save(axes, file)


def by_query(queries: list[dict[str, Any]], file: Path) -> None:
    """KL of σ beside that without context, for each held-out query, the worst on top."""
    rows = sorted((q for q in queries if q["split"] == "held_out"), key=lambda q: q["kl"])[-30:]
    axes = _axes(9.5, 1.2 + 0.32 * len(rows))
    places = range(len(rows))
    axes.barh(places, [q["kl_no_context"] for q in rows], color="#e8c9c6", height=0.8, label="no context")
    axes.barh(places, [q["kl"] for q in rows], color=_COLOURS["prompt"], height=0.45, label=_LABELS["prompt"])
    labels = [" ".join(visible(q["query"]).split()) for q in rows]
    families, missing = _fonts("".join(labels))
    labels = [_label(label, missing) for label in labels]
    axes.set_yticks(list(places), labels, fontsize=8, fontfamily=families)
    axes.set(xlabel="KL to the full context (nats/token)", title="Held-out KL by query")
    _save(axes, file)


def _fonts(text: str) -> tuple[list[str], set[str]]:
    """Installed fonts that have a text's characters, and the characters that none has."""
    from matplotlib import font_manager, ft2font, get_data_path

    families, missing = ["DejaVu Sans"], set(text)

    def is_fit(font: font_manager.FontEntry) -> bool:
        """Whether it has letters: not for formulas alone (matplotlib's own), nor boxes for all there is."""
        last_resort = "lastresort" in font.name.replace(" ", "").lower()
        return font.style == "normal" and not (last_resort or font.fname.startswith(get_data_path()))

    files = {font_manager.findfont(font_manager.FontProperties(family=families)): families[0]}
    installed = sorted(font_manager.fontManager.ttflist, key=lambda f: (f.weight != 400, f.name, f.fname))
    files |= {font.fname: font.name for font in installed if is_fit(font)}
    for file, family in files.items():
        if not missing:
            break
        try:
            font = ft2font.FT2Font(file)
        except (OSError, RuntimeError):
            continue  # it was removed, or is damaged
        # Coloured pictures (emoji) can't be drawn at any size.
        there = missing.intersection(map(chr, font.get_charmap())) if font.scalable else set()
        if there and family not in families:
            families.append(family)
        missing -= there
    return families, missing


def _label(text: str, missing: Collection[str], width: int = 52) -> str:
    """A text shortened; characters that no font has are spelled out, where there would be boxes."""
    line = "".join(c.encode("ascii", "backslashreplace").decode() if c in missing else c for c in text)
    # A dollar sign would switch matplotlib to formulas.
    return (line if len(line) <= width else line[: width - 1] + "…").replace("$", r"\$")
