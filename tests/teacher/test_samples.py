"""Sampled answers beside the greedy ones: drawn alike whoever draws, more rows to train on, no more."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import jaxsp
from jaxsp import distributions
from jaxsp.models import decoder
from jaxsp.progress import Display
from jaxsp.runs.job import check_settings, make_job
from jaxsp.runs.on_policy import OnPolicyRows
from jaxsp.runs.problems import Problems
from jaxsp.settings import make_settings
from jaxsp.teacher import samples
from jaxsp.teacher.another import Teacher
from jaxsp.teacher.problem import Problem, read_part, read_preamble
from jaxsp.teacher.store import Store
from jaxsp.training.slots import Step
from jaxsp.training.start import start_state
from jaxsp.typing import UserError
from tests import tiny
from tests.conftest import CONTEXT, QUERIES, assert_same_sigma

OPTIONS: dict[str, Any] = {
    "prompt_length": 4, "kind": "embedding", "steps": 6, "batch_size": 3, "max_answer_tokens": 6,
    "evaluate_every": 6, "checkpoint_every": 4, "answers": "sampled:3",
}  # fmt: skip
TRAIN = [
    *QUERIES[:3],
    "How long is the cable?",
    "Is the lid of steel?",
    {"query": "Given?", "answer": "Yes."},
]
HELD_OUT = QUERIES[7:9]
ROW = {"id": "a", "context": CONTEXT, "queries": TRAIN, "held_out": HELD_OUT}
QUIET = Display(visible=False)


def made(model, teacher=None, folder=None, **changed):
    """The problem of a job, and the job's settings."""
    found = Teacher.of(model, teacher)
    job = make_job(model, {**ROW, **changed}, OPTIONS, found)
    return Problems(model, read_preamble(model), Store(folder), found).of(
        job, Display(visible=False)
    ), job.settings


def drawn(problem) -> Problem:
    """The sampled part of a problem."""
    assert problem.samples is not None
    return problem.samples


def by_text(problem) -> dict[str, list[list[int]]]:
    """The sampled answers of each query."""
    found: dict[str, list[list[int]]] = {}
    for query, ids in zip(drawn(problem).job.queries, drawn(problem).answers, strict=True):
        found.setdefault(query.text, []).append(ids)
    return found


def listed(sampled):
    return [answer for answers in sampled.values() for answer in answers]


@pytest.fixture(scope="module")
def problem(calm_model):
    return made(calm_model)[0]


def test_they_are_more_rows_to_train_on_and_nothing_else(calm_model, problem):
    plain, _ = made(calm_model, answers="greedy")
    assert plain.samples is None
    assert problem.answers == plain.answers
    jax.tree.map(np.testing.assert_array_equal, problem.rows, plain.rows)
    jax.tree.map(np.testing.assert_array_equal, problem.held_out, plain.held_out)
    sampled = by_text(problem)
    assert list(sampled) == [*QUERIES[:3], "How long is the cable?", "Is the lid of steel?"]
    assert {len(answers) for answers in sampled.values()} == {2}
    assert len(problem.train) == 6 + 10
    assert len(problem.train_part_of) == 16
    assert problem.lengths.tolist() == [*plain.rows.lengths, *problem.train.lengths[6:]]
    rows, greedy = problem.train, plain.train
    for i, answer in enumerate(listed(sampled), start=6):
        assert rows.targets["tokens"][i, rows.mask[i]].tolist() == answer
    theirs = np.asarray(greedy.targets["hidden"])[greedy.mask]
    np.testing.assert_array_equal(np.asarray(rows.targets["hidden"])[:6][rows.mask[:6]], theirs)


