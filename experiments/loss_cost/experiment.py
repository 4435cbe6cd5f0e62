"""Memory and time of the KL loss's value and gradient: fused against materialised logits."""

from __future__ import annotations

import importlib.util
import itertools
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.suite import Experiment, Results, Run, in_turns, markdown
from jaxsp import losses

MIB = 2**20
POSITIONS = (512, 2048, 8192)
VOCABULARIES = (49152, 151936, 262144)
"""Those of SmolLM2, Qwen and Gemma 3."""
DTYPES = ("float32", "bfloat16")
WIDTH = 576
REPEATS, MOST = 5, 60
"""Runs of each, in turns; fewer (but one) where they would take more than so many seconds."""


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


def measure(_: str, run: Run) -> dict[str, Any]:
    sizes = (DTYPES, VOCABULARIES, POSITIONS) if run.full else (DTYPES[:1], VOCABULARIES[:1], POSITIONS[:1])
    rows = []
    for dtype, vocabulary, positions in itertools.product(*sizes):
        rows.append(measure_one(positions, vocabulary, dtype))
        print(rows[-1], flush=True)
    return {"width": WIDTH, "rows": rows}


def measure_one(
    positions: int, vocabulary: int, dtype: str, width: int = WIDTH, *, beside_torch: bool = True
) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    student, teacher, head = (
        (scale * jax.random.normal(key, (rows, width))).astype(dtype)
        for key, rows, scale in zip(keys, (positions, positions, vocabulary), (1, 1, 0.1), strict=True)
    )
    row: dict[str, Any] = {"positions": positions, "vocabulary": vocabulary, "dtype": dtype}
    calls: dict[str, Callable[[], Any]] = {}
    for form in (materialised, fused):
        program = jax.jit(jax.value_and_grad(form)).lower(student, teacher, head).compile()
        analysis: Any = program.memory_analysis()
        memory = analysis.temp_size_in_bytes
        row[form.__name__] = {"temp_mib": round(memory / MIB, 1), "seconds": None}
        if memory < 0.6 * _memory():
            calls[form.__name__] = lambda program=program: program(student, teacher, head)
    if beside_torch and importlib.util.find_spec("torch") is not None:
        from experiments.loss_cost import torch_chunked

        calls["torch_chunked"] = torch_chunked.prepared(student, teacher, head)
        row["torch_chunked"] = {"seconds": None}
    times, values = in_turns(calls, REPEATS, MOST)
    for name, seconds in times.items():
        row[name]["seconds"] = round(statistics.median(seconds), 4)
        row[name]["runs"] = len(seconds)
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


def table(results: Results) -> str:
    def seconds(row: dict[str, Any], form: str) -> str:
        value = row.get(form, {}).get("seconds")
        return "does not fit" if value is None else f"{value:.2f}"

    rows = results["default"]["rows"]
    torch = ["torch, chunked"] * any("torch_chunked" in row for row in rows)
    head = [
        "N",
        "V",
        "dtype",
        "memory: materialised",
        "fused",
        "ratio",
        "time: materialised",
        "fused",
        *torch,
    ]
    lines = []
    for row in rows:
        whole, ours = row["materialised"]["temp_mib"], row["fused"]["temp_mib"]
        lines.append([
            f"{row['positions']:,}", f"{row['vocabulary']:,}", row["dtype"],
            f"{whole:,.0f} MiB", f"{ours:,.0f} MiB", f"{ours / whole:.1%}",
            seconds(row, "materialised"), seconds(row, "fused"),
            *(seconds(row, "torch_chunked") for _ in torch),
        ])  # fmt: skip
    return markdown(head, lines, texts=0)


def result(results: Results) -> str:
    row = next(r for r in results["default"]["rows"] if (r["positions"], r["vocabulary"]) == (2048, 49152))
    forms = (
        f"{row[form]['seconds']:.2f} s in {row[form]['temp_mib']:,.0f} MiB {form}"
        for form in ("fused", "materialised")
    )
    return f"2,048 positions, 49,152 tokens, {row['dtype']}: {', '.join(forms)}"


def draw(results: Results, folder: Path) -> None:
    from matplotlib.figure import Figure

    rows = results["default"]["rows"]

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key, title in zip(
        panels, ("temp_mib", "seconds"), ("temporary memory (MiB)", "time (s)"), strict=True
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
    panels[-1].legend(frameon=False, fontsize=8)
    figure.savefig(folder / "cost.png", dpi=150)


EXPERIMENT = Experiment(
    question="How much memory and time do the KL divergence's value and gradient take when the logits of"
    " both sides are never materialised, and does the time suffer?",
    cost="a quarter of an hour on two cores, 16 GB at most",
    run=measure,
    table=table,
    result=result,
    draw=draw,
)
