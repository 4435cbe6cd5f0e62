"""experiments.study: who is trained on what, its table on made-up figures, and going on after a stop."""

from __future__ import annotations

import types

import pytest

import jaxsp
from experiments import suite
from experiments.narrativeqa import Passage
from experiments.study import experiment
from experiments.suite import Run

QUESTIONS = [f"What is fact {i}?" for i in range(30)]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Compressions that were asked for: text, queries; the figures tell who gave the queries."""
    calls = []

    def compress(model, text, queries, *, held_out, **settings):
        calls.append((text, [getattr(query, "text", query) for query in queries]))
        assert list(held_out) == QUESTIONS[22:]
        if len(calls) == 2:
            raise KeyboardInterrupt
        gap = 0.8 if queries[0].text in QUESTIONS else 0.9
        brackets = {"prompt": {"kl": 1 - gap, "decisive_agreement": gap - 0.2}, "no_context": {"kl": 1.0}}
        report = {
            "context_tokens": 300, "gap_closed": {"value": gap}, "verdict": {"missed": ["one"]},
            "held_out": {"brackets": brackets, "queries": 8}, "seconds": {"total": 1.0},
            "train": {"queries": len(queries)},
        }  # fmt: skip
        return types.SimpleNamespace(report=report)

    def questions(model, text, **settings):
        train = experiment.as_queries([f"Own {i} of {text}?" for i in range(40)])
        return types.SimpleNamespace(train=train)

    texts = [Passage("a", QUESTIONS[:9]), *(Passage(name, QUESTIONS) for name in "bcdefg")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "committed", lambda name: {})
    monkeypatch.setattr(experiment, "passages", lambda: texts)
    monkeypatch.setattr(jaxsp, "compress", compress)
    monkeypatch.setattr(jaxsp, "questions", questions)
    model = types.SimpleNamespace(name="tiny", config=types.SimpleNamespace(dtype="float32"))
    monkeypatch.setattr(jaxsp, "load_model", lambda dtype: model)
    return calls


def test_the_same_held_out_questions_for_both_and_on_after_a_stop(asked, tmp_path):
    run = Run(full=True, out=tmp_path)
    assert len(experiment.measure("people_or_text", run)["rows"]) == 1
    rows = experiment.measure("people_or_text", run)["rows"]
    assert [(row["passage"], row["source"]) for row in rows] == [
        (passage, source) for passage in range(6) for source in ("people", "text")
    ]
    assert asked[0] == ("b", QUESTIONS[:22])
    assert asked[1] == asked[2] == ("b", [f"Own {i} of b?" for i in range(40)])
    curve = experiment.measure("how_many", run)["rows"]
    assert [row["queries"] for row in curve] == [8, 16, 32] * experiment.CURVE_PASSAGES
    results = {"people_or_text": {"rows": rows}, "how_many": {"rows": curve}}
    assert "| people's questions | 6 | 22 | 0.800 (0.800 to 0.800) | 0.60 | 0.88 |" in experiment.table(
        results
    )
    assert "| the first 8 of the text's own | 4 | 8 |" in experiment.table(results)
    assert "gap closed 0.100" in experiment.result(results)


def test_what_the_text_adds_is_measured_on_the_same_documents(monkeypatch, tmp_path):
    """The same questions, steps and slots without and with it; after a stop it goes on."""
    calls = []

    def compressed(model, text, queries, held_out, run, changed):
        calls.append((text, len(queries), held_out, changed))
        if len(calls) == 2:
            raise KeyboardInterrupt
        more = 0.1 if changed["study"] == "auto" else 0.0
        return {"queries": len(queries), "gap_closed": 0.8 + more, "decisive": 0.7, "captured": 0.5}

    model = types.SimpleNamespace(
        name="tiny", config=types.SimpleNamespace(dtype="float32"), encode_context=lambda text: [0] * 400
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "committed", lambda name: {})
    monkeypatch.setattr(jaxsp, "load_model", lambda dtype: model)
    monkeypatch.setattr(experiment, "own_document", lambda name: (name, QUESTIONS, ["held out"]))
    monkeypatch.setattr(experiment, "compressed", compressed)
    run = Run(full=True, out=tmp_path)
    assert len(experiment.measure("beside_given", run)["rows"]) == 1
    rows = experiment.measure("beside_given", run)["rows"]
    assert len(rows) == 4 * len(experiment.DOCUMENTS)
    alone, beside = calls[0], calls[2]
    assert (alone[:3], beside[:3]) == (("museum", 24, ["held out"]),) * 2
    assert alone[3] == {"study": "off", "prompt_length": 20}
    assert beside[3] == {"study": "auto", "prompt_length": 20}
    results = {"beside_given": {"rows": rows}}
    assert "| all questions given and what the text adds | 4 | 30 | 0.900" in experiment.table(results)
    assert "24 questions with what the text adds less without: gap closed 0.100" in experiment.result(results)