@pytest.mark.parametrize("parts", [False, True])
def test_the_targets_are_the_teachers_after_the_querys_part(calm_model, problem, parts):
    if parts:
        problem, _ = made(calm_model, teacher_context=48)
    own = drawn(problem)
    assert (len(set(own.job.part_of)) > 1) == parts
    for i in range(0, len(own.rows), 2):
        context = read_part(calm_model, own.job, int(own.job.part_of[i]), problem.preamble)
        row = jaxsp.make_rows([own.job.query_ids[i]], [own.answers[i]])
        params, config = calm_model.params, calm_model.config
        expected = distributions.answer_hidden(params, config, context, row)[0]
        found = own.rows.targets["hidden"][i, own.rows.mask[i]]
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_an_answer_depends_on_its_query_and_the_seed_alone(calm_model, problem):
    sampled = by_text(problem)
    fewer, _ = made(calm_model, queries=[*reversed(TRAIN[1:4]), "Another?"])
    for text, answers in by_text(fewer).items():
        assert text == "Another?" or answers == sampled[text]
    other, settings = made(calm_model, seed=1)
    assert by_text(other) != sampled
    # Two processes draw what one does.
    asked = [(number, sample) for number in range(5) for sample in range(2)]
    whole, *shares = (
        samples._answers(calm_model, other.job, some, settings, other.preamble)
        for some in (asked, asked[::2], asked[1::2])
    )
    assert [shares[i % 2][i // 2] for i in range(len(asked))] == whole == listed(by_text(other))


def test_they_are_drawn_at_temperature_one(calm_model):
    """The mean surprise of many first tokens is the entropy of the teacher's distribution."""
    one = {"queries": QUERIES[:1], "max_answer_tokens": 1}
    problem, _ = made(calm_model, **one, answers="sampled:401")
    hidden = drawn(problem).rows.targets["hidden"][0, 0]
    logits = decoder.unembed(calm_model.params, calm_model.config, hidden)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    surprise = -log_p[[ids[0] for ids in drawn(problem).answers]]
    entropy = -(np.exp(log_p) * log_p).sum()
    deviation = np.sqrt((np.exp(log_p) * (log_p + entropy) ** 2).sum() / len(surprise))
    assert len(surprise) == 400
    assert abs(surprise.mean() - entropy) < 4 * deviation


@pytest.mark.slow
def test_a_run_reports_each_query_once_and_goes_on_with_what_was_drawn(calm_model, tmp_path, monkeypatch):
    """With the start that is fitted to the rows; jobs that differ in the seed, or in parts, draw anew."""
    more = {"0": {}, "1": {"seed": 1}, "parts": {"teacher_context": 48}}
    jobs = [{**ROW, "id": name, "kind": "key_value", **own} for name, own in more.items()]

    def run(out, **more):
        given: dict[str, Any] = {**OPTIONS, "at_once": 3, "progress": False, **more}
        return list(jaxsp.compress_many(calm_model, jobs, out=tmp_path / out, **given))

    def stop(step: Step) -> None:
        if step.number == 5:
            raise RuntimeError("killed")

    whole = run("whole")
    with pytest.raises(RuntimeError, match="killed"):
        run("pieces", callbacks=[stop])
    monkeypatch.setattr(samples, "_answers", None)
    pieces = run("pieces", resume=True)
    for ours, theirs in zip(pieces, whole, strict=True):
        assert_same_sigma(ours.prompt.sigma, theirs.prompt.sigma)
        assert [query["query"] for query in ours.report["queries"]].count(QUERIES[0]) == 1
        assert len(ours.report["queries"]) == len(TRAIN) + len(HELD_OUT)
        assert ours.report["settings"]["answers"] == "sampled:3"
    assert len(list((tmp_path / "whole" / "run" / "teachers").glob("*/samples.json"))) == 3


def test_on_policy_answers_beside_them(calm_model, problem):
    settings = make_settings({**OPTIONS, "on_policy": 1.0})
    own = OnPolicyRows(calm_model, calm_model, problem.preamble, problem, settings, QUIET)
    sigma = start_state(calm_model, problem, settings).sigma
    answers, rows = own.refreshed(sigma, 0)
    assert len(rows) == len(problem.train)
    assert [ids is not None for ids in answers] == [True] * 5 + [False]
    for name in ("tokens", "hidden"):
        theirs = np.asarray(problem.train.targets[name])[6:][problem.train.mask[6:]]
        np.testing.assert_array_equal(np.asarray(rows.targets[name])[6:][rows.mask[6:]], theirs)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    written = tiny.write(tmp_path_factory.mktemp("student") / "model", gain=1.0, vocab_size=260)
    return jaxsp.load_model(written, dtype="float32")


def test_another_teachers_are_the_students_ids(calm_model, student):
    """Its own head's targets at the same ids; an answer with an id that the student lacks is left out."""
    found, _ = made(student, calm_model)
    assert found.teacher_head is not None
    assert len(found.train) == 6 + len(drawn(found).rows)
    alone, _ = made(calm_model)
    kept = [ids for ids in drawn(alone).answers if max(ids) < 260]
    assert drawn(found).answers == kept
    tokens = drawn(found).rows.targets["tokens"][drawn(found).rows.mask]
    assert tokens.tolist() == [i for ids in kept for i in ids]
    job, settings = make_job(calm_model, ROW, OPTIONS), make_settings(OPTIONS)
    given = calm_model, job.tokenized(calm_model), settings, alone.preamble, QUIET, Store(None)
    least = sorted(max(ids) for ids in drawn(alone).answers)[4]
    index, fewer = samples.sample(*given, vocab_size=least + 1) or ([], None)
    assert fewer is not None
    assert fewer.answers == [ids for ids in drawn(alone).answers if max(ids) <= least]
    assert [fewer.job.queries[i].text for i in range(len(index))] == [TRAIN[i] for i in index]
    assert samples.sample(*given, vocab_size=1) is None


def test_a_damaged_file_is_one_sentence(calm_model, tmp_path):
    made(calm_model, folder=tmp_path)
    (file,) = tmp_path.glob("*/samples.json")
    file.write_text("[[1, 2")
    with pytest.raises(UserError, match=r"is damaged: samples\.json .* Start anew with --overwrite"):
        made(calm_model, folder=tmp_path)


def test_another_vocabulary_reads_them_as_texts(calm_model, student, monkeypatch):
    monkeypatch.setattr(Teacher, "difference", "2 tokens, not 3")
    found, _ = made(student, calm_model, objective="nll")
    assert set(found.train.targets) == {"tokens"}
    assert len(found.train) == 6 + 10


@pytest.mark.parametrize("text", ["sampled:1", "sampled", "sampled:x", "beam:4", "sampled:99999"])
def test_a_rule_that_is_none(text):
    message = f"--answers must be greedy or sampled:N, N from 2 to 9999, not '{text}'"
    with pytest.raises(UserError, match=message):
        check_settings(make_settings({"answers": text}))


def test_where_all_answers_are_given_there_are_none(calm_model):
    queries = [{"query": query, "answer": "Yes."} for query in QUERIES[:3]]
    assert made(calm_model, queries=queries)[0].samples is None


def test_a_problem_of_some_queries_has_none(problem):
    assert problem.take([0, 1]).samples is None
    assert len(dataclasses.replace(problem, samples=None).train) == 6
