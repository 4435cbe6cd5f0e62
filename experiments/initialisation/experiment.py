"""Kinds of prompt × where they start × how long they are × how long they train, on ten documents."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments.initialisation.cell import Cell, Document, embedded
from experiments.suite import Run

TUNED_ON = ("demo", "narrativeqa--1")
"""Documents that learning rates were chosen on; they are not reported."""

REPORTED = ("town", "shelter", "cabin", *(f"narrativeqa-{i}" for i in range(7)))

VECTORS = ("first", "spread", "random_text", "vocabulary", "noise")
STARTS = {"embedding": VECTORS, "key_value": ("match", *VECTORS)}
LENGTHS = (16, 32, 64, 8, 4)
RATES = {"embedding": (0.1, 0.25, 0.5), "key_value": (0.01, 0.02, 0.04)}
BEST = {"embedding": "first", "key_value": "match"}
LEARNING_RATES = {"embedding": 0.25, "key_value": 0.02}
"""Chosen by the setting ``learning_rates``."""


def cells(setting: str) -> list[Cell]:
    """The prompts that a setting compares on every document."""
    if setting == "learning_rates":
        return [Cell(kind, BEST[kind], 16, 100, rate) for kind, rates in RATES.items() for rate in rates]
    if setting == "0_steps":
        return [
            Cell(kind, start, length, 0)
            for length in LENGTHS
            for kind, starts in STARTS.items()
            for start in starts
        ]
    steps = int(setting.removesuffix("_steps"))
    starts = {kind: (BEST[kind],) for kind in STARTS} if steps == 400 else STARTS
    lengths = (16,) if steps < 100 else (16, 32, 64)
    return [
        Cell(kind, start, length, steps, LEARNING_RATES[kind])
        for length in lengths
        for kind, names in starts.items()
        for start in (names if length == 16 else (BEST[kind],))
    ]


def measure(setting: str, run: Run) -> dict[str, Any]:
    """A row a cell and document; stopped at any moment, the same command goes on."""
    names, wanted = (TUNED_ON if setting == "learning_rates" else REPORTED), cells(setting)
    folder = Path("initialisation-out") if run.full else run.out
    if not run.full:
        names = ("demo",)
        wanted = [dataclasses.replace(cell, steps=min(cell.steps, 2)) for cell in wanted[:2]]
    folder.mkdir(parents=True, exist_ok=True)
    file, model = folder / f"{setting}.jsonl", embedded()
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []
    for name in names:
        done = [
            Cell(**{f.name: row[f.name] for f in dataclasses.fields(Cell)})
            for row in rows
            if row["document"] == name
        ]
        left = [cell for cell in wanted if cell not in done]
        document = Document(model, name, folder, small=not run.full) if left else None
        for cell in left:
            assert document is not None
            row = {"document": name, **document.measure(cell)}
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
            rows.append(row)
            print(f"{name}: {cell} closes {gap(row):.3f}", flush=True)
    return {"documents": list(names), "rows": rows}


def gap(row: dict[str, Any], part: str = "held_out") -> float:
    """The part of the gap between no context and the whole one that a prompt closes."""
    return 1 - row[f"{part}_kl"] / row[f"{part}_kl_no_context"]
