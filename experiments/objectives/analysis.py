"""The reports of many prompts together: the table, and the length to which answers stay true."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.suite import markdown as markdown_table, spread
from jaxsp.evaluation.metrics import interval, rouge_l

Context = dict[str, list[dict[str, Any]]]
"""The reports of a context, by objective: one a seed."""

REPORT = "report.json"
MEASURED_BY = (
    "kl",
    "reverse_kl",
    "js",
    "topk_kl",
    "nll",
    "mixture",
    "cosine_similarity",
    "zero_one",
    "sequence_mismatch",
    "rouge_l",
    "entropy_shift",
    "rank_agreement",
)
LARGER_IS_BETTER = ("cosine_similarity", "rouge_l", "rank_agreement")
REFERENCES = ("full_context", "initial", "no_context")
LONGEST = 20
BINS = ((1, 5), (6, 10), (11, 20), (21, 1000))
"""Words of the teacher's answer."""

ENOUGH = 6
"""Contexts from which a difference is marked: of fewer, all may well lie on one side by chance."""


def finished(
    out: Path, wanted: Iterable[Mapping[tuple[str, int], Mapping[str, Any]]]
) -> tuple[list[Context], list[str]]:
    """The contexts of which every prompt is finished, and the ids of prompts that failed."""
    contexts, failed = [], []
    for jobs in wanted:
        folders = {key: out / job["id"] for key, job in jobs.items()}
        if not all((folder / REPORT).is_file() for folder in folders.values()):
            continue
        context: Context = {}
        for (objective, _), folder in folders.items():
            report = json.loads((folder / REPORT).read_text("utf-8"))
            lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
            kl = [line["held_out_kl"] for line in lines if "held_out_kl" in line]
            report["no_better_than_start"] = kl[-1] >= kl[0]
            context.setdefault(objective, []).append(report)
        errors = [r["id"] for reports in context.values() for r in reports if r["error"]]
        failed += errors
        contexts += [] if errors else [context]
    return contexts, failed


def values(report: Mapping[str, Any], bracket: str = "prompt") -> dict[str, float]:
    """The measurements of a prompt, on held-out questions."""
    brackets = report["held_out"]["brackets"]
    ours = brackets[bracket]
    return {
        **ours,
        "mixture": (ours["kl"] + ours["nll"]) / 2,
        "entropy_shift": ours["entropy"] - brackets["full_context"]["entropy"],
    }


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case, as ROUGE-L reads them."""
    return re.findall(r"\w+", text.lower())


def agreement(queries: Iterable[Mapping[str, str]], n: int, ours: str) -> tuple[int, int]:
    """Answers whose first n words are the teacher's, of its answers that have as many."""
    pairs = [(words(q["answer_full_context"]), words(q[ours])) for q in queries]
    same = [theirs[:n] == mine[:n] for theirs, mine in pairs if len(theirs) >= n]
    return sum(same), len(same)


def rouge(queries: Iterable[Mapping[str, str]], lengths: tuple[int, int], ours: str) -> tuple[float, int]:
    """ROUGE-L, summed over the teacher's answers of so many words, and how many there are."""
    low, high = lengths
    scores = [
        rouge_l(q["answer_full_context"], q[ours])
        for q in queries
        if low <= len(words(q["answer_full_context"])) <= high
    ]
    return sum(scores), len(scores)


def summary(contexts: Sequence[Context], objectives: Sequence[str]) -> dict[str, Any]:
    """The numbers of the experiment; all intervals are over contexts, seeds averaged first."""
    reports = [r for context in contexts for some in context.values() for r in some]
    first = objectives[0]
    return {
        "contexts": len(contexts),
        "prompts": len(reports),
        "held_out_questions": sum(c[first][0]["held_out"]["queries"] for c in contexts),
        "seconds": sum(report["seconds"]["total"] for report in reports),
        "no_better_than_start": {
            objective: sum(r["no_better_than_start"] for context in contexts for r in context[objective])
            for objective in objectives
        },
        "rows": [
            {"trained_on": name, "metrics": _row(contexts, name, "prompt", first)}
            | {"long_answers": _long_answers(contexts, name, "answer_prompt")}
            for name in objectives
        ]
        + [
            {"trained_on": name, "metrics": _row(contexts, first, name, first)}
            | (
                {"long_answers": _long_answers(contexts, first, f"answer_{name}")}
                if name == "no_context"
                else {}
            )
            for name in REFERENCES
        ],
    }


