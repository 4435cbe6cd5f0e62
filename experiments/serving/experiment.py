"""Serving σ beside the whole document, its cache and Hugging Face; and what a fallback catches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.serving import fallback, speed
from experiments.suite import Experiment, Results, Run, markdown
from jaxsp.files import size

PARTS = {"speed": speed.measure, "fallback": fallback.measure}


def measure(setting: str, run: Run) -> dict[str, Any]:
    return PARTS[setting](run)


def table(results: Results) -> str:
    parts = []
    if found := results.get("speed"):
        parts += [_speed(found), _memory(found)]
    if (found := results.get("fallback")) and found["rows"]:
        parts.append(fallback.table(found))
    return "\n\n".join(parts) or "None yet."


def _speed(found: Mapping[str, Any]) -> str:
    users = list(dict.fromkeys(row["users"] for row in found["rows"]))
    head = ["side", "in front of a question", *(f"tokens/s, {n} at once" for n in users)]
    head += [f"first token (s), {n}" for n in users]
    by_form: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for row in found["rows"]:
        by_form.setdefault((row["side"], row["context"]), {})[row["users"]] = row
    lines = [
        [side, speed.CONTEXTS[context], *(f"{own[n]['tokens_per_second']:.1f}" for n in users)]
        + [f"{own[n]['first_token_seconds']:.2f}" for n in users]
        for (side, context), own in by_form.items()
    ]
    return markdown(head, lines, texts=2)


def _memory(found: Mapping[str, Any]) -> str:
    memory = {name: size(count) for name, count in found["prefix_bytes"].items()}
    return (
        f"{found['model']}, {found['dtype']}, answers of up to {found['max_tokens']} tokens, {found['slots']}"
        f" slots. Keys and values in memory: {memory['prompt']} for σ ({found['prompt_length']} slots),"
        f" {memory['full_context']} for the document's cache ({found['context_tokens']} tokens); σ's file has"
        f" {size(found['file_bytes'])}."
    )


def result(results: Results) -> str:
    parts = []
    if found := results.get("speed"):
        rows = {(row["side"], row["context"], row["users"]): row for row in found["rows"]}
        users = max(row["users"] for row in found["rows"])
        rates = (
            f"{words} {rows['jaxsp', context, users]['tokens_per_second']:.0f}"
            for context, words in speed.CONTEXTS.items()
        )
        parts.append(f"tokens/s of {users} at once: {', '.join(rates)}")
    if (found := results.get("fallback")) and found["rows"]:
        parts.append(fallback.result(found))
    return "; ".join(parts)


def draw(results: Results, folder: Path) -> None:
    if (found := results.get("fallback")) and found["rows"]:
        fallback.draw(found, folder)


EXPERIMENT = Experiment(
    question="What does a server gain by σ in speed, time to the first token and memory, beside the whole"
    " document, the document's cache and Hugging Face's generate; and how many of σ's wrong answers does a"
    " fallback to the document catch, at which cost?",
    cost="not known yet: speed has 4 turns of 16, 48 or 96 requests a row, fallback 2 to 5 minutes a"
    " document, on two cores; rows of torch need torch and transformers",
    run=measure,
    table=table,
    result=result,
    settings=tuple(PARTS),
    draw=draw,
    options="--torch-python PATH",
    missing="It has not been run yet.",
)
