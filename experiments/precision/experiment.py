"""The demo in float32 and in bfloat16, on the same answers: loss curves, and the final held-out KL."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import jaxsp
from experiments.suite import Experiment, Results, Run, markdown
from jaxsp import demo
from jaxsp.data.documents import Query
from jaxsp.settings import Options

DTYPES = ("float32", "bfloat16")
MODEL = "smollm2-135m-instruct"
OPTIONS: Options = {
    "kind": "embedding", "batch_size": 4, "evaluate_every": 20, "max_answer_tokens": 32, "study": "off",
}  # fmt: skip
DRAWN = ("step", "loss", "held_out_kl")


def measure(setting: str, run: Run) -> dict[str, Any]:
    """A row for each seed and dtype: its curve, and what its last prompt is worth.

    A seed gives both dtypes the same start and the same order of queries.
    """
    seeds, steps = (range(8), 60) if run.full else (range(1), 3)
    rate = float(setting.removeprefix("rate_"))
    options: dict[str, Any] = {**OPTIONS, "learning_rate": rate, "steps": steps}
    context, queries, held_out = demo.read()
    models = {dtype: jaxsp.load_model(MODEL, dtype=dtype) for dtype in DTYPES}
    answers = float32_answers(models["float32"], context, queries, held_out)
    queries, held_out = (
        [{"query": q.text, "answer": answers[q.text]} for q in part] for part in (queries, held_out)
    )
    jobs = [
        {"id": f"seed-{seed}", "context": context, "queries": queries, "held_out": held_out, "seed": seed}
        for seed in seeds
    ]
    rows = []
    for dtype, model in models.items():
        for job, result in zip(jobs, jaxsp.compress_many(model, jobs, keep="last", **options), strict=True):
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
    return {
        "seeds": list(seeds), "learning_rate": rate, "steps": steps, "model": MODEL,
        "rows": rows,
    }  # fmt: skip


def float32_answers(
    model: jaxsp.LanguageModel, context: str, queries: list[Query], held_out: list[Query]
) -> dict[str, str]:
    """The model's answers with the context, by query: the ŷ of all runs."""
    report = jaxsp.compress(
        model, context, queries, held_out=held_out, progress=False, **{**OPTIONS, "steps": 1}
    ).report
    return {query["query"]: query["answer_full_context"] for query in report["queries"]}


def compared(rows: list[dict[str, Any]]) -> dict[int, tuple[float, float, float]]:
    """By seed: held-out KL in float32 and in bfloat16, and how far the latter ends from the former."""
    exact, rounded = ({row["seed"]: row["kl"] for row in rows if row["dtype"] == dtype} for dtype in DTYPES)
    return {seed: (kl, rounded[seed], rounded[seed] / kl - 1) for seed, kl in exact.items()}


def difference(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """The mean over seeds of how far bfloat16 ends from float32, and its standard error."""
    found = [row[2] for row in compared(rows).values()]
    error = statistics.stdev(found) / len(found) ** 0.5 if found[1:] else 0.0
    return statistics.mean(found), error


def table(results: Results) -> str:
    rates = [f"rate {found['learning_rate']:g}" for found in results.values()]
    head = ["seed", *(name for rate in rates for name in (f"{rate}: float32", "bfloat16", "difference"))]
    found = [compared(found["rows"]) for found in results.values()]
    lines = [[f"{seed}", *(cell for rate in found for cell in _cells(*rate[seed]))] for seed in found[0]]
    means = ["mean"]
    for rate, record in zip(found, results.values(), strict=True):
        exact, rounded, _ = map(statistics.mean, zip(*rate.values(), strict=True))
        mean, error = difference(record["rows"])
        means += [*_cells(exact, rounded, mean)[:2], f"{mean:+.1%} ± {error:.1%}"]
    return markdown(head, [*lines, means], texts=0)


def _cells(exact: float, rounded: float, difference: float) -> tuple[str, str, str]:
    return f"{exact:.4f}", f"{rounded:.4f}", f"{difference:+.1%}"


def result(results: Results) -> str:
    found = ((record["learning_rate"], *difference(record["rows"])) for record in results.values())
    rates = (f"{mean:+.1%} ± {error:.1%} at rate {rate:g}" for rate, mean, error in found)
    return f"held-out KL of bfloat16 against float32: {', '.join(rates)}"


def draw(results: Results, folder: Path) -> None:
    """Training loss (thin) and held-out KL (dots), as each dtype's own model saw them."""
    for setting, found in results.items():
        _draw(found["rows"], folder / f"{setting}.png")


def _draw(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="KL, nats")
    styles: dict[str, dict[str, Any]] = {"loss": {"linewidth": 0.7}, "held_out_kl": {"marker": "o"}}
    for row in rows:
        colour = "#0b7a75" if row["dtype"] == "float32" else "#d98e04"
        for name, style in styles.items():
            points = [(line["step"], line[name]) for line in row["lines"] if name in line]
            told = name == "held_out_kl" and row["seed"] == rows[0]["seed"]
            label = row["dtype"] if told else None
            axes.plot(*zip(*points, strict=True), color=colour, label=label, alpha=0.7, **style)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(file, dpi=120)


EXPERIMENT = Experiment(
    question="With weights and activations in bfloat16: do the curves follow those of float32, and does"
    " the final held-out KL end within 2% of it?",
    cost="10 to 40 minutes a learning rate on two cores, 3 GiB",
    run=measure,
    table=table,
    result=result,
    settings=("rate_0.1", "rate_0.5"),
    draw=draw,
    file="results.parquet",
)
