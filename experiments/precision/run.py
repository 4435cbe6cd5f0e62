"""The demo in float32 and in bfloat16, on the same answers: loss curves, and the final held-out KL.

python -m experiments.precision.run [--seeds N ...] [--learning-rate R] [--out FOLDER]
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import statistics
from pathlib import Path
from typing import Any

import tyro

import jaxsp
from jaxsp.artifact import environment
from jaxsp.data.documents import Query, read_context, read_queries

HERE = Path(__file__).parent
DTYPES = ("float32", "bfloat16")
DEMO = {"batch_size": 4, "evaluate_every": 20, "max_answer_tokens": 32}
"""The settings of ``jaxsp demo``."""
DRAWN = ("step", "loss", "held_out_kl")


@dataclasses.dataclass(frozen=True)
class Run:
    """Compress the demo's manual in both dtypes, write rate_….json and .png, print the table."""

    seeds: tuple[int, ...] = tuple(range(8))
    """Each gives both dtypes the same start and the same order of queries."""
    learning_rate: float = 0.1
    """The demo's; higher, training amplifies rounding more."""
    steps: int = 60
    """Updates of each prompt."""
    model: str = "smollm2-135m-instruct"
    """The model to use."""
    out: Path = HERE
    """Where the results go."""


def measure(run: Run) -> list[dict[str, Any]]:
    """A row for each seed and dtype: its curve, and what its last prompt is worth."""
    demo = importlib.resources.files("jaxsp.demo")
    context = read_context(demo / "manual.md")
    queries, held_out = (read_queries(demo / f"{name}.txt") for name in ("questions", "held_out"))
    models = {dtype: jaxsp.load_model(run.model, dtype=dtype) for dtype in DTYPES}
    answers = float32_answers(models["float32"], context, queries, held_out)
    queries, held_out = (
        [{"query": q.text, "answer": answers[q.text]} for q in part] for part in (queries, held_out)
    )
    jobs = [
        {"id": f"seed-{seed}", "context": context, "queries": queries, "held_out": held_out, "seed": seed}
        for seed in run.seeds
    ]
    rows = []
    for dtype, model in models.items():
        for job, result in zip(
            jobs,
            jaxsp.compress_many(
                model, jobs, steps=run.steps, learning_rate=run.learning_rate, keep="last", **DEMO
            ),
            strict=True,
        ):
            brackets = result.report["held_out"]["brackets"]
            rows.append(
                {
                    "seed": job["seed"],
                    "dtype": dtype,
                    "kl": brackets["prompt"]["kl"],
                    "no_context": brackets["no_context"]["kl"],
                    "lines": [{key: line[key] for key in DRAWN if key in line} for line in result.lines],
                }
            )
    return rows


def float32_answers(
    model: jaxsp.LanguageModel, context: str, queries: list[Query], held_out: list[Query]
) -> dict[str, str]:
    """The model's answers with the context, by query: the ŷ of all runs."""
    report = jaxsp.compress(
        model, context, queries, held_out=held_out, steps=1, progress=False, **DEMO
    ).report
    return {query["query"]: query["answer_full_context"] for query in report["queries"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Held-out KL by seed, and how far bfloat16 ends from float32; the mean, with its standard error."""
    exact, rounded = ({row["seed"]: row["kl"] for row in rows if row["dtype"] == dtype} for dtype in DTYPES)
    differences = [rounded[seed] / kl - 1 for seed, kl in exact.items()]
    lines = ["| seed | float32 | bfloat16 | difference |", "|---:|---:|---:|---:|"]
    for (seed, kl), difference in zip(exact.items(), differences, strict=True):
        lines.append(f"| {seed} | {kl:.4f} | {rounded[seed]:.4f} | {difference:+.1%} |")
    means = [statistics.mean(kl.values()) for kl in (exact, rounded)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if differences[1:] else 0.0
    lines.append(
        f"| mean | {means[0]:.4f} | {means[1]:.4f} | {statistics.mean(differences):+.1%} ± {error:.1%} |"
    )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Training loss (thin) and held-out KL (dots), as each dtype's own model saw them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="KL, nats")
    for row in rows:
        colour = "#0b7a75" if row["dtype"] == "float32" else "#d98e04"
        for name, style in (("loss", {"linewidth": 0.7}), ("held_out_kl", {"marker": "o"})):
            points = [(line["step"], line[name]) for line in row["lines"] if name in line]
            labelled = name == "held_out_kl" and row["seed"] == rows[0]["seed"]
            label = row["dtype"] if labelled else None
            axes.plot(*zip(*points, strict=True), color=colour, label=label, alpha=0.7, **style)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(file, dpi=120)


def main(run: Run) -> None:
    rows = measure(run)
    result = {**dataclasses.asdict(run), "rows": rows, "environment": environment()}
    del result["out"]
    file = run.out / f"rate_{run.learning_rate:g}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    draw(rows, file.with_suffix(".png"))
    print(table(rows))
    print(f"Written: {file}, {file.with_suffix('.png')}")


if __name__ == "__main__":
    main(tyro.cli(Run))
