"""The notebook for Colab, run from top to bottom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.suite import Experiment, Results, Run, markdown

HERE = Path(__file__).parent
SMALL = "\nLENGTH, STEPS, MAX_ANSWER_TOKENS = 4, 3, 6\n"


def measure(_: str, run: Run) -> dict[str, Any]:
    """Runs every cell; what the cells print is the result."""
    import nbclient
    import nbformat

    notebook = nbformat.read(HERE / "jaxsp_on_colab_tpu.ipynb", as_version=nbformat.NO_CONVERT)
    cells = {cell.id: cell for cell in notebook.cells}
    cells["settings"].source += f"\nSOURCE = {str(HERE.parents[1])!r}\n" + SMALL * (not run.full)
    nbclient.execute(notebook, str(run.out), timeout=3600, kernel_name="python3")
    return {
        "cells": {
            name: printed
            for name, cell in cells.items()
            if (printed := "".join(out.get("text", "") for out in cell.get("outputs", [])))
        }
    }


def table(results: Results) -> str:
    if not results:
        return f"No results yet. {EXPERIMENT.missing}"
    shown = results["default"]["cells"].items()
    return markdown(
        ["cell", "printed"], [[name, "<br>".join(text.splitlines())] for name, text in shown], texts=2
    )


def result(results: Results) -> str:
    return results["default"]["cells"]["compress"].splitlines()[-1]


EXPERIMENT = Experiment(
    question="Does the notebook run from top to bottom on Colab's TPU, and how much of the gap does its"
    " σ close?",
    cost="not known; it needs Colab's TPU",
    run=measure,
    table=table,
    result=result,
    missing="On a TPU it has not been run. The tests run it on a CPU, with Colab's versions.",
)
