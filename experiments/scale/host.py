"""The host's work for each context, with a model so small that little else is left."""

from __future__ import annotations

import cProfile
import pstats
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxsp
from experiments import random_llama
from experiments.scale.arithmetic import ANSWER, CONTEXT, HELD_OUT, PACKING, QUERIES, QUERY, SETTINGS
from jaxsp.data.examples import Rows, make_rows
from jaxsp.runs.job import check_jobs

JOBS = 16


def job_rows(width: int) -> Rows:
    """Rows of the job's shape, with hidden states of zeros."""
    rows = make_rows([[1] * QUERY] * QUERIES, [[1] * ANSWER] * QUERIES)
    hidden = np.zeros((*rows.mask.shape, width), jnp.bfloat16)
    return rows.with_targets(hidden=hidden)


def packing(width: int) -> dict[str, Any]:
    """Seconds to draw and pack a prompt's batch, and the bytes of it that go to the chip."""
    rows, times = job_rows(width), []
    for cursor in range(
        0, SETTINGS.training.updates * SETTINGS.training.batch_size, SETTINGS.training.batch_size
    ):
        started = time.perf_counter()
        PACKING.pack(rows, PACKING.draw(rows.lengths, cursor, [0, 0]))
        times.append(time.perf_counter() - started)
    batch = PACKING.pack(rows, PACKING.draw(rows.lengths, 0, [0, 0]))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    return {"width": width, "seconds": statistics.median(times), "bytes": size}


def per_context() -> dict[str, float]:
    """Seconds of Python for a context of ``compress_many``, and the bytes written but for σ and the teacher.

    What waits for the device is taken off; what the profiler itself costs is not.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        directory = random_llama.write(folder / "tiny", max_position_embeddings=2048)
        model = jaxsp.load_model(directory, dtype="float32")
        options: dict[str, Any] = {
            "prompt_length": SETTINGS.prompt.prompt_length,
            "steps": SETTINGS.training.steps,
            "at_once": JOBS // 2,
            "study": "off",
        }
        options |= {"max_answer_tokens": ANSWER, "progress": False}
        list(jaxsp.compress_many(model, jobs(JOBS // 2), out=folder / "compiles", **options))
        profile = cProfile.Profile()
        profile.runcall(lambda: list(jaxsp.compress_many(model, jobs(), out=folder / "out", **options)))
        files = [file for file in (folder / "out" / "0").rglob("*") if file.is_file()]
        written = sum(file.stat().st_size for file in files if file.suffix != ".safetensors")
    found: Any = pstats.Stats(profile)
    waiting = sum(
        numbers[2] for (_, _, name), numbers in found.stats.items()
        if name == "_value" or "numpy.asarray" in name
    )  # fmt: skip
    return {
        "wall": found.total_tt / JOBS, "host": (found.total_tt - waiting) / JOBS, "bytes": written
    }  # fmt: skip


def encoding() -> dict[str, float]:
    """Seconds to encode and check a context with its queries once, by SmolLM2's tokenizer."""
    model = jaxsp.load_model("smollm2-135m-instruct")
    rows = [("", row) for row in jobs(characters=3 * CONTEXT)]
    check_jobs(model, rows, {})
    started = time.perf_counter()
    good, _ = check_jobs(model, rows, {})
    seconds = (time.perf_counter() - started) / JOBS
    return {"tokens": len(good[0].tokenized(model).context_ids), "seconds": seconds}


def jobs(count: int = JOBS, characters: int = CONTEXT) -> list[dict[str, Any]]:
    text = "The tank holds 1.2 litres. " * CONTEXT
    queries = [f"What about fact {i:2d}?" for i in range(QUERIES)]
    train, held_out = queries[HELD_OUT:], queries[:HELD_OUT]
    return [
        {"id": f"{i}", "context": f"{i:4d} {text}"[:characters], "queries": train, "held_out": held_out}
        for i in range(count)
    ]  # fmt: skip
