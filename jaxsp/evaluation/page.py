"""The report as one HTML page: self-contained, without a network, in light and dark."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from jaxsp.evaluation import charts
from jaxsp.evaluation.brackets import TRAINED
from jaxsp.evaluation.report import bracket_names, bracket_rows
from jaxsp.evaluation.verdict import MANY_CUT, gap_in_words
from jaxsp.files import size
from jaxsp.teacher.another import name_of_kl
from jaxsp.terminal import visible

COLUMNS = (
    "kl", "decisive_agreement", "zero_one", "reverse_kl", "js", "nll", "rank_agreement", "confidence_shift",
    "facts_right", "accuracy", "sequence_mismatch", "rouge_l",
)  # fmt: skip
"""Figures of the brackets, of those that are known."""

HERE, KINDS = "jaxsp.evaluation", ("css", "js")
"""The package of the templates that all pages share; the files beside a template of another one."""

LEVELS = ("no_context", "truncated_context")
"""Brackets that the training curve runs between."""

MOST_POINTS, MOST_TRAINED = 500, 200
"""Points of a curve, and training queries, that are shown at most."""


class Passage(NamedTuple):
    """A piece of the document, the numbers of the lost answers that most likely stand in it, and whether any
    query to train on asks for it."""

    text: str
    lost: tuple[int, ...]
    asked: bool = True


def html(
    report: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    tokens: Sequence[Mapping[str, Any]] | None = None,
    passages: Sequence[Passage] = (),
    lost: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page of one run.

    What an older run has not measured is left out.

    Args:
      report: the fields of ``report.json``.
      lines: the training's metrics, a dict a step.
      tokens: the answers token by token, as ``tokens.by_token`` gives them.
      passages: the document, if it is known.
      lost: the queries that the passages' numbers are of.

    Raises:
      ValueError: a field is missing.
    """
    brackets, names = report["held_out"]["brackets"], bracket_names(report)
    intervals = report["held_out"].get("kl_intervals", {})
    each = bracket_rows(brackets, names)
    rows = [
        {"name": name, "label": words, **intervals.get(name, {}), "value": row["kl"]}
        for name, words, row in each
    ]
    by_kl = sorted(report["queries"], key=lambda query: -_finite(query["kl"]))
    training, loss = _training(report, lines)
    study = report.get("study")
    unasked = [s for i, s in enumerate(study["sentences"]) if i not in study["asked"]] if study else []
    return render(
        "report.html.jinja",
        report={"taught_by": None, "right": None, "by_length": None, "teacher": None, **report},
        brackets=each,
        measure=name_of_kl(report.get("taught_by")),
        tiles=_tiles(report),
        steps=next_steps(report),
        bars=charts.bars(rows),
        has_intervals=bool(intervals),
        columns=[column for column in COLUMNS if all(column in row for row in brackets.values())],
        training=training,
        training_names=[line.name for line in training.lines] if training else [],
        loss=loss,
        levels=LEVELS,
        evaluations=[(line["step"], line["held_out_kl"]) for line in lines if "held_out_kl" in line],
        answers=_answers(report, tokens or ()),
        passages=passages,
        lost=lost,
        placed={number for passage in passages for number in passage.lost},
        held_out=[query for query in by_kl if query["split"] == "held_out"],
        trained=[query for query in by_kl if query["split"] == "train"][:MOST_TRAINED],
        unasked=unasked,
        asked_for=_asked_for(study) if study else "",
        facts=_facts(report),
    )


def render(template: str, package: str = HERE, **fields: Any) -> str:
    """A page.

    Args:
      template: its name.
      package: where it is, in a folder ``html``; with a style and a script of its name, if it has such, that
        stand behind those of all pages.
      **fields: what stands in it; texts are escaped.

    Raises:
      ValueError: a field is missing.
    """
    try:
        return _environment(package, template).get_template(template).render(fields)
    except jinja2.UndefinedError as error:
        raise ValueError(str(error)) from error


def policy(template: str, package: str = HERE) -> str:
    """The content security policy of a page, for the header of HTTP; arguments as in ``render``."""
    return str(_environment(package, template).globals["policy"])


