"""Questions that the model writes about a document, as `jaxsp compress` has them written: tokens a second."""

from __future__ import annotations

import statistics
from typing import Any

import jax

import jaxsp
from experiments.suite import in_turns
from jaxsp import demo
from jaxsp.study.seeds import SEEDS
from jaxsp.study.text import Document
from jaxsp.study.writing import completed
from jaxsp.teacher.problem import read_preamble

DTYPE, FEW = "bfloat16", 8


def measure(full: bool) -> dict[str, Any]:
    """All that the seeds begin about the demo's manual, written in one go; what compiles comes before."""
    model, (text, *_) = jaxsp.load_model(dtype=DTYPE), demo.read()
    document = Document.of(text, lambda text: len(model.encode_context(text)))
    begun = [
        draft
        for seed in SEEDS.values()
        for chunk in document.chunks
        for draft in seed.drafts(document, chunk)
        if draft.source
    ]
    begun = begun if full else begun[:FEW]
    preamble, key = read_preamble(model), jax.random.key(0)

    def write() -> int:
        tokens: list[int] = []
        completed(model, preamble, begun, text, key, tokens.append)
        return sum(tokens)

    seconds, tokens = in_turns({"write": write}, 3 if full else 1)
    return {
        "model": model.name,
        "dtype": DTYPE,
        "questions": len(begun),
        "tokens": tokens["write"],
        "seconds": statistics.median(seconds["write"]),
    }


def line(found: dict[str, Any]) -> str:
    """The results in a sentence."""
    return (
        f"{found['questions']} questions about the demo's manual, {found['dtype']}: {found['tokens']:,}"
        f" tokens written in {found['seconds']:.1f} s, {found['tokens'] / found['seconds']:,.0f} tokens/s."
    )
