"""The sentences of a report: how good the teacher is, what σ closes and loses, and what may help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsp.evaluation.facts import stands_in
from jaxsp.files import size
from jaxsp.teacher.another import Teacher

GOOD = 0.8
"""Overall: the fraction of the gap from which σ is called a good stand-in."""

LEARNT = 0.9
"""Part of the training queries' decisive tokens that a prompt long enough gets right."""

WEAK = 0.7
"""A teacher whose answers are right less often than this is advised against."""

MANY_CUT = 0.2
"""Part of the teacher's answers that are cut at their greatest length, from which the verdict says so."""

LARGER = 3
"""The next larger model of a family has about so many times the weights."""


def on_teacher(
    report: Mapping[str, Any], read: Mapping[str, str], teacher: Teacher | None, cost: str
) -> dict[str, Any]:
    """The teacher's own answers, by which σ is judged: those right, and those that stand in what it read.

    Args:
      report: with its ``queries``, and ``parts`` if there are any.
      read: the text that the teacher read for each query.
      teacher: the teacher, if it is another model.
      cost: what a larger model would take, a sentence: ``cost_of_larger``.

    Returns:
      ``text``, and whether the teacher is ``weak``.
    """
    held_out = [q for q in report["queries"] if q["split"] == "held_out"]
    checked = {"right": [q["right"] for q in held_out if q["right"] is not None]}
    standing = [stands_in(q["answer_full_context"], read[q["query"]], q["query"]) for q in held_out]
    checked["standing"] = [there for there in standing if there is not None]
    words = {"right": "are right", "standing": "with figures or names have only those of the document"}
    parts = [
        f"{sum(found)} of {len(found)} held-out answers {words[n]}" for n, found in checked.items() if found
    ]
    shares = [sum(found) / len(found) for found in checked.values() if found]
    weak = bool(shares) and shares[0] < WEAK
    before = "one part of the context for each query" if report.get("parts") else "the whole context"
    who = "The model itself" if teacher is None else f"The teacher, {teacher.model.name}"
    text = f"{who}, with {before}: {'; '.join(parts)}." if parts else ""
    if weak and teacher is None:
        text += f" σ can be no better: take a larger model. {cost}"
    elif weak:
        text += " σ learns from these: take a better teacher (--teacher)."
    return {"text": text, "weak": weak}


def cost_of_larger(weights: int, context_tokens: int, prompt_length: int) -> str:
    """The cost of the next larger model, and the command that says that of any.

    Args:
      weights: bytes of this one's weights.
      context_tokens: tokens of the context.
      prompt_length: K.

    Example:
      >>> cost_of_larger(2**28, 354, 16)  # doctest: +NORMALIZE_WHITESPACE
      'One of 3 times the weights takes about 768.0 MiB for them and 3 times as long; `jaxsp plan MODEL
      --context-tokens 354 --prompt-length 16` says it beforehand.'
    """
    return (
        f"One of {LARGER} times the weights takes about {size(LARGER * weights)} for them and {LARGER} times"
        f" as long; `jaxsp plan MODEL --context-tokens {context_tokens} --prompt-length {prompt_length}`"
        " says it beforehand."
    )


