"""Continuous against static batches: 128 requests with answers of uneven length, 16 slots, SmolLM2."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxsp
from experiments.suite import in_turns
from jaxsp.models import decoder
from jaxsp.models.generation import Sampling, generate

DTYPE, SLOTS = "bfloat16", 16


def measure(full: bool) -> dict[str, Any]:
    count, repeats = (128, 5) if full else (20, 1)
    model = jaxsp.load_model(dtype=DTYPE, tokenizer=None)
    random = np.random.RandomState(0)
    # Many short answers and a few long ones, as questions about a document have.
    lengths = np.clip(4 + random.exponential(12, count), 4, 64).astype(int)
    requests = [random.randint(0, 40_000, random.randint(8, 24)).tolist() for _ in lengths]
    samplings = [Sampling(max_tokens=int(length)) for length in lengths]
    context = decoder.embed(model.params, model.config, jnp.arange(320)[None])
    prefix = decoder.prefill(model.params, model.config, context)

    def answers(some: slice) -> list[list[int]]:
        return generate(model.params, model.config, prefix, requests[some], samplings[some], slots=SLOTS)

    def static() -> list[list[int]]:
        starts = range(0, count, SLOTS)
        return [answer for i in starts for answer in answers(slice(i, i + SLOTS))]

    forms: dict[str, Callable] = {"continuous": lambda: answers(slice(None)), "static": static}
    seconds, tokens = in_turns(forms, repeats)
    pairs = zip(seconds["static"], seconds["continuous"], strict=True)
    same = sum(a == b for a, b in zip(tokens["static"], tokens["continuous"], strict=True))
    return {
        "model": model.name,
        "dtype": DTYPE,
        "requests": count,
        "slots": SLOTS,
        "tokens": {"mean": float(lengths.mean()), "longest": int(lengths.max())},
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio": statistics.median(a / b for a, b in pairs),
        "same_answers": same,
    }


def line(found: dict[str, Any]) -> str:
    """The results in a sentence."""
    seconds = found["seconds"]
    return (
        f"{found['requests']} requests, {found['slots']} slots, {found['dtype']}: static batches"
        f" {seconds['static']:.1f} s, continuous batching {seconds['continuous']:.1f} s,"
        f" {found['ratio']:.2f} times as fast; {found['same_answers']} of {found['requests']} answers the"
        " same."
    )
