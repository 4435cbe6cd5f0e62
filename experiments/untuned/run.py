"""Compresses four documents of 370 to 800 tokens, 20 times, with the default settings.

python -m experiments.untuned.run [--only NAME ...] [--out FOLDER]
"""

from __future__ import annotations

import dataclasses
import json
import resource
import tempfile
from pathlib import Path

import tyro

import jaxsp
from jaxsp.data.documents import read_context, read_queries

HERE = Path(__file__).parent
COMPRESSION = 20


@dataclasses.dataclass(frozen=True)
class Run:
    """Compress the documents and write results.json."""

    only: tuple[str, ...] = ("museum", "town", "shelter", "cabin")
    """Which documents."""
    out: Path = HERE / "results.json"
    """Where the results go; those of other documents are kept."""
    steps: int = 500
    """Updates of each prompt."""


def main(run: Run) -> None:
    results = json.loads(run.out.read_text()) if run.out.is_file() else {}
    model = jaxsp.load_model()
    for name in run.only:
        context = read_context(HERE / name / "context.md")
        tokens = len(model.tokenizer.encode(context, add_special_tokens=False))
        with tempfile.TemporaryDirectory() as folder:
            report = jaxsp.compress(
                model,
                context,
                read_queries(HERE / name / "queries.txt"),
                held_out=read_queries(HERE / name / "held_out.txt"),
                prompt_length=tokens // COMPRESSION,
                steps=run.steps,
                out=folder,
                overwrite=True,
            ).report
        brackets = report["held_out"]["brackets"]
        results[name] = {
            **{
                key: report[key]
                for key in ("context_tokens", "prompt_length", "compression", "steps", "dtype")
            },
            **{key: report[key] for key in ("gap_closed", "gap_closed_vs_truncated")},
            "held_out_kl": {key: row["kl"] for key, row in brackets.items()},
            "held_out_rouge_l": {key: row["rouge_l"] for key, row in brackets.items()},
            "train_kl": report["train"]["brackets"]["prompt"]["kl"],
            "missed": len(report["verdict"]["missed"]),
            "held_out": report["held_out"]["queries"],
            "seconds": report["seconds"],
            "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "environment": report["environment"],
        }
        run.out.write_text(json.dumps(results, indent=2) + "\n")
        print(name, json.dumps(results[name]["gap_closed"]), flush=True)
    print(f"Results: {run.out}")


if __name__ == "__main__":
    main(tyro.cli(Run))