@functools.cache
def _environment(package: str, template: str) -> jinja2.Environment:
    folders = [importlib.resources.files(name).joinpath("html") for name in dict.fromkeys((package, HERE))]

    def source(name: str) -> str | None:
        found = (folder.joinpath(name) for folder in folders)
        return next((file.read_text("utf-8") for file in found if file.is_file()), None)

    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FunctionLoader(source),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    own = template.partition(".")[0]
    style, script = ((source(f"page.{kind}") or "") + (source(f"{own}.{kind}") or "") for kind in KINDS)
    # A browser runs this script and no other, whatever stands in the texts; and asks no other host.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "connect-src": "'none'" if package == HERE else "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    environment.globals |= {
        "css": Markup(style),
        "script": Markup(script),
        "policy": Markup("; ".join(f"{name} {value}" for name, value in rules.items())),
    }
    environment.filters |= {"number": number, "heat": heat, "shown": visible, "blanks": _blanks}
    return environment


def number(value: Any, digits: int = 3, percent: bool = False) -> str:
    """A number for people; a dash where there is none.

    Example:
      >>> number(0.12345), number(None), number(0.977, 1, percent=True), number(float("nan")), number(-1e-9)
      ('0.123', '–', '97.7%', 'nan', '0.000')
    """
    if value is None:
        return "–"
    return f"{100 * value:z.{digits}f}%" if percent else f"{value:z.{digits}f}"


def heat(kl: float) -> str:
    """The colour of a token from 0 to 1: the root of its KL, so that small ones are seen.

    Example:
      >>> heat(0.0), heat(0.25), heat(7.0)
      ('0.00', '0.50', '1.00')
    """
    return f"{math.sqrt(min(max(_finite(kl, 1.0), 0.0), 1.0)):.2f}"


def _blanks(text: str) -> str:
    """A token's text with signs for blanks, tabs and ends of lines."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "(nothing)"


def _finite(value: float, otherwise: float = math.inf) -> float:
    return value if math.isfinite(value) else otherwise


def _tiles(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and addition of the first figures."""
    gap, held_out = report["gap_closed"], [q for q in report["queries"] if q["split"] == "held_out"]
    span = "" if gap["low"] is None else f"95%: {gap['low']:.1%} to {gap['high']:.1%}"
    if gap["low"] is None and gap["value"] is not None:
        span = "one query: no interval"
    captured = sum(bool(query["captured"]) for query in held_out)
    found = [
        ("gap closed", gap_in_words(gap), span),
        ("captured", f"{captured} of {len(held_out)}", "held-out queries"),
    ]
    if right := report.get("right"):
        more = f"{right['full_context']} with the full context, {right['no_context']} with none"
        found.append(("right answers", f"{right['prompt']} of {right['known']}", more))
    found.append(("shorter", f"{report['compression']:.1f}×", f"{report['prompt_length']} slots"))
    if "prefix_bytes" in report:
        prefix = report["prefix_bytes"]
        found.append(("in memory", size(prefix["prompt"]), f"{size(prefix['full_context'])} for the context"))
    if "total" in report.get("seconds", {}):
        found.append(("time", f"{report['seconds']['total']:.0f} s", "in all"))
    return found


def next_steps(report: Mapping[str, Any]) -> list[str]:
    """Steps that a user may take next, the most useful first, a sentence each.

    Args:
      report: the fields of ``report.json``.
    """
    found = list[str]()
    held_out = [query for query in report["queries"] if query["split"] == "held_out"]
    if (report.get("teacher") or {}).get("weak"):
        found.append(
            "First a better teacher: σ can be no better than it. Take a larger model (--model), or another"
            " one to teach (--teacher)."
        )
    if report["gap_closed"]["value"] is None:
        found.append("Ask what only the document answers: these queries show nothing of σ (--held-out).")
    found += [f"{text[0].upper()}{text[1:]}." for text in report["verdict"].get("suggestions", [])]
    if cut := report.get("cut_answers"):
        every = cut["train_answers"] + len(held_out)
        if (some := cut["train"] + cut["held_out"]["full_context"]) >= MANY_CUT * every > 0:
            found.append(
                f"Raise --max-answer-tokens: {some} of the teacher's {every} answers are cut at"
                f" {cut['max_answer_tokens']} tokens."
            )
    if (study := report.get("study")) and study["coverage"] < 1:
        found.append("Add queries (--queries) on the sentences below that no query depends on.")
    if held_out and all(query.get("seed") for query in held_out):
        found.append("Measure on questions of your own (--held-out): the model wrote these itself.")
    missed = [query for query in held_out if not query["captured"]]
    if helped := sum(query.get("right") is not False for query in missed):  # the document answers them
        found.append(
            f"Keep the document itself for questions like the {helped} that lose something; they are marked"
            " below."
        )
    ask = "Ask it with jaxsp ask, or take it to another program with jaxsp export."
    return [*found, ask] if missed else [ask, *found]


