"""The report: what was measured, and what it means for each query, as JSON, Markdown and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxsp.artifact import SoftPrompt
from jaxsp.evaluation.brackets import CONDITIONS, Measured
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

_COLUMNS = (
    "kl",
    "reverse_kl",
    "js",
    "nll",
    "zero_one",
    "rank_agreement",
    "confidence_shift",
    "sequence_mismatch",
    "rouge_l",
)
"""Of what is measured, what the report for people shows; ``report.json`` has it all."""


def summarise(
    model: LanguageModel, problem: Problem, measured: dict[str, Measured], seed: int
) -> dict[str, Any]:
    """What the report says of the measurements.

    Args:
      model: whose tokenizer reads the answers.
      problem: the queries, and what the teacher said.
      measured: by condition, all of ``CONDITIONS``.
      seed: of the bootstrap.

    Returns:
      The report's ``gap_closed``, ``gap_closed_vs_truncated``, ``held_out``, ``train`` (if any query is for
      training), ``queries`` and ``verdict``; ``by_position`` for the plot.
    """
    is_train, mask = problem.job.is_train, problem.rows.mask
    counts = mask.sum(axis=1)
    positions = {name: m.positions for name, m in measured.items()}
    answers = {name: [Answer(ids, _text(model, ids)) for ids in m.answers] for name, m in measured.items()}
    kl = {name: at["kl"].sum(axis=1) for name, at in positions.items()}

    def conditions(split: np.ndarray) -> dict[str, dict[str, float]]:
        chosen = np.flatnonzero(split)
        return {
            name: {
                **{m: float(v[split].sum() / counts[split].sum()) for m, v in at.items()},
                **{
                    m: float(np.mean([f(answers["full_context"][i], answers[name][i]) for i in chosen]))
                    for m, f in ANSWER_METRICS.items()
                },
            }
            for name, at in positions.items()
        }

    def gap(bracket: str) -> dict[str, float]:
        ours, theirs = ((kl[name][~is_train], counts[~is_train]) for name in ("prompt", bracket))
        return gap_closed(ours, theirs, seed)

    def part(split: np.ndarray) -> dict[str, Any]:
        return {"queries": int(split.sum()), "conditions": conditions(split)}

    report: dict[str, Any] = {
        "gap_closed": gap("no_context"),
        "gap_closed_vs_truncated": gap("truncated_context"),
        "held_out": part(~is_train),
    }
    if is_train.any():
        report["train"] = part(is_train)
    report["queries"] = [
        {
            "query": query.text,
            "split": "train" if is_train[i] else "held_out",
            "kl": float(kl["prompt"][i] / counts[i]),
            "kl_no_context": float(kl["no_context"][i] / counts[i]),
            "peak_kl": float(positions["prompt"]["kl"][i].max()),
            **{f"answer_{name}": answers[name][i].text for name in ("full_context", "prompt", "no_context")},
        }
        for i, query in enumerate(problem.job.queries)
    ]
    for query in report["queries"]:
        query["captured"] = _captured(query)
    report["verdict"] = _verdict(report)
    seen = np.maximum(mask[~is_train].sum(axis=0), 1)
    last = int(mask[~is_train].any(axis=0).sum())
    report["by_position"] = {
        name: (at["kl"][~is_train].sum(axis=0) / seen)[:last].tolist()
        for name, at in positions.items()
        if name != "initial"
    }
    return report


def header(model: LanguageModel, prompt: SoftPrompt) -> dict[str, Any]:
    """The report's first fields: what stands for what."""
    manifest, training = prompt.manifest, prompt.manifest["training"]
    return {
        "model": model.name,
        "dtype": model.config.dtype,
        "weights": model.config.weights,
        "context_tokens": manifest["context_tokens"],
        "prompt_length": prompt.length,
        "compression": manifest["context_tokens"] / prompt.length,
        "objective": training["objective"],
        "steps": training["steps"],
        "kept": training.get("keep", "best"),
    }


def write(report: dict[str, Any], lines: list[dict[str, Any]], directory: Path) -> None:
    """Writes plots, ``report.md`` and, last, ``report.json`` into ``directory``."""
    from jaxsp.evaluation import plots

    (directory / "plots").mkdir(parents=True, exist_ok=True)
    held_out = report["held_out"]["conditions"]
    plots.training_curve(lines, held_out, report["objective"], directory / "plots" / "training.png")
    plots.by_position(report["by_position"], directory / "plots" / "by_position.png")
    plots.by_query(report["queries"], directory / "plots" / "by_query.png")
    atomic_write(directory / "report.md", markdown(report))
    atomic_write(directory / "report.json", as_json(report))


