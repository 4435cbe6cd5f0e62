"""Speed of the decoder: prefill, decoding, the prompt's gradient; against the machine and against torch."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import Any

import jax

from experiments.decoder_speed import attention, generation, loading, questions
from experiments.decoder_speed.jobs import Torch, has_torch, matmul, our_jobs
from experiments.decoder_speed.workload import SHAPES, Shape, flops
from experiments.suite import Experiment, Results, Run, in_turns, markdown

DTYPES = ("bfloat16", "float32")
PARTS = {"attention": attention, "generation": generation, "loading": loading, "questions": questions}


def measure(setting: str, run: Run) -> dict[str, Any]:
    """A dtype's jobs, or one of ``PARTS``."""
    if setting in PARTS:
        return PARTS[setting].measure(run.full)
    name = "smollm2-135m" if jax.default_backend() == "cpu" else "llama-1b"
    shape, repeats = SHAPES[name], 7
    if not run.full:
        shape, repeats = dataclasses.replace(shape, layers=2, matmul=512), 1
    return measure_jobs(name, shape, setting, repeats, run.torch_python)


def measure_jobs(name: str, shape: Shape, dtype: str, repeats: int, torch_python: str) -> dict[str, Any]:
    jobs = our_jobs(shape, dtype)
    calls = {"matmul": matmul(dtype, shape.matmul), **jobs}
    torch = Torch(torch_python, name, dtype) if has_torch(torch_python) else None
    if torch:
        calls |= {f"torch {job}": functools.partial(torch.do, job) for job in jobs}
    seconds, _ = in_turns(calls, repeats)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rate = 2 * shape.matmul**3 / median["matmul"]
    rows = []
    for job in jobs:
        work, tokens = flops(shape, job)
        row = {
            "job": job,
            "tokens": tokens,
            "seconds": median[job],
            "tokens_per_second": tokens / median[job],
            "of_matmul_rate": work / median[job] / rate,
        }
        if torch:
            theirs = median[f"torch {job}"]
            row |= {"torch_seconds": theirs, "torch_of_matmul_rate": work / theirs / rate}
        rows.append(row)
    if torch:
        torch.close()
    return {
        "shape": name,
        "dtype": dtype,
        "matmul_gflops": rate / 1e9,
        "rows": rows,
        "workload": dataclasses.asdict(shape),
        "torch": torch.versions if torch else None,
    }


def table(results: Results) -> str:
    parts = [_jobs([results[dtype] for dtype in DTYPES if dtype in results])]
    if "attention" in results:
        parts.append(markdown(attention.HEAD, [attention.cells(row) for row in results["attention"]["rows"]]))
    sentences = (name for name in ("generation", "loading", "questions") if name in results)
    parts += [PARTS[name].line(results[name]) for name in sentences]
    return "\n\n".join(part for part in parts if part)


def _jobs(found: list[dict[str, Any]]) -> str:
    rows = []
    for record in found:
        for row in record["rows"]:
            theirs = row.get("torch_seconds")
            beside = (
                (f"{row['tokens'] / theirs:,.0f}", f"{theirs / row['seconds']:.2f}") if theirs else ("–", "–")
            )
            ours = f"{row['tokens_per_second']:,.0f}", f"{row['of_matmul_rate']:.2f}"
            rows.append([row["job"], record["shape"], record["dtype"], *ours, *beside])
    head = ["job", "shape", "dtype", "tokens/s", "of the matrix-product rate", "torch, tokens/s", "ratio"]
    return markdown(head, rows, texts=3) if rows else ""


def result(results: Results) -> str:
    found = ((dtype, results[dtype]["rows"][-1]) for dtype in DTYPES)
    rates = (
        f"{dtype} {row['tokens_per_second']:,.0f} tokens/s, {row['of_matmul_rate']:.2f} of the matrix-product"
        f" rate, {row['torch_seconds'] / row['seconds']:.1f}× torch"
        for dtype, row in found
    )
    return f"the prompt's gradient: {'; '.join(rates)}"


EXPERIMENT = Experiment(
    question="How many tokens a second do prefill, decoding and the prompt's gradient take, what part of the"
    " machine's own matrix-product rate is that, and how does Hugging Face's model in torch stand beside it?",
    cost="some minutes a setting on two cores; rows beside torch need torch and transformers",
    run=measure,
    table=table,
    result=result,
    settings=(*DTYPES, *PARTS),
    options="--torch-python PATH",
)
