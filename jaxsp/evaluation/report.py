"""The report: what was measured, and what it means for each query, as JSON, Markdown and plots."""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jinja2
import numpy as np

from jaxsp import distributions
from jaxsp.artifact import SoftPrompt
from jaxsp.evaluation import certainty
from jaxsp.evaluation.brackets import BRACKETS, IN_PARTS, TRAINED, Measured
from jaxsp.evaluation.facts import has_expected, is_right, lost, says, whole_words
from jaxsp.evaluation.metrics import ANSWER_METRICS, Answer, gap_closed, interval
from jaxsp.evaluation.tokens import decisive as decisive_tokens, pieces
from jaxsp.evaluation.verdict import cost_of_larger, on_teacher, verdict, with_interval
from jaxsp.files import atomic_write, size
from jaxsp.models import decoder
from jaxsp.models.language_model import LanguageModel
from jaxsp.settings import Settings
from jaxsp.teacher.another import Teacher
from jaxsp.teacher.problem import Problem, TokenizedJob
from jaxsp.terminal import visible
from jaxsp.typing import KeyValues


def summarise(
    model: LanguageModel,
    problem: Problem,
    measured: dict[str, Measured],
    context: str,
    settings: Settings,
    teacher: Teacher | None = None,
) -> dict[str, Any]:
    """The report's fields that come from the measurements.

    Args:
      model: whose tokenizer reads the answers.
      problem: the queries, and what the teacher said.
      measured: by bracket, all of ``BRACKETS`` (but for ``initial``, if the start isn't known, and
        ``own_context``, if the model teaches itself or has no room for it), in any order.
      context: the text that σ stands for.
      settings: settings of the prompt; the seed is that of the bootstrap, too.
      teacher: the teacher, if it is another model.

    Returns:
      The report's ``gap_closed``, ``gap_closed_vs_truncated``, ``held_out``, ``train`` (if any query is for
      training), ``queries``, ``fallback``, ``right`` (if it is known of an answer), ``cut_answers``,
      ``teacher`` and ``verdict``; ``by_position`` for the plot; of a context in parts also ``parts``, and
      ``gap_closed_vs_first_part`` of the queries of the other parts, if there are any.
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
    decisive = decisive_tokens(model, problem, measured)

    def part(split: np.ndarray, names: Iterable[str]) -> dict[str, Any]:
        brackets = {
            name: {
                m: float(v[split].sum() / counts[split].sum())
                for m, v in positions[name].items()
                if not np.isnan(v[split]).all()  # not measured on these
            }
            for name in names
        }
        there = decisive & split[:, None]
        for name, found in brackets.items() if there.any() else ():
            found["decisive_agreement"] = float(1 - positions[name]["zero_one"][there].mean())
        return {"queries": int(split.sum()), "brackets": brackets}

    def gap(bracket: str, of: np.ndarray = ~is_train) -> dict[str, Any]:
        ours, theirs = ((kl[name][of], counts[of]) for name in ("prompt", bracket))
        return gap_closed(ours, theirs, settings.training.seed)

    report: dict[str, Any] = {
        "gap_closed": gap("no_context"),
        "gap_closed_vs_truncated": gap("truncated_context"),
        "held_out": part(~is_train, known),
    }
    if len(problem.read.parts) > 1:
        report["parts"] = _parts(problem.read)
    if (others := ~is_train & (problem.job.part_of > 0)).any():
        report["gap_closed_vs_first_part"] = gap("first_part", others)
    for name, found in report["held_out"]["brackets"].items():
        found |= _of_answers(problem, answers["full_context"], answers[name])
    if len(held_out) > 1:
        report["held_out"]["kl_intervals"] = {
            name: interval(kl[name][~is_train], counts[~is_train], settings.training.seed) for name in known
        }
    if is_train.any():
        report["train"] = part(is_train, TRAINED)
        if best := dict(problem.wanted.options).get("k"):
            report["train"]["best_tokens"] = best
    report["queries"] = _queries(model, problem, positions, answers, decisive)
    report["fallback"] = certainty.mark(report["queries"], measured["prompt"].certainties)
    report |= _right(report["queries"])
    report["cut_answers"] = _cut_answers(model, problem, measured, settings, teacher)
    cost = _cost(model, problem.job, settings)
    report["teacher"] = on_teacher(report, _read_of(problem.read, context), teacher, cost)
    report["verdict"] = verdict(report, settings.prompt.kind)
    seen = np.maximum(mask[~is_train].sum(axis=0), 1)
    last = int(mask[~is_train].any(axis=0).sum())
    report["by_position"] = {
        name: (at["kl"][~is_train].sum(axis=0) / seen)[:last].tolist()
        for name, at in positions.items()
        if name != "initial"
    }
    return report


def _cost(model: LanguageModel, job: TokenizedJob, settings: Settings) -> str:
    """A sentence on what a larger model would take."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    return cost_of_larger(weights, len(job.context_ids), settings.prompt.prompt_length)