def verdict(report: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The verdict: what σ closes and loses, and what may help, the one that brings most first.

    Args:
      report: with all but the verdict.
      kind: kind of the prompt.

    Returns:
      ``text``, the queries ``missed``, and ``suggestions``.
    """
    held_out, train = ([q for q in report["queries"] if q["split"] == s] for s in ("held_out", "train"))
    missed = [q for q in held_out if not q["captured"]]
    gap, brackets = report["gap_closed"], report["held_out"]["brackets"]
    has_gap = gap["value"] is not None
    good = not missed and (not has_gap or gap["value"] >= GOOD)
    several = len(report.get("parts", {}).get("tokens", []))
    full = "one part of it, which the teacher reads for each query" if several else "the full context"
    text = f"σ closes {with_interval(gap)} of the gap between no context and {full}. "
    if not has_gap:
        text = (
            "No gap to close: to the held-out queries the model says the same without the context (KL"
            f" {brackets['no_context']['kl']:.2g}), so that they show nothing of σ. Ask what only the"
            " document answers. "
        )
    if not missed:
        text += f"Its answers to all {len(held_out)} held-out queries have what the context decides."
    else:
        text += (
            f"Its answers to {len(held_out) - len(missed)} of {len(held_out)} held-out queries have what the"
            f" context decides; {len(missed)} lose it, and such questions need"
            f" {'the part itself' if several else 'the whole document'}."
        )
        if wrong := sum(q.get("right") is False for q in missed):
            text += f" Wrong after the full context, too: {wrong} of these, where a better teacher helps."
    same = [q for q in held_out if q["captured"] and q.get("decisive_tokens") == 0 and q.get("right") is None]
    if has_gap and same:
        text += (
            f" For {len(same)} of the {len(held_out)} it decides nothing: the model says each token without"
            " it, too, and they show nothing of σ."
        )
    if has_gap and brackets["prompt"]["kl"] >= brackets["truncated_context"]["kl"]:
        text += " It is no better than the context cut to its length: don't use it."
    if has_gap and several and brackets["prompt"]["kl"] >= brackets["first_part"]["kl"]:
        text += " It is no better than the first part of the context alone."
    if several:
        text += (
            f" The teacher of each query read one of the context's {several} parts: what only several parts"
            " together answer is neither learnt nor measured."
        )
    if right := report.get("right"):
        text += (
            f" Of {right['known']} answers whose facts are known {right['full_context']} are right after the"
            f" full context, {right['prompt']} with σ and {right['no_context']} without context."
        )
    if all(q.get("seed") for q in held_out):
        text += " These are questions that the model itself wrote: measure on yours with --held-out."
    text += _on_cut_answers(report, len(held_out))
    suggestions = []  # the one that brings most first
    if not good:
        if kind == "embedding":
            suggestions.append("keys and values in every layer (--kind per_head)")
        comparable = train and "best_tokens" not in report["train"]  # else their KL are of different kinds
        if comparable and np.mean([q["kl"] for q in held_out]) > 1.5 * np.mean([q["kl"] for q in train]):
            suggestions.append("add queries like those missed (--queries)")
        if train and report["train"]["brackets"]["prompt"].get("decisive_agreement", 1.0) < LEARNT:
            suggestions.append("a longer prompt (--prompt-length)")
        suggestions.append("more steps (--steps)")
        text += f" What may help: {', '.join(suggestions)}."
    return {"text": text, "missed": [q["query"] for q in missed], "suggestions": suggestions}


def _on_cut_answers(report: Mapping[str, Any], held_out: int) -> str:
    """The verdict's sentence on them, where they are many of the teacher's."""
    if not (found := report.get("cut_answers")):
        return ""
    cut, of = found["train"] + found["held_out"]["full_context"], found["train_answers"] + held_out
    if cut < MANY_CUT * of:
        return ""
    return (
        f" {cut} of the teacher's {of} answers are cut at {found['max_answer_tokens']} tokens: what would"
        " follow is neither learnt nor measured; raise --max-answer-tokens."
    )


def gap_in_words(gap: Mapping[str, float | None]) -> str:
    """The part of a gap that is closed, in percent; or that there is none.

    Example:
      >>> gap_in_words({"value": 0.9412}), gap_in_words({"value": None})
      ('94.1%', 'no gap to close')
    """
    return "no gap to close" if gap["value"] is None else f"{gap['value']:.1%}"


def with_interval(gap: Mapping[str, float | None]) -> str:
    """The same with its interval, if there is one."""
    if gap["value"] is None:
        return gap_in_words(gap)
    if gap["low"] is None:
        return f"{gap_in_words(gap)} (no interval: one query)"
    return f"{gap_in_words(gap)} (95% interval {gap['low']:.1%} to {gap['high']:.1%})"
