"""The report: what was measured, and what it means for each query, as JSON, Markdown and plots."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsp.data.packing import Packing
from jaxsp.data.examples import Rows
from jaxsp.evaluation.brackets import CONDITIONS
from jaxsp.evaluation.metrics import answer_mismatch, at_positions, gap_closed, rouge_l
from jaxsp.models.language_model import LanguageModel
from jaxsp.teacher.answers import answer_ids
from jaxsp.teacher.store import TeacherData
from jaxsp.typing import KeyValues

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


class Measured(NamedTuple):
    """A condition on every query."""

    positions: dict[str, np.ndarray]  # by objective, [N, A]
    answers: list[list[int]]  # free-running, as token ids


def measure(
    model: LanguageModel,
    prefix: KeyValues,
    teacher: TeacherData,
    query_ids: list[list[int]],
    packing: Packing,
    *,
    max_tokens: int,
    answers: list[list[int]] | None = None,
) -> Measured:
    """Measures a condition on every query.

    Args:
      model: the frozen model.
      prefix: of the condition.
      teacher: what is compared with.
      query_ids: the queries, up to where the answer starts.
      packing: of the batches.
      max_tokens: longest free-running answer.
      answers: the free-running answers, if they are known.
    """
    if answers is None:
        answers = answer_ids(model, prefix, query_ids, max_tokens=max_tokens)
    return Measured(at_positions(model, prefix, teacher.rows, packing), answers)


def summarise(
    model: LanguageModel,
    measured: dict[str, Measured],
    rows: Rows,
    queries: list[str],
    train_count: int,
    seed: int,
) -> dict[str, Any]:
    """What the report says of the measurements.

    Args:
      model: whose tokenizer reads the answers.
      measured: by condition; ``full_context``, ``prompt`` and ``no_context`` at least.
      rows: training rows first, then held-out rows.
      queries: their texts.
      train_count: how many of them are training rows; may be 0.
      seed: of the bootstrap.

    Returns:
      The report's ``gap_closed``, ``gap_closed_vs_truncated`` (if measured), ``held_out``, ``train``,
      ``queries`` and ``verdict``; ``by_position`` for the plot.
    """
    positions = {name: m.positions for name, m in measured.items()}
    answers = {name: m.answers for name, m in measured.items()}
    texts = {name: [_text(model, ids) for ids in some] for name, some in answers.items()}
    counts = rows.mask.sum(axis=1)

    def conditions(split: slice) -> dict[str, dict[str, float]]:
        return {
            name: {
                **{m: float(v[split].sum() / counts[split].sum()) for m, v in at.items()},
                "sequence_mismatch": _mean(
                    answer_mismatch, answers["full_context"][split], answers[name][split]
                ),
                "rouge_l": _mean(rouge_l, texts["full_context"][split], texts[name][split]),
            }
            for name, at in positions.items()
        }

    train, held_out = slice(0, train_count), slice(train_count, len(rows))
    kl = {name: at["kl"].sum(axis=1) for name, at in positions.items()}

    def gap(bracket: str) -> dict[str, float]:
        ours, theirs = ((kl[name][held_out], counts[held_out]) for name in ("prompt", bracket))
        return gap_closed(ours, theirs, seed)

    report: dict[str, Any] = {"gap_closed": gap("no_context")}
    if "truncated_context" in measured:
        report["gap_closed_vs_truncated"] = gap("truncated_context")
    report["held_out"] = {"queries": len(rows) - train_count, "conditions": conditions(held_out)}
    if train_count:
        report["train"] = {"queries": train_count, "conditions": conditions(train)}
    report["queries"] = [
        {
            "query": query,
            "split": "train" if i < train_count else "held_out",
            "kl": float(kl["prompt"][i] / counts[i]),
            "kl_no_context": float(kl["no_context"][i] / counts[i]),
            "peak_kl": float(positions["prompt"]["kl"][i].max()),
            **{
                f"answer_{name}": texts[name][i]
                for name in ("full_context", "prompt", "no_context")
            },
        }
        for i, query in enumerate(queries)
    ]
    for query in report["queries"]:
        query["captured"] = _captured(query)
    report["verdict"] = _verdict(report)
    seen = np.maximum(rows.mask[held_out].sum(axis=0), 1)
    last = int(rows.mask[held_out].any(axis=0).sum())
    report["by_position"] = {
        name: (at["kl"][held_out].sum(axis=0) / seen)[:last].tolist()
        for name, at in positions.items()
        if name != "initial"
    }
    return report


def write(report: dict[str, Any], lines: list[dict[str, Any]], directory: Path) -> None:
    """Writes ``report.json``, ``report.md`` and ``plots/*.png`` into ``directory``."""
    from jaxsp.evaluation import plots

    (directory / "plots").mkdir(parents=True, exist_ok=True)
    held_out = report["held_out"]["conditions"]
    plots.training_curve(lines, held_out, report["objective"], directory / "plots" / "training.png")
    plots.by_position(report["by_position"], directory / "plots" / "by_position.png")
    plots.by_query(report["queries"], directory / "plots" / "by_query.png")
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    for name, content in (("report.json", text), ("report.md", markdown(report))):
        scratch = directory / f"{name}.part"
        scratch.write_text(content, "utf-8")
        scratch.replace(directory / name)


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
    truncated = conditions.get("truncated_context")
    text = f"σ closes {_interval(gap)} of the gap between no context and the full context. "
    if not missed and gap["value"] >= GOOD:
        text += f"It captured what the context contributes to all {len(held_out)} held-out queries."
    else:
        text += (
            f"It captured what the context contributes to {len(held_out) - len(missed)} of"
            f" {len(held_out)} held-out queries, and has not captured it for {len(missed)}."
        )
    suggestions = []
    if truncated and conditions["prompt"]["kl"] >= truncated["kl"]:
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


def _mean(compare: Callable[[Any, Any], float], references: list, answers: list) -> float:
    return float(np.mean([compare(r, a) for r, a in zip(references, answers, strict=True)]))


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(empty)"
