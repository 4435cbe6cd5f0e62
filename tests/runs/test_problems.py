"""jaxsp.runs.problems: what a document adds to the queries given, in runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

import jaxsp
from jaxsp.runs import problems
from jaxsp.runs.job import make_job
from jaxsp.study import NothingFit
from jaxsp.study.coverage import Coverage
from jaxsp.teacher import problem as teachers
from jaxsp.teacher.store import entries
from jaxsp.training.slots import Step
from jaxsp.typing import Interrupted, UserError
from tests.conftest import CONTEXT, QUERIES, assert_same_sigma

SETTINGS: dict[str, Any] = {
    "prompt_length": 4, "steps": 4, "batch_size": 4, "max_answer_tokens": 48, "evaluate_every": 2,
    "checkpoint_every": 1,
}  # fmt: skip
GIVEN, HELD_OUT = QUERIES[:4], QUERIES[8:]

pytestmark = pytest.mark.usefixtures("filled", "heeded")


@pytest.fixture(autouse=True)
def first_sentence_alone(monkeypatch):
    """The given queries ask for the first sentence, and often enough; for nothing else."""

    def covered(model, document, problem, asked, **options):
        return Coverage([{0}] * len(asked), set())

    monkeypatch.setattr("jaxsp.study.questions.covered", covered)


@pytest.fixture
def asked(monkeypatch):
    """The numbers of queries that the teacher is asked to answer."""
    calls, answer_ids = [], teachers.answer_ids

    def counted(model, prefix, queries, **options):
        calls.append(len(queries))
        return answer_ids(model, prefix, queries, **options)

    monkeypatch.setattr(teachers, "answer_ids", counted)
    return calls


def compress(model, **more) -> jaxsp.Result:
    settings: dict[str, Any] = {**SETTINGS, "progress": False, **more}
    return jaxsp.compress(model, CONTEXT, GIVEN, held_out=HELD_OUT, **settings)


def test_the_document_adds_quotes_to_the_queries_given(calm_model, asked, tmp_path):
    """The report keeps both apart; the teacher answers the given queries, once."""
    found = compress(calm_model, out=tmp_path / "out")
    study = found.report["study"]
    assert (study["given"], study["added"], study["by_given"], study["asked"]) == (4, 2, [0], [0, 1, 2])
    assert asked == [6]
    texts = [(q["query"], q["seed"]) for q in found.report["queries"] if q["split"] == "train"]
    assert texts[:4] == [(text, "") for text in GIVEN]
    assert [seed for _, seed in texts[4:]] == ["quote"] * 2
    report = " ".join((tmp_path / "out" / "report.md").read_text().split())
    assert "4 queries to train on are yours; they ask for 1 of the document's 3 sentences." in report
    assert "The document gave 2 more; by all together 3 of 3 sentences are asked for." in report
    kept = [entry.about["kind"] for entry in entries(tmp_path / "out" / "run" / "teachers")]
    assert sorted(kept) == ["study", "teacher"]  # nothing is left of the study under way
    alone = compress(calm_model, study="off")
    assert alone.report["study"] is None
    assert alone.report["train"]["queries"] == 4


def test_the_switch_is_in_one_place(calm_model, monkeypatch):
    row = {"id": "a", "context": CONTEXT, "queries": GIVEN}
    assert make_job(calm_model, row, SETTINGS).is_studied
    assert not make_job(calm_model, {**row, "study": "off"}, SETTINGS).is_studied
    monkeypatch.setattr("jaxsp.runs.job.BESIDE_GIVEN", False)
    assert not make_job(calm_model, row, SETTINGS).is_studied
    assert make_job(calm_model, {**row, "study": "on"}, SETTINGS).is_studied
    assert make_job(calm_model, {"id": "a", "context": CONTEXT}, SETTINGS).is_studied


def test_an_interrupted_run_goes_on_to_the_same_bits(calm_model, tmp_path, monkeypatch):
    """Interrupted while the document is asked, and once more in training: the teacher answers once."""
    whole = compress(calm_model, out=tmp_path / "whole")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def stop_at_2(step: Step) -> None:
        if step.number == 2:
            stop()

    out = tmp_path / "pieces"
    with monkeypatch.context() as patch:
        patch.setattr("jaxsp.study.questions._fit", stop)
        with pytest.raises(Interrupted):
            compress(calm_model, out=out)
    monkeypatch.setattr(teachers, "answer_ids", stop)
    with pytest.raises(Interrupted):
        compress(calm_model, out=out, resume=True, callbacks=[stop_at_2])
    monkeypatch.setattr(problems, "study", stop)
    pieces = compress(calm_model, out=out, resume=True)
    assert_same_sigma(pieces.prompt.sigma, whole.prompt.sigma)
    assert pieces.report["study"] == whole.report["study"]
    kept = [
        json.loads((tmp_path / name / "report.json").read_text())["queries"] for name in ("whole", "pieces")
    ]
    assert kept[0] == kept[1]


def test_runs_that_differ_in_seeds_and_steps_share_what_was_asked(calm_model, asked, cache, monkeypatch):
    """And with ``study="off"`` what the teacher answered: beside given queries nothing is drawn."""
    monkeypatch.delenv("JAXSP_TEACHER_CACHE")
    first = compress(calm_model, seed=1)
    compress(calm_model, seed=2, steps=2)
    compress(calm_model, study="off")
    assert asked == [6]
    kinds = sorted(entry.about["kind"] for entry in entries(cache / "teachers"))
    assert kinds == ["study", "teacher", "teacher"]
    assert first.report["study"]["added"] == 2


@pytest.mark.parametrize("added", [True, False])
def test_an_objective_of_the_best_tokens_keeps_no_more_than_these(
    calm_model, tmp_path, monkeypatch, asked, added
):
    """Best tokens of the queries to train on, also while the document is asked."""
    if not added:
        monkeypatch.setattr("jaxsp.study.questions.to_fill", lambda *a, **k: [])
    under_way, keep = [], problems.Problems._keep_study

    def seen(self, job, found):
        begun = self._begun(job)
        under_way.extend(entry.about["kind"] for entry in entries(begun.own) if entry.about)
        keep(self, job, found)

    monkeypatch.setattr(problems.Problems, "_keep_study", seen)
    found = compress(calm_model, objective="topk_kl(k=4)", out=tmp_path / "out")
    assert found.report["study"]["added"] == (2 if added else 0)
    assert asked == [6]
    assert under_way == ["teacher (top_k)"] * (2 if added else 1)
    folder = tmp_path / "out" / "run" / "teachers"
    assert sorted(entry.about["kind"] for entry in entries(folder)) == ["study", "teacher (top_k)"]
    assert found.report["train"]["best_tokens"] == 4


def test_many_jobs_are_filled_up_as_one_is(calm_model, tmp_path):
    """Each by its own document, and a row may turn it off."""
    job = {"context": CONTEXT, "queries": GIVEN, "held_out": HELD_OUT}
    jobs = [{"id": "a", **job}, {"id": "b", **job, "study": "off"}]
    both = jaxsp.compress_many(calm_model, jobs, out=tmp_path / "many", progress=False, **SETTINGS)
    found = {result.report["id"]: result.report for result in both}
    assert found["a"]["study"]["added"] == 2
    assert found["b"]["study"] is None
    alone = compress(calm_model).report
    assert found["a"]["study"] == alone["study"]
    assert found["a"]["train"]["queries"] == alone["train"]["queries"] == 6


def test_of_many_jobs_that_is_named_whose_document_gives_nothing(calm_model, monkeypatch):
    """A run of one needs no name."""
    monkeypatch.setattr("jaxsp.study.questions.MATTERS", 1e9)
    row = {"id": "b", "context": CONTEXT}
    with pytest.raises(UserError, match=r"^b: Of \d+ queries .* Or leave its row out, or .* --keep-going\.$"):
        list(jaxsp.compress_many(calm_model, [row], progress=False, **SETTINGS))
    with pytest.raises(UserError, match=r"^Of \d+ queries"):
        jaxsp.compress(calm_model, CONTEXT, progress=False, **SETTINGS)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("order", [("a", "b", "c"), ("b", "a", "c"), ("a", "c", "b")])
def test_a_document_that_gives_nothing_is_left_out_if_asked_for(
    calm_model, monkeypatch, capsys, tmp_path, order, kept
):
    """The others are done, wherever it stands; the run goes on from them."""
    job = {"context": CONTEXT, "queries": GIVEN, "held_out": HELD_OUT, "study": "off"}
    rows = {"a": {"id": "a", **job}, "b": {"id": "b", "context": CONTEXT}, "c": {"id": "c", **job, "seed": 1}}

    def nothing(self, job, display):
        raise NothingFit("Nothing.")

    monkeypatch.setattr(problems.Problems, "_studied", nothing)
    jobs = [rows[name] for name in order]
    options: dict[str, Any] = {**SETTINGS, "steps": 0, "out": tmp_path / "out" if kept else None}
    for resume in (False, True) if kept else (False,):
        found = jaxsp.compress_many(calm_model, jobs, keep_going=True, at_once=1, resume=resume, **options)
        assert [result.report["id"] for result in found] == ["a", "c"]
        assert capsys.readouterr().err.count("Skipped: b: Nothing.\n") == 1
    with pytest.raises(UserError, match=r"^None of the jobs can be done\.$"):
        list(jaxsp.compress_many(calm_model, [rows["b"]], keep_going=True, progress=False, **SETTINGS))
