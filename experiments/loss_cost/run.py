"""Memory and time of the KL loss's value and gradient: fused against materialised logits.

python -m experiments.loss_cost.run [--positions N ...] [--vocabularies V ...] [--dtypes T ...]
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from jaxsp import losses
from jaxsp.artifact import environment

HERE = Path(__file__).parent
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Run:
    """Measure, write results.json and cost.png, and print the table of README.md."""

    positions: tuple[int, ...] = (512, 2048, 8192)
    """N, answer positions in a batch."""
    vocabularies: tuple[int, ...] = (49152, 151936, 262144)
    """V: those of SmolLM2, Qwen and Gemma 3."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Dtype of hidden states and head."""
    width: int = 576
    """D."""
    repeats: int = 5
    """Runs of each, in turns; fewer (but one) where they would take more than a minute."""
    out: Path = HERE
    """Where the results go."""


def materialised(student, teacher, head):
    """The loss as one would write it: both sides' logits as whole arrays."""
    precision = "highest" if head.dtype == jnp.float32 else None
    teacher_logits, student_logits = (
        jnp.einsum("nd,vd->nv", hidden, head, precision=precision, preferred_element_type=jnp.float32)
        for hidden in (teacher, student)
    )
    return losses.masked_mean(losses.kl_divergence(teacher_logits, student_logits))


def fused(student, teacher, head):
    return losses.masked_mean(losses.fused_kl_divergence(teacher, student, head))


def measure(positions: int, vocabulary: int, dtype: str, run: Run) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    student, teacher, head = (
        (scale * jax.random.normal(key, (rows, run.width))).astype(dtype)
        for key, rows, scale in zip(keys, (positions, positions, vocabulary), (1, 1, 0.1), strict=True)
    )
    row: dict[str, Any] = {"positions": positions, "vocabulary": vocabulary, "dtype": dtype}
    calls: dict[str, Callable[[], Any]] = {}
    for form in (materialised, fused):
        program = jax.jit(jax.value_and_grad(form)).lower(student, teacher, head).compile()
        memory = program.memory_analysis().temp_size_in_bytes
        row[form.__name__] = {"temp_mib": round(memory / MIB, 1), "seconds": None}
        if memory < 0.6 * _memory():
            calls[form.__name__] = lambda program=program: program(student, teacher, head)
    if importlib.util.find_spec("torch") is not None:
        from experiments.loss_cost import torch_chunked

        calls["torch_chunked"] = torch_chunked.prepared(student, teacher, head)
        row["torch_chunked"] = {"seconds": None}
    times: dict[str, list[float]] = {name: [] for name in calls}
    values = {}
    for repeat in range(run.repeats + 1):  # the first warms up
        for name, call in calls.items():
            started = time.perf_counter()
            values[name] = jax.block_until_ready(call())
            times[name].append(time.perf_counter() - started)
        if repeat and sum(map(sum, times.values())) > 60:
            break
    for name, seconds in times.items():
        row[name]["seconds"] = round(statistics.median(seconds[1:]), 4)
        row[name]["runs"] = len(seconds) - 1
        _agree(values[name], values["fused"], dtype)
    return row


def _memory() -> float:
    """Bytes that arrays may take: the accelerator's, or the machine's."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _agree(ours: Any, theirs: Any, dtype: str) -> None:
    """All forms compute the same thing, or the comparison means nothing."""
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    (value, gradient), (value_2, gradient_2) = ours, theirs
    assert abs(float(value) - float(value_2)) < tolerance * abs(float(value_2))
    gradient, gradient_2 = (jnp.asarray(g, jnp.float32) for g in (gradient, gradient_2))
    difference = jnp.linalg.norm(gradient - gradient_2)
    assert difference < tolerance * jnp.linalg.norm(gradient_2)


def table(rows: list[dict[str, Any]]) -> str:
    def seconds(row: dict[str, Any], form: str) -> str:
        value = row.get(form, {}).get("seconds")
        return "does not fit" if value is None else f"{value:.2f}"

    torch = any("torch_chunked" in row for row in rows)
    names = ["N", "V", "dtype", "memory: materialised", "fused", "ratio", "time: materialised", "fused"]
    names += ["torch, chunked"] if torch else []
    lines = ["| " + " | ".join(names) + " |", "|" + "---:|" * len(names)]
    for row in rows:
        whole, ours = row["materialised"]["temp_mib"], row["fused"]["temp_mib"]
        cells = [
            f"{row['positions']:,}", f"{row['vocabulary']:,}", row["dtype"],
            f"{whole:,.0f} MiB", f"{ours:,.0f} MiB", f"{ours / whole:.1%}",
            seconds(row, "materialised"), seconds(row, "fused"),
        ]  # fmt: skip
        cells += [seconds(row, "torch_chunked")] if torch else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2), ("temp_mib", "seconds"), ("temporary memory (MiB)", "time (s)"), strict=True
    ):  # fmt: skip
        dtype = rows[0]["dtype"]
        vocabularies = sorted({row["vocabulary"] for row in rows})
        for vocabulary, colour in zip(vocabularies, itertools.cycle(["#0b7a75", "#d98e04", "#b3261e"])):
            for form, style in (("materialised", "--"), ("fused", "-")):
                points = [
                    (row["positions"], row[form][key]) for row in rows
                    if (row["vocabulary"], row["dtype"]) == (vocabulary, dtype) and row[form][key]
                ]  # fmt: skip
                axes.plot(
                    *zip(*points, strict=True), style, color=colour, marker="o", markersize=4,
                    label=f"{form}, V = {vocabulary // 1000}k",
                )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="positions", title=f"{title}, {dtype}")
        axes.set_xticks(sorted({row["positions"] for row in rows}), minor=False)
        axes.set_xticklabels(sorted({row["positions"] for row in rows}))
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def main(run: Run) -> None:
    rows = []
    for dtype, vocabulary, positions in itertools.product(run.dtypes, run.vocabularies, run.positions):
        rows.append(measure(positions, vocabulary, dtype, run))
        print(json.dumps(rows[-1]), flush=True)
    run.out.mkdir(parents=True, exist_ok=True)
    results = {"width": run.width, "environment": environment(), "rows": rows}
    (run.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(rows, run.out / "cost.png")
    print(table(rows))
    print(f"Results: {run.out}")


if __name__ == "__main__":
    main(tyro.cli(Run))
