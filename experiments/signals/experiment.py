"""Other signals than the usual: best tokens, another teacher, answers of the prompt itself, the disk."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import jaxsp
from experiments.signals import disk
from experiments.suite import DEMO, Experiment, KeptRows, Results, Run, markdown, own_document
from jaxsp import demo
from jaxsp.models.language_model import LanguageModel

USUAL = "as usual"
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "best_tokens": {USUAL: {}, "the best 64 tokens": {"objective": "topk_kl"}},
    "int8_student": {USUAL: {}, "taught in full precision": {"teacher": True}},
    "own_answers": {USUAL: {}, "half of the answers σ's own": {"on_policy": 0.5}},
}
"""By setting, what is compared: options of a compression; ``teacher`` is the model in full precision."""
DOCUMENTS = {"best_tokens": ("demo",), "int8_student": ("demo",), "own_answers": ("town", "shelter")}
COMPRESSION = 20
FIGURES = ("kl", "decisive_agreement", "sequence_mismatch", "rouge_l", "facts_right")


def measure(setting: str, run: Run) -> dict[str, Any]:
    """A row a document and variant; after Ctrl-C the same command goes on from those there are."""
    if setting == "from_disk":
        return disk.measure(run)
    quantization = "int8" if setting == "int8_student" else "none"
    kept, model = KeptRows("signals", setting, run), jaxsp.load_model(quantization=quantization)
    whole = jaxsp.load_model() if setting == "int8_student" else model
    with contextlib.suppress(KeyboardInterrupt):
        for name in DOCUMENTS[setting]:
            for variant, options in VARIANTS[setting].items():
                if any((row["document"], row["variant"]) == (name, variant) for row in kept.rows):
                    continue
                asked = {**options, "teacher": whole} if "teacher" in options else options
                kept.add({"document": name, "variant": variant, **compressed(model, name, run, asked)})
                print(f"{name}, {variant}: {kept.rows[-1]['gap_closed']:.3f}", flush=True)
    there = {(row["document"], row["variant"]): row for row in kept.rows}  # some committed and kept
    return {"model": model.name, "dtype": model.config.dtype, "rows": list(there.values())}


def compressed(model: LanguageModel, name: str, run: Run, changed: dict[str, Any]) -> dict[str, Any]:
    """Compresses a document with these options changed, and measures σ and the document's own reading."""
    if name == "demo":
        (context, queries, held_out), options = demo.read(), dict[str, Any](DEMO)
    else:
        context, queries, held_out = own_document(name)
        options = {"study": "off", "prompt_length": len(model.encode_context(context)) // COMPRESSION}
    if not run.full:
        options |= {"steps": 2, "max_answer_tokens": 8}
        queries, held_out = queries[:6], held_out[:2]
    with tempfile.TemporaryDirectory() as folder:
        result = jaxsp.compress(
            model, context, queries, held_out=held_out, out=Path(folder, "out"), progress=False,
            **options, **changed,
        )  # fmt: skip
        stored = sum(file.stat().st_size for file in Path(folder).rglob("run/teachers/*/*.bin"))
    report, seconds = result.report, [line["seconds"] for line in result.lines if "seconds" in line]
    brackets = report["held_out"]["brackets"]
    found: dict[str, Any] = {
        "context_tokens": report["context_tokens"], "prompt_length": report["prompt_length"],
        "steps": report["steps"], "gap_closed": report["gap_closed"]["value"],
        "captured": 1 - len(report["verdict"]["missed"]) / report["held_out"]["queries"],
        "seconds": report["seconds"]["total"], "step_seconds": statistics.median(seconds),
        "stored_bytes": stored,
    }  # fmt: skip
    for bracket in ("prompt", "full_context", "own_context"):
        own = brackets.get(bracket, {})
        found |= {f"{bracket}_{figure}": own[figure] for figure in FIGURES if figure in own}
    return found


def table(results: Results) -> str:
    head = ["document", "variant", "gap closed", "KL: σ / the student's own reading", "decisive", "captured"]
    head += ["the same answer", "right facts: σ / document", "a step (s)", "signals on disk"]
    lines = []
    for setting in VARIANTS:
        for row in results.get(setting, {}).get("rows", []):
            own, right = row.get("own_context_kl"), row.get("full_context_facts_right")
            lines.append([
                f"{row['document']}{', int8' if setting == 'int8_student' else ''}", row["variant"],
                f"{row['gap_closed']:.3f}",
                f"{row['prompt_kl']:.3f} / {'–' if own is None else f'{own:.3f}'}",
                f"{row['prompt_decisive_agreement']:.2f}", f"{row['captured']:.2f}",
                f"{1 - row['prompt_sequence_mismatch']:.2f}",
                "–" if right is None else f"{row['prompt_facts_right']:.2f} / {right:.2f}",
                f"{row['step_seconds']:.2f}", f"{row['stored_bytes'] / 2**20:.1f} MiB",
            ])  # fmt: skip
    parts = [markdown(head, lines, texts=2)] if lines else []
    if "from_disk" in results:
        parts.append(disk.table(results["from_disk"]))
    return "\n\n".join(parts) or "None yet."


def result(results: Results) -> str:
    parts = []
    for setting, variants in VARIANTS.items():
        for variant in variants:
            rows = [row for row in results.get(setting, {}).get("rows", []) if row["variant"] == variant]
            if rows:
                gap = np.mean([row["gap_closed"] for row in rows])
                parts.append(f"{setting.replace('_', ' ')}, {variant}: gap closed {gap:.3f}")
    if "from_disk" in results:
        parts.append(f"from disk {disk.speed(results['from_disk']['rows']):.0%} of the speed from memory")
    return "; ".join(parts) or "none yet"


EXPERIMENT = Experiment(
    question="Does a soft prompt learn as well from the teacher's best tokens as from its hidden states, an"
    " int8 student from a teacher in full precision, and from answers of its own; and are steps as fast when"
    " the signals come from the disk?",
    cost="about 4 minutes for best_tokens, 6 for int8_student, 20 for own_answers and 3 for from_disk, on two"
    " cores (estimated)",
    run=measure,
    table=table,
    result=result,
    settings=(*VARIANTS, "from_disk"),
    file="results.parquet",
    missing="Answers of σ's own have not been run yet.",
)