def _parts(job: TokenizedJob) -> dict[str, Any]:
    """The parts of a context, and how queries were put to them: by their origin, or by a search."""
    known = np.array([query.span is not None for query in job.queries])
    return {
        "tokens": [len(part.ids) for part in job.parts],
        "queries": np.bincount(job.part_of, minlength=len(job.parts)).tolist(),
        "by_origin": int(known.sum()),
        "by_search": int((~known).sum()),
        "origin_found": int((job.found == job.part_of)[known].sum()),
    }


def _read_of(job: TokenizedJob, context: str) -> dict[str, str]:
    """The text that the teacher read for each query."""
    several = len(job.parts) > 1
    return {query.text: job.part(i).text if several else context for i, query in enumerate(job.queries)}


def _of_answers(problem: Problem, full: dict[int, Answer], own: dict[int, Answer]) -> dict[str, float]:
    """Shares of a bracket's free-running answers: beside the full context's, and by what is known."""
    asked = [(problem.job.queries[i], answer.text) for i, answer in own.items()]
    shares = {
        "facts_right": [has_expected(text, q) for q, text in asked if q.expect],
        "accuracy": [says(text, q.answer) for q, text in asked if q.answer is not None],
        **{m: [measure(full[i], own[i]) for i in own] for m, measure in ANSWER_METRICS.items()},
    }
    return {name: float(np.mean(values)) for name, values in shares.items() if values}


def _queries(
    model: LanguageModel,
    problem: Problem,
    positions: dict[str, dict[str, np.ndarray]],
    answers: dict[str, dict[int, Answer]],
    decisive: np.ndarray,
) -> list[dict[str, Any]]:
    """Each query with what was measured on it."""
    rows, mask, found = problem.rows, problem.rows.mask, []
    for i, query in enumerate(problem.job.queries):
        kl = {name: positions[name]["kl"][i] for name in TRAINED}
        row = {
            "query": query.text,
            "seed": query.seed,
            "split": "train" if problem.job.is_train[i] else "held_out",
            "kl": float(kl["prompt"].sum() / mask[i].sum()),
            "kl_no_context": float(kl["no_context"].sum() / mask[i].sum()),
            "peak_kl": float(kl["prompt"].max()),
            "decisive_tokens": int(decisive[i].sum()),
            "answer_full_context": _answer(model, problem.answers[i]).text,
        }
        if len(problem.read.parts) > 1:
            row["part"] = int(problem.read.part_of[i]) + 1
        if i in answers["prompt"]:
            ours, ids = answers["prompt"][i], rows.targets["tokens"][i, mask[i]]
            row |= {f"answer_{name}": answers[name][i].text for name in TRAINED}
            gone = lost(ids.tolist(), decisive[i, mask[i]].tolist(), ours.ids, model.stop_ids)
            row |= {"captured": not any(gone), "lost": whole_words(_pieces(model, ids.tolist()), gone)}
            if query.answer is not None:  # the model's own words are others
                kept = says(ours.text, query.answer)
                row |= {"captured": kept, "lost": [] if kept else [query.answer]}
            row["right"] = is_right(row["answer_full_context"], query)
            row |= {f"right_{name}": is_right(answers[name][i].text, query) for name in TRAINED}
        found.append(row)
    return found


def _pieces(model: LanguageModel, ids: list[int]) -> list[str]:
    """The text of each token of an answer."""
    tokenizer: Any = model.tokenizer
    return pieces(ids, lambda some: tokenizer.decode(list(some), skip_special_tokens=False))


