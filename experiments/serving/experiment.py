"""Serving σ beside the whole document, its cache and Hugging Face; and what a fallback catches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.serving import fallback, speed
from experiments.suite import Experiment, Results, Run, markdown
from jaxsp.files import size

NEAR = 1.05
"""The factor within which two figures are alike, on a machine that does other work, too."""

PARTS = {"speed": speed.measure, "fallback": fallback.measure}


def measure(setting: str, run: Run) -> dict[str, Any]:
    return PARTS[setting](run)


def table(results: Results) -> str:
    parts = []
    if found := results.get("speed"):
        parts += [_speed(found), _best(found), _memory(found)]
    if (found := results.get("fallback")) and found["rows"]:
        parts.append(fallback.table(found))
    return "\n\n".join(parts) or "None yet."


def _users(found: Mapping[str, Any]) -> list[int]:
    return list(dict.fromkeys(row["users"] for row in found["rows"]))


def _speed(found: Mapping[str, Any]) -> str:
    users = _users(found)
    head = ["side", "in front of a question", *(f"tokens/s, {n} at once" for n in users)]
    head += [f"first token (s), {n}" for n in users]
    by_form: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for row in found["rows"]:
        by_form.setdefault((row["side"], row["context"]), {})[row["users"]] = row
    lines = [
        [side, speed.CONTEXTS[context], *(_rate(own[n]) for n in users)]
        + [f"{own[n]['first_token_seconds']:.2f}" for n in users]
        for (side, context), own in by_form.items()
    ]
    return markdown(head, lines, texts=2)


def _rate(row: Mapping[str, Any]) -> str:
    """The median of the turns, with the least and the most."""
    turns = row["tokens_per_second_of_turns"]
    return f"{row['tokens_per_second']:.1f} ({min(turns):.1f} to {max(turns):.1f})"


def _best(found: Mapping[str, Any]) -> str:
    """The best by the number of users, and σ beside the cached document."""
    head = ["at once", "most tokens/s", "first token soonest", "σ to cached: tokens/s", "first token"]
    lines = []
    for users in _users(found):
        own = [row for row in found["rows"] if row["users"] == users]
        sigma, cached = (_of(own, "jaxsp", context) for context in ("sigma", "cached"))
        lines.append(
            [str(users), _near(own, "tokens_per_second", max), _near(own, "first_token_seconds", min)]
            + [f"{sigma[key] / cached[key]:.2f}" for key in ("tokens_per_second", "first_token_seconds")]
        )
    return markdown(head, lines, texts=3) + f"\n\nNamed is each that is within {NEAR - 1:.0%} of the best."


def _of(rows: Sequence[Mapping[str, Any]], side: str, context: str) -> Mapping[str, Any]:
    return next(row for row in rows if (row["side"], row["context"]) == (side, context))


def _near(rows: Sequence[Mapping[str, Any]], key: str, best: Callable[[Iterable[float]], float]) -> str:
    top = best(row[key] for row in rows)
    near = [row for row in rows if max(row[key], top) <= NEAR * min(row[key], top)]
    return "; ".join(f"{row['side']}: {speed.CONTEXTS[row['context']]}" for row in near)


def _memory(found: Mapping[str, Any]) -> str:
    counts = found["prefix_bytes"]
    memory = {name: size(count) for name, count in counts.items()}
    return (
        f"{found['model']}, {found['dtype']}, answers of up to {found['max_tokens']} tokens, {found['slots']}"
        f" slots. Keys and values in memory: {memory['prompt']} for σ ({found['prompt_length']} slots),"
        f" {memory['full_context']} for the document's cache ({found['context_tokens']} tokens), as much as"
        f" for {counts['full_context'] / counts['prompt']:.0f} σ; σ's file has {size(found['file_bytes'])}."
    )


def result(results: Results) -> str:
    parts = []
    if found := results.get("speed"):
        users = max(_users(found))
        own = [row for row in found["rows"] if row["users"] == users]
        rates = (
            f"{words} {_of(own, 'jaxsp', context)['tokens_per_second']:.0f}"
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
    cost="about 10 minutes for speed (estimated) and 3 a document for fallback, on two cores; rows of torch"
    " need torch and transformers",
    run=measure,
    table=table,
    result=result,
    settings=tuple(PARTS),
    draw=draw,
    options="--torch-python PATH",
    missing="Speed has not been run yet.",
)
