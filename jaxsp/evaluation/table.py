"""The results of many runs as one table (Parquet): a row a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsp.files import atomic_write


def row(report: dict[str, Any]) -> dict[str, Any]:
    """A report without its texts, flat: ``gap_closed``, ``prompt_kl``, ``no_context_kl``, ..."""
    flat = dict(report.get("settings", {}))
    flat |= {k: v for k, v in report.items() if isinstance(v, str | float | int | None)}
    if report.get("taught_by"):
        flat["taught_by"] = report["taught_by"]["name"]
    for name in ("gap_closed", "gap_closed_vs_truncated", "gap_closed_vs_first_part"):
        if name in report:
            gap = report[name]
            flat |= {name: gap["value"], f"{name}_low": gap["low"], f"{name}_high": gap["high"]}
    for name, metrics in report.get("held_out", {}).get("brackets", {}).items():
        flat |= {f"{name}_{metric}": value for metric, value in metrics.items()}
    return flat


def write(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Writes the table, whole or not at all; a row may lack columns that others have."""
    import pyarrow
    import pyarrow.parquet

    names = dict.fromkeys(name for row in rows for name in row)
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    atomic_write(file, sink.getvalue().to_pybytes())
