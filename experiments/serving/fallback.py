"""The fallback: share of σ's wrong answers caught against the share of requests sent to the document."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jaxsp
from experiments.serving.prompts import DOCUMENTS, compressed
from experiments.serving.signals import SIGNALS, all_signals, answered, sent, separation
from experiments.suite import KeptRows, Run, markdown
from jaxsp.evaluation.certainty import SIGNAL, Calibration
from jaxsp.runs.folder import Result
from jaxsp.teacher.answers import answer_ids

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
GOAL_SHARE, GOAL_CAUGHT = 0.1, 0.6

SECOND = ("asked for", "sent to the document", "wrong answers caught", "most that can be", "right answers")


def measure(run: Run) -> dict[str, Any]:
    """A row a document, with its held-out queries; after Ctrl-C it goes on with those that are left."""
    kept, model = KeptRows("serving", "fallback", run), jaxsp.load_model()
    done = {row["document"] for row in kept.rows}
    documents = DOCUMENTS if run.full else DOCUMENTS[:1]
    with contextlib.suppress(KeyboardInterrupt):
        for name in documents:
            if name in done:
                continue
            result = compressed(model, name, kept.folder, run.full)
            kept.add({"document": name, "queries": rows_of(model, result)})
            print(f"{name}: {len(kept.rows[-1]['queries'])} queries", flush=True)
    there = {row["document"]: row for row in kept.rows}  # some committed and kept
    return {"model": model.name, "dtype": model.config.dtype, "rows": list(there.values())}


def rows_of(model: jaxsp.LanguageModel, result: Result) -> list[dict[str, Any]]:
    """A row each of the held-out queries of a run, with all signals of σ's answer."""
    found = [row for row in result.report["queries"] if row["split"] == "held_out"]
    prompt, most = result.prompt, result.report["settings"]["max_answer_tokens"]
    ids = [prompt.chat.query_ids(model.tokenizer, row["query"]) for row in found]
    prefix = prompt.prefix(model)
    answers = answer_ids(model, prefix, ids, max_tokens=most)
    wrong = list(Calibration.of(prompt).wrong)
    signals = all_signals(answered(model, prefix, ids, answers), wrong)
    return [
        {
            "query": row["query"],
            "wrong": is_wrong,
            "right_with_document": row["right"],
            "captured": row["captured"],
            "signals": {signal: values[i] for signal, values in signals.items()},
        }
        for i, (row, is_wrong) in enumerate(zip(found, wrong, strict=True))
    ]


def curve(rows: Sequence[Mapping[str, Any]], signal: str) -> list[dict[str, float]]:
    """The effect of a fallback on all documents' queries, at each of ``SHARES``.

    Each query's threshold is that of the other queries of its document: it decides nothing about itself.

    Args:
      rows: of ``measure``.
      signal: name of the signal.

    Returns:
      By share: the share that was ``sent``, the share of the wrong answers that are among them (``caught``),
      the ``most`` of them that so many requests could catch by any signal, and the right answers of all,
      where those sent are the document's (``right``).
    """
    found = []
    for share in SHARES:
        chosen = [(query, is_sent) for row in rows for query, is_sent in _sent(row["queries"], signal, share)]
        wrong = [is_sent for query, is_sent in chosen if query["wrong"]]
        right = [q["right_with_document"] if is_sent else not q["wrong"] for q, is_sent in chosen]
        found.append(
            {
                "share": share,
                "sent": sum(is_sent for _, is_sent in chosen) / len(chosen),
                "caught": sum(wrong) / max(1, len(wrong)),
                "most": min(1.0, sum(is_sent for _, is_sent in chosen) / max(1, len(wrong))),
                "right": sum(right) / len(right),
            }
        )
    return found


def _sent(
    own: Sequence[Mapping[str, Any]], signal: str, share: float
) -> list[tuple[Mapping[str, Any], bool]]:
    def threshold(values: Sequence[float]) -> float:
        return Calibration(tuple(values), (False,) * len(values)).threshold(share)

    return list(zip(own, sent([query["signals"][signal] for query in own], threshold), strict=True))


def separations(rows: Sequence[Mapping[str, Any]], signal: str) -> float:
    """The share of pairs, within documents, in which the wrong answer is the less sure one."""
    found = [
        separation([q["signals"][signal] for q in row["queries"]], [q["wrong"] for q in row["queries"]])
        for row in rows
    ]
    return sum(pairs for pairs, _ in found) / max(1, sum(count for _, count in found))


def table(record: Mapping[str, Any]) -> str:
    """The signals beside each other, and what the library's does."""
    rows = record["rows"]
    names = sorted(rows[0]["queries"][0]["signals"], key=lambda name: -separations(rows, name))
    head = ["signal", "pairs in order", *(f"caught at {share:.0%}" for share in SHARES)]
    lines = [
        [f"**{name}**" if name == SIGNAL else name, f"{separations(rows, name):.2f}"]
        + [f"{point['caught']:.2f}" for point in curve(rows, name)]
        for name in names
    ]
    own = curve(rows, SIGNAL)
    second = [
        [f"{point['share']:.0%}", *(f"{point[key]:.2f}" for key in ("sent", "caught", "most", "right"))]
        for point in own
    ]
    queries = [query for row in rows for query in row["queries"]]
    wrong, right = (sum(q[name] for q in queries) for name in ("wrong", "right_with_document"))
    total = (
        f"{len(queries)} held-out queries of {len(rows)} documents: {len(queries) - wrong} right with σ,"
        f" {right} with the whole document."
    )
    picture = "![Wrong answers caught against requests sent to the document](fallback.png)"
    return "\n\n".join([picture, markdown(head, lines), markdown(SECOND, second), total])


def result(record: Mapping[str, Any]) -> str:
    """The library's signal at the goal's share."""
    point = next(p for p in curve(record["rows"], SIGNAL) if p["share"] == GOAL_SHARE)
    return (
        f"a fallback of {GOAL_SHARE:.0%} sends {point['sent']:.0%} and catches {point['caught']:.0%} of the"
        f" wrong answers (aim: {GOAL_CAUGHT:.0%}; most that can be: {point['most']:.0%})"
    )


def draw(record: Mapping[str, Any], folder: Path) -> None:
    """The share caught against the share sent, of the library's signal and of the others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    rows = record["rows"]
    for name in SIGNALS:
        points = [(0.0, 0.0), *((p["sent"], p["caught"]) for p in curve(rows, name)), (1.0, 1.0)]
        is_ours = name == SIGNAL
        axes.plot(
            *zip(*points, strict=True), marker="o" if is_ours else None, linewidth=2.5 if is_ours else 1,
            label=name.replace("_", " "),
        )  # fmt: skip
    queries = [query["wrong"] for row in rows for query in row["queries"]]
    best = [(0.0, 0.0), (sum(queries) / len(queries), 1.0), (1.0, 1.0)]
    axes.plot(*zip(*best, strict=True), color="grey", linestyle="--", label="most that can be")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="at random")
    axes.plot([GOAL_SHARE], [GOAL_CAUGHT], "x", color="black", label="aim")
    axes.set(xlabel="requests sent to the document", ylabel="wrong answers caught", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize="x-small")
    figure.savefig(folder / "fallback.png", dpi=130)