def _asked_for(study: Mapping[str, Any]) -> str:
    """The number of sentences that the user's own queries ask for, and those of the document."""
    if not study.get("given") or "by_given" not in study:
        return ""
    own, every, of = len(study["by_given"]), len(study["asked"]), len(study["sentences"])
    return (
        f"Your {study['given']} queries to train on ask for {own} of the {of} sentences; with the"
        f" {study['added']} that the document gave, {every} are asked for."
    )


def _training(
    report: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> tuple[charts.Chart | None, charts.Chart | None]:
    """The chart of the held-out KL, with the loss if that is KL, too; else the loss in one of its own."""

    loss, brackets = ("loss of the batch", series(lines, "loss")), report["held_out"]["brackets"]
    held_out = {"prompt": ("held-out KL of σ", series(lines, "held_out_kl"))}
    levels = {name: (name.replace("_", " "), brackets[name]["kl"]) for name in LEVELS if name in brackets}
    if report["objective"] == "kl":
        return charts.chart({"loss": loss, **held_out}, levels), None
    return charts.chart(held_out, levels), charts.chart({"loss": loss}, {})


def series(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """A metric by the steps at which it is known; of a long run some of them, and the last.

    Args:
      lines: the training's metrics, a dict a step.
      name: key of the metric.
    """
    known = [(line["step"], line[name]) for line in lines if name in line]
    every = max(1, math.ceil(len(known) / MOST_POINTS))
    return known[::every] + (known[-1:] if (len(known) - 1) % every else [])


def _answers(report: Mapping[str, Any], tokens: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The answers token by token as the page shows them."""
    found, titles = [], {"full_context": "full context", "prompt": "σ"}
    for answer in tokens:
        known = [name for name in titles if name in answer]
        shown = []
        for i, text in enumerate(answer["pieces"]):
            first = [answer[name][i][0][0] for name in known]
            shown.append(
                {
                    "text": text,
                    "kl": answer["kl"][i],
                    "kl_no_context": answer["kl_no_context"][i],
                    "decisive": answer["decisive"][i],
                    "other": len(set(first)) > 1,
                    "sides": [(titles[name], answer[name][i]) for name in known],
                }
            )
        found.append({"query": report["queries"][answer["row"]], "tokens": shown})
    return found


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Sizes, seconds and the environment, by name."""
    found = []
    if "prefill_seconds" in report:
        seconds = report["prefill_seconds"]
        text = f"{seconds['prompt']:.3f} s, {seconds['full_context']:.3f} s for the full context"
        found.append(("preparing it", text))
    if stored := report.get("stored"):
        files = [f"{name} {size(row['bytes'])}, KL {row['kl']:.4f}" for name, row in stored.items()]
        found.append(("as a file", "; ".join(files)))
    seconds = [f"{name} {value:.1f}" for name, value in report.get("seconds", {}).items()]
    if seconds:
        found.append(("seconds", ", ".join(seconds)))
    if "train" in report:
        rows = report["train"]["brackets"]
        kl = [f"{name.replace('_', ' ')} {rows[name]['kl']:.3f}" for name in TRAINED if name in rows]
        best = report["train"].get("best_tokens")
        of = f" of the {best} best tokens and of all others together" if best else ""
        found.append((f"KL in training{of}", ", ".join(kl)))
    if environment := report.get("environment"):
        versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
        found.append(("versions", f"Python {environment.get('python')}, {versions}"))
        found.append(("device", f"{environment.get('device')}, {environment.get('devices')}"))
    return found