def _long_answers(contexts: Sequence[Context], objective: str, ours: str) -> dict[str, list[dict[str, Any]]]:
    """By the first words of an answer, and by its length."""
    agreed = ((n, _over(contexts, objective, agreement, n, ours)) for n in range(1, LONGEST + 1))
    scores = ((bounds, _over(contexts, objective, rouge, bounds, ours)) for bounds in BINS)
    return {
        "agreement": [{"words": n, **found} for n, found in agreed if found],
        "rouge_l": [{"from": low, "to": high, **found} for (low, high), found in scores if found],
    }


def _row(contexts: Sequence[Context], objective: str, bracket: str, first: str) -> dict[str, dict[str, Any]]:
    def each(objective: str, bracket: str, metric: str) -> np.ndarray:
        return np.array([np.mean([values(r, bracket)[metric] for r in c[objective]]) for c in contexts])

    row = {}
    for metric in MEASURED_BY:
        ours = each(objective, bracket, metric)
        beyond = interval(ours - each(first, "prompt", metric))  # paired: contexts differ a lot
        row[metric] = {**interval(ours), f"beyond_{first}": beyond}
    return row


def _over(
    contexts: Sequence[Context], objective: str, count: Callable[..., tuple[float, int]], size: Any, ours: str
) -> dict[str, float]:
    """A ratio over the held-out answers of all contexts; nothing if there are none."""
    pairs = [np.sum([count(_held_out(r), size, ours) for r in c[objective]], axis=0) for c in contexts]
    totals, counts = np.transpose(pairs)
    if not counts.any():
        return {}
    return {**interval(totals, counts), "answers": int(counts.sum())}


def _held_out(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [query for query in report["queries"] if query["split"] == "held_out"]


def copy_numbers(table: Path, to: Path) -> None:
    """The numeric columns of the runs' table, and what each row is."""
    import pyarrow
    from pyarrow import parquet

    read = parquet.read_table(table)
    numeric = [
        field.name
        for field in read.schema
        if pyarrow.types.is_floating(field.type) or pyarrow.types.is_integer(field.type)
    ]
    parquet.write_table(read.select(["id", "objective", *numeric]), to)


def markdown(found: Mapping[str, Any]) -> str:
    """The table, in two parts; what differs from the first row, contexts paired, has a star."""
    first, enough = found["rows"][0]["trained_on"], found["contexts"] >= ENOUGH

    def cell(name: str, at: Mapping[str, Any]) -> str:
        beyond = at[f"beyond_{first}"]
        differs = enough and name not in REFERENCES and beyond["low"] * beyond["high"] > 0
        rounded = {key: round(at[key], 3) + 0.0 for key in ("value", "low", "high")}  # no -0.000
        return spread(rounded).replace(" ", "\\* " if differs else " ", 1)

    def part(metrics: Sequence[str]) -> str:
        return markdown_table(
            ["trained on", *metrics],
            [
                [row["trained_on"], *(cell(row["trained_on"], row["metrics"][metric]) for metric in metrics)]
                for row in found["rows"]
            ],
        )

    kept = ", ".join(f"{name} {count}" for name, count in found["no_better_than_start"].items())
    last = f"Prompts with a held-out KL no lower than their start's: {kept}."
    return "\n\n".join([part(MEASURED_BY[:7]), part(MEASURED_BY[7:]), last])