def _right(queries: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """The number of answers of which it is known whether they are right, and of those that are."""
    known = [row for row in queries if row.get("right") is not None]
    if not known:
        return {}
    columns = {"full_context": "right", **{name: f"right_{name}" for name in TRAINED}}
    return {"right": {"known": len(known), **{b: sum(q[c] for q in known) for b, c in columns.items()}}}


def _cut_answers(
    model: LanguageModel,
    problem: Problem,
    measured: Mapping[str, Measured],
    settings: Settings,
    teacher: Teacher | None,
) -> dict[str, Any]:
    """The number of answers that end where the greatest length is reached, in the midst.

    Those to train on are the teacher's own (``train`` of ``train_answers``); those held out are the
    free-running ones of each bracket.
    """
    ends = set(model.stop_ids)
    if teacher is not None and teacher.difference is None:
        ends |= set(teacher.model.stop_ids)
    job, samples = problem.job, problem.samples

    def cut(answers: Iterable[Sequence[int]]) -> int:
        return sum(not ids or ids[-1] not in ends for ids in answers)

    own = [problem.answers[i] for i in np.flatnonzero(job.is_train) if job.given_ids[i] is None]
    own += samples.answers if samples else []
    return {
        "max_answer_tokens": settings.teacher.max_answer_tokens,
        "train": cut(own),
        "train_answers": len(own),
        "held_out": {name: cut(measured[name].answers) for name in BRACKETS if name in measured},
    }


def mark_trained_on(report: dict[str, Any], prompt: SoftPrompt) -> None:
    """Marks the queries that a prompt was trained on, where it is measured on them; the verdict says so."""
    for query in report["queries"]:
        query["trained_on"] = prompt.was_trained_on(query["query"])
    report["fallback"] = certainty.summary(report["queries"])
    if seen := sum(query["trained_on"] for query in report["queries"]):
        report["verdict"]["text"] += (
            f" {seen} of these {len(report['queries'])} queries were trained on: they say little of others."
        )


def report_header(model: LanguageModel, prompt: SoftPrompt) -> dict[str, Any]:
    """The report's first fields: what stands for what."""
    manifest, training = prompt.manifest, prompt.manifest["training"]
    params, config, nothing = model.params, model.config, decoder.empty_prefix(model.config)
    tokens = manifest["context_tokens"]
    parts = manifest.get("part_tokens", [tokens])
    return {
        "model": model.name,
        "dtype": model.config.dtype,
        "quantization": model.config.quantization,
        "taught_by": prompt.teacher,
        "context_tokens": tokens,
        "context_parts": len(parts),
        "prompt_length": prompt.prompt_length,
        "compression": tokens / prompt.prompt_length,
        "kind": prompt.kind,
        "prefix_bytes": {
            "prompt": bytes_of(
                lambda: distributions.prompt_prefix(params, config, prompt.sigma, nothing, prompt.kind)
            ),
            "full_context": bytes_of(lambda: decoder.empty_prefix(config, max(parts))),
        },
        "objective": training.get("objective"),  # of one that was imported it is not known
        "steps": training.get("steps"),
        "kept": training.get("keep", "best"),
    }


def bytes_of(read: Callable[[], KeyValues]) -> int:
    """Size of a prefix's keys and values, as the model keeps them while it answers.

    Args:
      read: gives the prefix; only its shapes are looked at.
    """
    prefix = jax.eval_shape(read)
    return sum(x.size * x.dtype.itemsize for x in (prefix.keys, prefix.values))


def write(report: dict[str, Any], lines: list[dict[str, Any]], directory: Path) -> None:
    """Writes plots and ``report.md`` into ``directory``."""
    from jaxsp.evaluation import plots

    folder, held_out = directory / "plots", report["held_out"]["brackets"]
    folder.mkdir(parents=True, exist_ok=True)
    plots.training_curve(lines, held_out, report["objective"], folder / "training.png")
    plots.by_position(report["by_position"], folder / "by_position.png")
    plots.by_query(report["queries"], folder / "by_query.png")
    if report["by_length"]:
        plots.by_length(report["by_length"], held_out, folder / "by_length.png")
    atomic_write(directory / "report.md", markdown(report))


def bracket_names(report: Mapping[str, Any]) -> dict[str, str]:
    """The brackets in words, as a report has them."""
    names = BRACKETS | (IN_PARTS if report.get("parts") else {})
    if teacher := report.get("taught_by"):
        names["full_context"] = f"the context, read by the teacher {teacher['name']}: what σ should be"
    return names


def bracket_rows(
    brackets: Mapping[str, dict[str, float]], names: Mapping[str, str]
) -> list[tuple[str, str, dict[str, float]]]:
    """The rows of a table of brackets: name, words and figures; those of equal figures are one row.

    A start may be the truncated context, and σ its own start, where no step is better.

    Args:
      brackets: figures by name.
      names: the brackets in words.

    Example:
      >>> bracket_rows({"a": {"kl": 0.5}, "b": {"kl": 0.0}, "c": {"kl": 0.5}}, {n: f"as {n}" for n in "abc"})
      [('a', 'as a, which is also as c', {'kl': 0.5}), ('b', 'as b', {'kl': 0.0})]
    """
    found: dict[str, list[str]] = {}
    for name, figures in brackets.items():
        twin = next((other for other in found if brackets[other] == figures), name)
        found.setdefault(twin, []).append(names[name])
    return [
        (name, ", which is also ".join(filter(None, (first, " and ".join(others)))), brackets[name])
        for name, (first, *others) in found.items()
    ]


def as_json(value: Any) -> str:
    """JSON for files that people look at, too."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def markdown(report: dict[str, Any]) -> str:
    """The report for people.

    Raises:
      ValueError: a field is missing.
    """
    # Markdown, not HTML: the users' texts stand in it as they are.
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"interval": with_interval, "cell": _cell, "size": size}
    source = importlib.resources.files("jaxsp.evaluation").joinpath("report.md.jinja").read_text("utf-8")
    try:
        names = bracket_names(report)
        return environment.from_string(source).render(
            report, rows=functools.partial(bracket_rows, names=names)
        )
    except jinja2.UndefinedError as error:
        raise ValueError(str(error)) from error


def _answer(model: LanguageModel, ids: list[int]) -> Answer:
    tokenizer: Any = model.tokenizer  # there is one: it has encoded the queries
    return Answer(ids, tokenizer.decode(ids, skip_special_tokens=True).strip())


def _cell(text: str) -> str:
    """A text of somebody's in a cell of a table, without Markdown's or HTML's meaning of its signs."""
    words = " ".join(visible(text).split())
    return re.sub(r"([\\`*_\[\]<>#|~!&])", r"\\\1", words) or "(empty)"
