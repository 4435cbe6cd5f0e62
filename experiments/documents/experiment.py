"""Soft prompts for the manual of ``jaxsp demo`` and for four documents of 370 to 800 tokens."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jaxsp
from experiments.suite import DEMO, Experiment, Results, Run, markdown, own_document, spread
from jaxsp import demo

COMPRESSION = 20
DOCUMENTS = ("demo", "museum", "town", "shelter", "cabin")
BEFORE = "_embedding"
"""Ends the name of a setting that compresses its document with the defaults of version 0.1: input vectors,
and nothing asked but the given queries."""
KEPT = (
    "model",
    "dtype",
    "context_tokens",
    "prompt_length",
    "compression",
    "steps",
    "gap_closed",
    "gap_closed_vs_truncated",
    "held_out",
    "train",
    "seconds",
    "kind",
    "teacher",
)
"""The parts of a report that are kept."""


def measure(name: str, run: Run) -> dict[str, Any]:
    """Compresses a document as its user would: ``jaxsp demo``, or the default settings at 20×."""
    # The seconds are those of a first run: compilation and the teacher's answers included.
    os.environ["JAXSP_COMPILE_CACHE"] = os.environ["JAXSP_TEACHER_CACHE"] = "off"
    model = jaxsp.load_model()
    before, name = name.endswith(BEFORE), name.removesuffix(BEFORE)
    if name == "demo":
        options: dict[str, Any] = dict(DEMO)
        context, queries, held_out = demo.read()
    else:
        context, queries, held_out = own_document(name)
        tokens = len(model.encode_context(context))
        options = {"prompt_length": tokens // COMPRESSION}
    if before:
        options |= {"kind": "embedding", "study": "off"} | ({"steps": 60} if name == "demo" else {})
    if not run.full:
        options |= {"steps": 3, "max_answer_tokens": 8}
        queries, held_out = queries[:8], held_out[:3]
    with tempfile.TemporaryDirectory() as folder:
        result = jaxsp.compress(
            model, context, queries, held_out=held_out, out=folder, overwrite=True, **options
        )
        if name == "demo" and not before:
            shutil.copy(Path(folder, "plots", "training.png"), run.out)
    missed = result.report["verdict"]["missed"]
    return {key: result.report[key] for key in KEPT} | {"missed": len(missed), "missed_queries": missed}


def table(results: Results) -> str:
    head = ["document", "tokens → slots", "gap closed (95%)", "KL: σ / truncated / none"]
    head += ["decisive", "captured", "time"]
    rows = []
    for name, found in results.items():
        brackets, queries = found["held_out"]["brackets"], found["held_out"]["queries"]
        kl = (f"{brackets[name]['kl']:.3f}" for name in ("prompt", "truncated_context", "no_context"))
        rows.append([
            name.replace("_", " "), f"{found['context_tokens']} → {found['prompt_length']}",
            spread(found["gap_closed"]),
            " / ".join(kl), f"{brackets['prompt']['decisive_agreement']:.2f}",
            f"{queries - found['missed']} of {queries}",
            f"{found.get('wall_seconds', found['seconds']['total']):.0f} s",
        ])  # fmt: skip
    return markdown(head, rows)


def result(results: Results) -> str:
    gaps = (f"{name} {results[name]['gap_closed']['value']:.2f}" for name in DOCUMENTS)
    return "gap closed: " + ", ".join(gaps)


EXPERIMENT = Experiment(
    question="How much of the gap between no context and the full context does a soft prompt close,"
    " on the demo's manual and on documents that the library was not made on?",
    cost="2 to 5 minutes a document on two cores, 10 with the settings of version 0.1; under 3 GiB",
    run=measure,
    table=table,
    result=result,
    settings=(*DOCUMENTS, "demo" + BEFORE, "museum" + BEFORE),  # the two shortest: it takes long
)
