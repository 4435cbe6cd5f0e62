"""Continuous against static batches: 128 requests with answers of uneven length, 16 slots, SmolLM2.

python -m experiments.decoder_speed.generation [--dtype T] [--repeats N]
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tyro

import jaxsp
from jaxsp.artifact import environment
from jaxsp.models import decoder
from jaxsp.models.generation import Sampling, generate

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Run:
    """Measure, print, and write generation.json."""

    dtype: str = "bfloat16"
    requests: int = 128
    slots: int = 16
    repeats: int = 5
    out: Path = HERE


def measure(run: Run) -> dict:
    model = jaxsp.load_model(dtype=run.dtype, tokenizer=None)
    random = np.random.RandomState(0)
    # Many short answers and a few long ones, as questions about a document have.
    lengths = np.clip(4 + random.exponential(12, run.requests), 4, 64).astype(int)
    requests = [random.randint(0, 40_000, random.randint(8, 24)).tolist() for _ in lengths]
    samplings = [Sampling(max_tokens=int(length)) for length in lengths]
    context = decoder.embed(model.params, model.config, jnp.arange(320)[None])
    prefix = decoder.prefill(model.params, model.config, context)

    def answers(some: slice) -> list[list[int]]:
        return generate(model.params, model.config, prefix, requests[some], samplings[some], slots=run.slots)

    def static() -> list[list[int]]:
        starts = range(0, run.requests, run.slots)
        return [answer for i in starts for answer in answers(slice(i, i + run.slots))]

    forms: dict[str, Callable] = {"continuous": lambda: answers(slice(None)), "static": static}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    tokens = {}
    for _ in range(run.repeats + 1):  # the first compiles
        for name, form in forms.items():
            started = time.perf_counter()
            tokens[name] = form()
            seconds[name].append(time.perf_counter() - started)
    pairs = zip(seconds["static"][1:], seconds["continuous"][1:], strict=True)
    same = sum(a == b for a, b in zip(tokens["static"], tokens["continuous"], strict=True))
    return {
        "model": model.name,
        "dtype": run.dtype,
        "requests": run.requests,
        "slots": run.slots,
        "tokens": {"mean": float(lengths.mean()), "longest": int(lengths.max())},
        "seconds": {name: statistics.median(times[1:]) for name, times in seconds.items()},
        "ratio": statistics.median(a / b for a, b in pairs),
        "same_answers": same,
        "environment": environment(),
    }


def main() -> None:
    run = tyro.cli(Run)
    result = measure(run)
    file = run.out / "generation.json"
    file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(
        f"Static {result['seconds']['static']:.1f} s, continuous"
        f" {result['seconds']['continuous']:.1f} s: {result['ratio']:.2f} times as fast;"
        f" {result['same_answers']} of {run.requests} answers the same.\nWritten: {file}"
    )


if __name__ == "__main__":
    main()
