"""Soft prompts for contexts that are no documents: a format, a classification by examples, a persona."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jaxsp
from experiments.suite import HERE, Experiment, Results, Run, markdown, spread
from jaxsp.data.documents import read_context, read_queries

KEPT = (
    "model",
    "dtype",
    "context_tokens",
    "prompt_length",
    "steps",
    "gap_closed",
    "seconds",
    "kind",
    "teacher",
)
"""The parts of a report that are kept."""
ANSWERED = {"full_context": "whole context", "prompt": "σ", "no_context": "none"}
STEPS, ANSWER_TOKENS = 60, 32


def is_order(answer: str) -> bool:
    """Whether an answer is one JSON object of the keys and types that the context asks for.

    Example:
      >>> is_order('{"item": "red mug", "count": 2, "urgent": false}'), is_order("Two red mugs.")
      (True, False)
    """
    try:
        found = json.loads(answer)
    except ValueError:
        return False
    types = {"item": str, "count": int, "urgent": bool}
    return isinstance(found, dict) and {key: type(value) for key, value in found.items()} == types


GROUPS = ("payment", "delivery", "repair", "account")
"""The groups of messages, in *tickets*."""

FORMATS: dict[str, Callable[[str], bool]] = {
    "json": is_order,
    "tickets": lambda answer: bool(re.fullmatch(rf"\W*({'|'.join(GROUPS)})\W*", answer.casefold())),
    "persona": lambda answer: answer.lstrip().startswith("Ahoy!"),
}
"""By setting, whether an answer keeps the format that the context asks for."""


def measure(name: str, run: Run) -> dict[str, Any]:
    """Compresses a context, and counts the held-out answers that keep its format and those that are right."""
    folder = HERE / "instructions" / name
    context = read_context(folder / "context.md")
    queries, held_out = (read_queries(folder / f"{part}.jsonl") for part in ("queries", "held_out"))
    steps = STEPS
    if not run.full:
        steps, queries, held_out = 2, queries[:8], held_out[:4]
    result = jaxsp.compress(
        "smollm2-135m-instruct", context, queries, held_out=held_out, study="off", steps=steps,
        max_answer_tokens=ANSWER_TOKENS if run.full else 8,
    )  # fmt: skip
    rows = [row for row in result.report["queries"] if row["split"] == "held_out"]
    found = {key: result.report[key] for key in KEPT}
    asked = {query.text: query for query in held_out}
    for condition in ANSWERED:
        answers = [(asked[row["query"]], row[f"answer_{condition}"]) for row in rows]
        found[condition] = {"format": sum(FORMATS[name](answer) for _, answer in answers) / len(answers)}
        if all(query.expect for query, _ in answers):
            right = [is_right(answer, query.expect) for query, answer in answers]
            found[condition]["right"] = sum(right) / len(right)
    return found | {"held_out_queries": len(rows)}


def is_right(answer: str, expect: Sequence[str]) -> bool:
    """Whether an answer has all that is expected; and of the groups of messages no other one.

    Example:
      >>> is_right("Group: Payment", ["payment"]), is_right("Payment, delivery or repair", ["payment"])
      (True, False)
    """
    from jaxsp.evaluation.facts import says

    others = [name for name in GROUPS if name not in expect] if {*expect} & {*GROUPS} else []
    return all(says(answer, fact) for fact in expect) and not any(says(answer, name) for name in others)


def table(results: Results) -> str:
    head = ["context", "tokens → slots", "gap closed (95%)", "held-out queries"]
    head += ["format kept: " + " / ".join(ANSWERED.values()), "right: " + " / ".join(ANSWERED.values())]
    rows = []
    for name, found in results.items():
        kept, right = (
            " / ".join(f"{found[c][what]:.0%}" if what in found[c] else "–" for c in ANSWERED)
            for what in ("format", "right")
        )
        rows.append([
            name, f"{found['context_tokens']} → {found['prompt_length']}", spread(found["gap_closed"]),
            str(found["held_out_queries"]), kept, right,
        ])  # fmt: skip
    return markdown(head, rows)


def result(results: Results) -> str:
    kept = (
        f"{n} {f['prompt']['format']:.0%} (whole context {f['full_context']['format']:.0%})"
        for n, f in results.items()
    )
    return "format kept by σ: " + ", ".join(kept)


EXPERIMENT = Experiment(
    question="Do contexts that are no documents go into a soft prompt, too: a format in JSON that every"
    " answer must keep, a classification by eight examples, a persona?",
    cost="5 to 7 minutes a context on two cores; under 2 GiB",
    run=measure,
    table=table,
    result=result,
    settings=("json", "tickets", "persona"),
)
