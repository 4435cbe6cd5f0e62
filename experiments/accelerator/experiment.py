"""Everything that a GPU or a TPU must show, in one command of some minutes that goes on where it stopped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

from experiments.accelerator import many, memory, parity, peft, speed
from experiments.accelerator.checks import FAILED, PASSED, card, made
from experiments.suite import HERE, Experiment, KeptRows, Results, Run, markdown
from jaxsp import compile_cache
from jaxsp.errors import UserError

GROUPS = {"parity": parity, "speed": speed, "many": many, "memory": memory, "peft": peft}
NAME = "accelerator"


def measure(setting: str, run: Run) -> dict[str, Any]:
    """The rows of a group of checks.

    Raises:
      UserError: it is a full run, and there is only a CPU.
    """
    # Some checks have torch beside jax, or a jax in another process: each takes the memory that it uses.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if run.full and jax.default_backend() == "cpu":
        raise UserError(
            "A full run of accelerator needs a GPU or a TPU, and jax finds only a CPU here; without --full it"
            " runs small shapes."
        )
    if run.full:
        compile_cache.enable()  # for the next try, after a stop
    else:  # nearly all of its time is compiling
        jax.config.update("jax_disable_most_optimizations", True)
    kept = KeptRows(NAME, setting, run, only=folder(run))
    return {"card": card(), "full": run.full, "rows": made(GROUPS[setting].checks(run), kept)}


def folder(run: Run) -> Path:
    """The folder in which rows are kept as they are measured."""
    committed = run.full and run.out.resolve() == (HERE / NAME).resolve()
    return Path(f"{NAME}-out") if committed else run.out


def table(results: Results) -> str:
    if not results:
        return f"No results yet. {EXPERIMENT.missing}"
    lines = [
        [row["check"], row["what"], *_cells(row), record["card"]]
        for record in results.values()
        for row in record["rows"]
    ]
    return markdown(["check", "what", "value", "goal", "", "device"], lines, texts=6)


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    value = f"{row['value']:,.4g} {row['unit']}" if "value" in row else "–"
    status = row["status"] if "value" in row else f"{row['status']}: {row['reason']}".replace("|", "/")
    return value, row["goal"] or "–", status


def result(results: Results) -> str:
    rows = [row for record in results.values() for row in record["rows"]]
    passed, failed = (sum(row["status"] == status for row in rows) for status in (PASSED, FAILED))
    left = len(rows) - sum("value" in row for row in rows)
    cards = ", ".join(dict.fromkeys(record["card"] for record in results.values()))
    shown = {row["check"]: row["value"] for row in rows if "value" in row}
    share = shown.get("prompt gradient")
    speed_of_it = "" if share is None else f"; the prompt's gradient at {share:.2f} of the card's own rate"
    return f"{cards}: {passed} of {passed + failed} goals met, {left} checks not run or in error{speed_of_it}"


EXPERIMENT = Experiment(
    question="Does jaxsp compute on a GPU or a TPU what it computes on a CPU, how fast is it there beside the"
    " card's own matrix products, torch and PEFT, and does it fit?",
    cost="9 minutes on one H100 at most (estimated); rows beside torch and PEFT need torch, transformers and"
    " peft, two rows SmolLM2",
    run=measure,
    table=table,
    result=result,
    settings=tuple(GROUPS),
    small=tuple(GROUPS),
    missing="No GPU or TPU was at hand: on one it has not been run.",
)
