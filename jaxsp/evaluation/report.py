"""The report: what was measured, and what it means for each query, as JSON, Markdown and plots."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from jaxsp.artifact import SoftPrompt
from jaxsp.evaluation.brackets import BRACKETS, TRAINED, Measured
from jaxsp.evaluation.metrics import ANSWER_METRICS, Answer, gap_closed
from jaxsp.files import atomic_write
from jaxsp.models.language_model import LanguageModel
from jaxsp.teacher.problem import Problem

NEGLIGIBLE = 0.05
"""A KL below this many nats a token is as good as none, whatever the brackets."""

CAPTURED = 0.75
"""A query counts as captured if σ closes at least this fraction of its gap to the full context ..."""

PEAK = 1.0
"""... and is nowhere in the answer further from it than this many nats: one wrong number is a wrong
answer, however well the words around it fit."""

GOOD = 0.8
"""Overall: the fraction of the gap from which σ is called a good stand-in."""


def summarise(
    model: LanguageModel, problem: Problem, measured: dict[str, Measured], seed: int
) -> dict[str, Any]:
    """The report's fields that come from the measurements.

    Args:
      model: whose tokenizer reads the answers.
      problem: the queries, and what the teacher said.
      measured: by bracket, all of ``BRACKETS`` (but for ``initial``, if the start isn't known), in any order.
      seed: seed of the bootstrap.

    Returns:
      The report's ``gap_closed``, ``gap_closed_vs_truncated``, ``held_out``, ``train`` (if any query is for
      training), ``queries`` and ``verdict``; ``by_position`` for the plot.
    """
    is_train, mask = problem.job.is_train, problem.rows.mask
    known = [name for name in BRACKETS if name in measured]
    counts = mask.sum(axis=1)
    positions = {name: measured[name].positions for name in known}
    held_out = np.flatnonzero(~is_train).tolist()
    answers = {
        name: dict(zip(held_out, [_answer(model, ids) for ids in measured[name].answers], strict=True))
        for name in known
    }
    kl = {name: at["kl"].sum(axis=1) for name, at in positions.items()}

    def part(split: np.ndarray, names: Iterable[str]) -> dict[str, Any]:
        brackets = {
            name: {m: float(v[split].sum() / counts[split].sum()) for m, v in positions[name].items()}
            for name in names
        }
        return {"queries": int(split.sum()), "brackets": brackets}

    def gap(bracket: str) -> dict[str, float]:
        ours, theirs = ((kl[name][~is_train], counts[~is_train]) for name in ("prompt", bracket))
        return gap_closed(ours, theirs, seed)

    report: dict[str, Any] = {
        "gap_closed": gap("no_context"),
        "gap_closed_vs_truncated": gap("truncated_context"),
        "held_out": part(~is_train, known),
    }
    for name, found in report["held_out"]["brackets"].items():
        pairs = [(answers["full_context"][i], answers[name][i]) for i in held_out]
        found |= {m: float(np.mean([f(*pair) for pair in pairs])) for m, f in ANSWER_METRICS.items()}
    if is_train.any():
        report["train"] = part(is_train, TRAINED)
    report["queries"] = [
        {
            "query": query.text,
            "split": "train" if is_train[i] else "held_out",
            "kl": float(kl["prompt"][i] / counts[i]),
            "kl_no_context": float(kl["no_context"][i] / counts[i]),
            "peak_kl": float(positions["prompt"]["kl"][i].max()),
            "answer_full_context": _answer(model, problem.answers[i]).text,
            **{f"answer_{name}": answers[name][i].text for name in TRAINED if not is_train[i]},
        }
        for i, query in enumerate(problem.job.queries)
    ]
    for query in report["queries"]:
        close = query["kl"] <= max(NEGLIGIBLE, (1 - CAPTURED) * query["kl_no_context"])
        query["captured"] = close and query["peak_kl"] <= PEAK
    report["verdict"] = _verdict(report)
    seen = np.maximum(mask[~is_train].sum(axis=0), 1)
    last = int(mask[~is_train].any(axis=0).sum())
    report["by_position"] = {
        name: (at["kl"][~is_train].sum(axis=0) / seen)[:last].tolist()
        for name, at in positions.items()
        if name != "initial"
    }
    return report


def report_header(model: LanguageModel, prompt: SoftPrompt) -> dict[str, Any]:
    """The report's first fields: what stands for what."""
    manifest, training = prompt.manifest, prompt.manifest["training"]
    return {
        "model": model.name,
        "dtype": model.config.dtype,
        "quantization": model.config.quantization,
        "context_tokens": manifest["context_tokens"],
        "prompt_length": prompt.prompt_length,
        "compression": manifest["context_tokens"] / prompt.prompt_length,
        "objective": training["objective"],
        "steps": training["steps"],
        "kept": training.get("keep", "best"),
    }


def write(report: dict[str, Any], lines: list[dict[str, Any]], directory: Path) -> None:
    """Writes plots and ``report.md`` into ``directory``."""
    from jaxsp.evaluation import plots

    folder, held_out = directory / "plots", report["held_out"]["brackets"]
    folder.mkdir(parents=True, exist_ok=True)
    plots.training_curve(lines, held_out, report["objective"], folder / "training.png")
    plots.by_position(report["by_position"], folder / "by_position.png")
    plots.by_query(report["queries"], folder / "by_query.png")
    atomic_write(directory / "report.md", markdown(report))


def as_json(value: Any) -> str:
    """JSON for files that people look at, too."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    # Markdown, not HTML: the users' texts stand in it as they are.
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"interval": _interval, "one_line": _one_line}
    source = importlib.resources.files("jaxsp.evaluation").joinpath("report.md.jinja").read_text("utf-8")
    return environment.from_string(source).render(report, bracket_names=BRACKETS)


def _verdict(report: dict[str, Any]) -> dict[str, Any]:
    held_out, train = ([q for q in report["queries"] if q["split"] == s] for s in ("held_out", "train"))
    missed = [q for q in held_out if not q["captured"]]
    gap, brackets = report["gap_closed"], report["held_out"]["brackets"]
    good = not missed and gap["value"] >= GOOD
    text = f"σ closes {_interval(gap)} of the gap between no context and the full context. "
    if good:
        text += f"It captured what the context contributes to all {len(held_out)} held-out queries."
    else:
        text += (
            f"It captured what the context contributes to {len(held_out) - len(missed)} of"
            f" {len(held_out)} held-out queries, and has not captured it for {len(missed)}."
        )
    if brackets["prompt"]["kl"] >= brackets["truncated_context"]["kl"]:
        text += " It is no better than the context cut to its length: don't use it."
    suggestions = []
    if not good:
        if train and np.mean([q["kl"] for q in held_out]) > 1.5 * np.mean([q["kl"] for q in train]):
            suggestions.append("add queries like those missed (--queries)")
        if sum(not q["captured"] for q in train) > len(train) / 10:
            suggestions.append("a longer prompt (--prompt-length)")
        suggestions.append("more steps (--steps)")
        text += f" What may help: {', '.join(suggestions)}."
    return {"text": text, "missed": [q["query"] for q in missed], "suggestions": suggestions}


def _interval(gap: dict[str, float]) -> str:
    return f"{gap['value']:.1%} (95% interval {gap['low']:.1%} to {gap['high']:.1%})"


def _answer(model: LanguageModel, ids: list[int]) -> Answer:
    tokenizer: Any = model.tokenizer  # there is one: it has encoded the queries
    return Answer(ids, tokenizer.decode(ids, skip_special_tokens=True).strip())


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(empty)"