def as_json(value: Any) -> str:
    """JSON for files that people look at, too."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    gap, truncated = report["gap_closed"], report["gap_closed_vs_truncated"]
    lines = [
        f"# {report['prompt_length']} vectors for {report['context_tokens']} tokens",
        "",
        report["verdict"]["text"],
        "",
        f"- model: {report['model']} ({report['dtype']}, {report['weights']} weights)",
        f"- compression: {report['compression']:.1f}×, objective: {report['objective']},"
        f" {report['steps']} steps",
        f"- gap closed on held-out queries: {_interval(gap)} (0: no context, 1: full context)",
        f"- the same against the truncated context: {_interval(truncated)}",
        "",
        "The σ kept is the one with the lowest held-out KL of those evaluated during training."
        if report["kept"] == "best"
        else "The σ kept is that of the last step.",
        "",
    ]
    for split, title in (("held_out", "Held-out"), ("train", "Training")):
        part = report[split]
        lines += [
            f"## {title} queries ({part['queries']})",
            "",
            "Per answer position: KL, reverse KL, JS and NLL in nats; 0/1: another first token;"
            " rank agreement (Kendall's τ) of the ten best tokens, 1 at best; confidence shift: how much"
            " surer of its first token, 0 at best. The last two compare free-running answers with"
            " the full context's.",
            "",
            "| condition | " + " | ".join(_COLUMNS) + " |",
            "|---|" + "---:|" * len(_COLUMNS),
            *(
                f"| {CONDITIONS[name]} | " + " | ".join(f"{row[m]:.3f}" for m in _COLUMNS) + " |"
                for name, row in part["conditions"].items()
            ),
            "",
        ]
    lines += ["![training](plots/training.png)", "", "![by position](plots/by_position.png)", ""]
    lines += ["![by query](plots/by_query.png)", "", "## The worst held-out queries", ""]
    held_out = [q for q in report["queries"] if q["split"] == "held_out"]
    for query in sorted(held_out, key=lambda q: -q["kl"])[:5]:
        state = "captured" if query["captured"] else "**not captured**"
        lines += [
            f"### {query['query']}",
            "",
            f"KL {query['kl']:.3f}, at its worst token {query['peak_kl']:.3f}; no context"
            f" {query['kl_no_context']:.3f}: {state}.",
            "",
            f"- full context: {_one_line(query['answer_full_context'])}",
            f"- σ: {_one_line(query['answer_prompt'])}",
            f"- no context: {_one_line(query['answer_no_context'])}",
            "",
        ]
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in report["seconds"].items())
    lines += [f"Seconds: {seconds}.", ""]
    return "\n".join(lines)


def _verdict(report: dict[str, Any]) -> dict[str, Any]:
    held_out = [q for q in report["queries"] if q["split"] == "held_out"]
    train = [q for q in report["queries"] if q["split"] == "train"]
    missed = [q for q in held_out if not q["captured"]]
    gap = report["gap_closed"]
    conditions = report["held_out"]["conditions"]
    truncated = conditions["truncated_context"]
    text = f"σ closes {_interval(gap)} of the gap between no context and the full context. "
    if not missed and gap["value"] >= GOOD:
        text += f"It captured what the context contributes to all {len(held_out)} held-out queries."
    else:
        text += (
            f"It captured what the context contributes to {len(held_out) - len(missed)} of"
            f" {len(held_out)} held-out queries, and has not captured it for {len(missed)}."
        )
    suggestions = []
    if conditions["prompt"]["kl"] >= truncated["kl"]:
        text += " It is no better than the context cut to its length: don't use it."
    if missed or gap["value"] < GOOD:
        trained = np.mean([q["kl"] for q in train]) if train else 0.0
        if train and np.mean([q["kl"] for q in held_out]) > 1.5 * trained:
            suggestions.append("add queries like those missed (--queries)")
        if train and sum(not q["captured"] for q in train) > len(train) / 10:
            suggestions.append("a longer prompt (--length)")
        suggestions.append("more steps (--steps)")
    if suggestions:
        text += f" What may help: {', '.join(suggestions)}."
    return {"text": text, "missed": [q["query"] for q in missed], "suggestions": suggestions}


def _captured(query: dict[str, Any]) -> bool:
    close = query["kl"] <= max(NEGLIGIBLE, (1 - CAPTURED) * query["kl_no_context"])
    return close and query["peak_kl"] <= PEAK


def _interval(gap: dict[str, float]) -> str:
    return f"{gap['value']:.1%} (95% interval {gap['low']:.1%} to {gap['high']:.1%})"


def _text(model: LanguageModel, ids: list[int]) -> str:
    return model.tokenizer.decode(ids, skip_special_tokens=True).strip()  # type: ignore[union-attr]


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(empty)"
