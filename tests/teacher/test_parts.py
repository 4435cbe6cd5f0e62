"""Documents longer than the window: each query is taught by one part, as if that were the document."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import jaxsp
from jaxsp import distributions
from jaxsp.data.documents import Query
from jaxsp.data.packing import Packing
from jaxsp.data.parts import MOST_CHARACTERS
from jaxsp.evaluation import brackets, report as reports
from jaxsp.evaluation.metrics import at_positions
from jaxsp.models import decoder
from jaxsp.progress import Display
from jaxsp.runs.job import make_job
from jaxsp.settings import make_settings
from jaxsp.study import study
from jaxsp.teacher import targets
from jaxsp.teacher.answers import answer_ids
from jaxsp.teacher.problem import read_part, read_preamble, run_teacher, teacher_key, tokenize
from jaxsp.typing import Interrupted, UserError
from tests.conftest import assert_same_sigma

TEXT = """The tank of the K7 holds 1.2 litres. Its cable is long.

The lid of the M4 is made of steel. It weighs 3 kg.

The filter of the R2 costs 9 euros. It lasts a year."""
QUERIES = [Query("How long is the cable of the K7?"), Query("Which lid is of steel?"), Query("What lasts?")]
HELD_OUT = [Query("Who made the filter of the R2?"), Query("What is the lid?", span=(0, 20))]
OPTIONS = {"prompt_length": 4, "max_answer_tokens": 6, "kind": "key_value"}
SETTINGS = make_settings({**OPTIONS, "teacher_context": 64})
PARTS = [0, 1, 2, 2, 0]


def tokenized(model, settings=SETTINGS, queries=QUERIES, text=TEXT):
    return tokenize(model, text, queries, HELD_OUT, settings)


def taught(model, job, settings=SETTINGS):
    return run_teacher(model, job, settings.teacher, read_preamble(model), Display(visible=False))


@pytest.fixture(scope="module")
def problem(calm_model):
    return taught(calm_model, tokenized(calm_model))


@pytest.fixture(scope="module")
def preamble(calm_model):
    return read_preamble(calm_model)


def test_queries_go_to_the_part_that_they_are_about(problem):
    job = problem.job
    assert [part.text for part in job.parts] == TEXT.split("\n\n")
    assert job.part_of.tolist() == PARTS
    assert job.found.tolist() == [0, 1, 2, 2, 1]  # of the last one the origin is known
    assert job.part(1).text.startswith("The lid")
    some = problem.take([4, 1], train=1).job
    assert (some.part_of.tolist(), some.found.tolist()) == ([0, 1], [1, 1])


def test_a_span_that_the_document_does_not_have_is_searched_for(calm_model):
    queries = [dataclasses.replace(QUERIES[1], span=(9000, 9001))]
    assert tokenized(calm_model, queries=queries).part_of.tolist()[0] == 1


def test_each_query_is_taught_as_if_its_part_were_the_document(calm_model, problem):
    for part in range(3):
        index = np.flatnonzero(problem.job.part_of == part)
        queries = [problem.job.queries[i] for i in index]
        settings = make_settings(OPTIONS)
        own = tokenize(calm_model, problem.job.parts[part].text, queries, [], settings)
        assert len(own.parts) == 1
        alone = taught(calm_model, own, settings)
        assert alone.answers == [problem.answers[i] for i in index]
        mask = alone.rows.mask
        hidden = np.asarray(problem.rows.targets["hidden"])[index][:, : mask.shape[1]]
        np.testing.assert_allclose(hidden[mask], np.asarray(alone.rows.targets["hidden"])[mask], atol=1e-5)


def test_a_document_that_fits_is_one_part_and_what_it_was(calm_model, preamble):
    """Bit for bit what reading it whole gives; also where the limit is its own length."""
    whole = make_settings(OPTIONS)
    exact = make_settings({**OPTIONS, "teacher_context": len(calm_model.encode_context(TEXT))})
    problems = [taught(calm_model, tokenized(calm_model, own), own) for own in (whole, exact)]
    job = problems[0].job
    assert [part.text for part in job.parts] == [TEXT]
    np.testing.assert_array_equal(job.parts[0].ids, job.context_ids)
    context = decoder.read_long(calm_model.params, calm_model.config, job.context_ids[None], preamble)
    answers = answer_ids(calm_model, context, job.query_ids, max_tokens=6)
    rows = problems[0].rows
    hidden = targets.compute(calm_model, context, rows, Packing.for_all(rows.lengths), "hidden")
    for problem in problems:
        assert problem.answers == answers
        np.testing.assert_array_equal(problem.rows.targets["hidden"], hidden)


@pytest.mark.parametrize("kind", ["key_value", "per_head"])
def test_the_start_from_one_part_is_what_it_was(calm_model, preamble, problem, kind):
    arguments = calm_model.params, calm_model.config, problem.job.parts[0].ids, preamble
    options = {"key": jax.random.key(0), "prompt_length": 4, "kind": kind, "rows": problem.rows}
    one = {"part_lengths": [len(problem.job.parts[0].ids)], "part_of": np.zeros(5, int)}
    starts = [distributions.initial_prompt(*arguments, **options, **more) for more in ({}, one)]
    jax.tree.map(np.testing.assert_array_equal, *starts)


def test_a_prompt_equal_to_a_part_is_that_part(calm_model, preamble, problem):
    rows = problem.rows.take(np.flatnonzero(problem.job.part_of == 0))
    ids = problem.job.parts[0].ids
    sigma = distributions.initial_prompt(
        calm_model.params, calm_model.config, ids, preamble, key=jax.random.key(0),
        prompt_length=len(ids), initial="first", kind="key_value",
    )  # fmt: skip
    prompt = distributions.prompt_prefix(calm_model.params, calm_model.config, sigma, preamble, "key_value")
    kl = [
        at_positions(calm_model, prefix, rows, problem.packing, ["kl"])["kl"].sum()
        for prefix in (prompt, read_part(calm_model, problem.job, 1, preamble))
    ]
    assert kl[0] == pytest.approx(0, abs=1e-5)
    assert kl[1] > 0.1


def test_the_cut_does_not_depend_on_queries_that_the_document_gives(calm_model):
    """The problem that a study makes is that of the job which a resumed run makes of its queries."""
    text = TEXT * 8
    more = [Query(f"Say it {'again ' * n}!", seed="quote", span=(0, 9)) for n in (1, 5, 10)]
    first, second = (tokenized(calm_model, make_settings(OPTIONS), q, text) for q in (QUERIES, more))
    assert len(first.parts) > 1
    assert [part.text for part in first.parts] == [part.text for part in second.parts]
    # As long as there is room for beside the parts, and longer than what a cut of one's own would leave.
    model, job = calm_model, first
    room = model.config.window - len(job.preamble_ids) - len(job.longest_part.ids) - 6
    length = room - len(model.encode_query("Say it!"))
    long = [Query(f"Say it{'!' * length}!", seed="quote", span=(0, 9)), *more]
    assert len(model.encode_query(long[0].text)) == room > 128
    third = tokenized(model, make_settings(OPTIONS), long, text)
    assert [part.text for part in first.parts] == [part.text for part in third.parts]
    with pytest.raises(UserError, match="more than the model's window of 512"):
        tokenized(model, make_settings(OPTIONS), [Query(f"{long[0].text}!", seed="quote")], text)


def test_everything_that_decides_what_the_teacher_says_is_in_the_key(calm_model, problem):
    job, settings = problem.job, SETTINGS.teacher

    def key(**changes):
        return teacher_key(calm_model, dataclasses.replace(job, **changes), settings)

    cut = dataclasses.replace(job.parts[0], ids=job.parts[0].ids[1:])
    keys = [
        key(),
        key(part_of=job.part_of[::-1]),
        key(found=job.found[::-1]),
        key(parts=[cut, *job.parts[1:]]),
    ]
    keys.append(teacher_key(calm_model, job, make_settings({"teacher_context": 65}).teacher))
    assert len(set(keys)) == 5
    names = [make_job(calm_model, row(), {"teacher_context": n}).identity(calm_model) for n in (64, 65)]
    assert {name for name in names[0] if names[0][name] != names[1][name]} == {"teacher_context"}


def row():
    return {"id": "x", "context": TEXT, "queries": ["What is it?", "Why?"], "held_out": 0.5}


def test_a_document_too_long_for_any_run_is_refused_before_its_tokens_are_counted():
    nothing: Any = None  # neither a model nor its tokenizer is looked at
    for refuse in (
        lambda: tokenize(nothing, "a" * (MOST_CHARACTERS + 1), [], [], nothing),
        lambda: study(nothing, "a" * (MOST_CHARACTERS + 1), [], [], nothing, nothing),
    ):
        with pytest.raises(UserError, match="16,777,217 characters, more than the 16,777,216"):
            refuse()


def test_no_room_for_any_part(calm_model):
    settings = make_settings({"prompt_length": 4, "max_answer_tokens": 450})
    with pytest.raises(UserError, match=r"leave no room for the context in the model's window of 512"):
        tokenized(calm_model, settings)


@pytest.fixture(scope="module")
def measured(calm_model, problem):
    sigma = {"embeddings": calm_model.embed(problem.job.context_ids[:4])}
    settings = make_settings({**OPTIONS, "kind": "embedding", "teacher_context": 64})
    return brackets.measure_all(calm_model, problem, {"prompt": sigma}, settings, known={})


def test_brackets_of_parts(calm_model, preamble, problem, measured):
    """The search was right for one of the two held-out queries; no other is of the first part."""
    found, first, full = (measured[name] for name in ("retrieved_part", "first_part", "full_context"))
    for bracket, part, same, other in ((found, 1, 3, 4), (first, 0, 4, 3)):
        np.testing.assert_array_equal(bracket.positions["kl"][same], full.positions["kl"][same])
        assert bracket.answers[same - 3] == full.answers[same - 3]
        prefix = read_part(calm_model, problem.job, part, preamble)
        read = at_positions(calm_model, prefix, problem.rows.take([other]), problem.packing)
        np.testing.assert_allclose(bracket.positions["kl"][other], read["kl"][0], atol=1e-5)
        assert read["kl"].sum() > 0.1
        (own,) = answer_ids(calm_model, prefix, [problem.job.query_ids[other]], max_tokens=6)
        assert bracket.answers[other - 3] == own
    searched = problem.take([0, 1, 3], train=2)  # the teacher's part is the one found
    assert set(brackets._parts_read(searched)) == {"first_part"}


@pytest.mark.slow
def test_a_study_of_parts(calm_model, heeded):
    """Queries are taught by the part of their sentence, and removing sentences is left out."""
    settings = make_settings({**OPTIONS, "max_answer_tokens": 48, "teacher_context": 64, "study": "on"})
    found, problem = study(calm_model, TEXT, QUERIES[:1], [], settings, Display(visible=False))
    job, parts = problem.job, TEXT.split("\n\n")
    for query, part in zip(job.queries[1:], job.part_of[1:], strict=True):
        assert query.span is not None
        assert TEXT[slice(*query.span)].strip() in parts[part]
    assert set(job.part_of.tolist()) == {0, 1, 2}
    assert found.uncovered == []
    again = tokenize(calm_model, TEXT, found.train, found.held_out, settings)
    assert again.part_of.tolist() == job.part_of.tolist()
    assert teacher_key(calm_model, again, settings.teacher) == teacher_key(calm_model, job, settings.teacher)


def test_the_report_says_that_there_were_parts(calm_model, problem, measured):
    found = reports.summarise(calm_model, problem, measured, TEXT, SETTINGS)
    assert found["parts"] == {
        "tokens": [55, 51, 52], "queries": [2, 1, 2], "by_origin": 1, "by_search": 4, "origin_found": 0,
    }  # fmt: skip
    assert "one of the context's 3 parts" in found["verdict"]["text"]
    assert "full context" not in found["verdict"]["text"]
    assert [query["part"] for query in found["queries"]] == [1, 2, 3, 3, 1]
    kl = {name: bracket.positions["kl"][3].sum() for name, bracket in measured.items()}
    against = found["gap_closed_vs_first_part"]["value"]  # of the one query of another part
    assert against == pytest.approx(1 - kl["prompt"] / kl["first_part"])


@pytest.mark.slow
def test_a_long_document_compressed_in_pieces_and_at_once(calm_model, tmp_path):
    """Killed in between, a run of three parts ends with the same bits; its report names them."""

    def stop(step):
        if step.number == 4:
            raise KeyboardInterrupt

    def run(out, **more):
        return jaxsp.compress(
            calm_model, TEXT, QUERIES, held_out=HELD_OUT, teacher_context=64, prompt_length=4, steps=6,
            batch_size=2, max_answer_tokens=6, checkpoint_every=2, progress=False, out=tmp_path / out, **more,
        )  # fmt: skip

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("pieces", callbacks=[stop])
    with pytest.raises(UserError, match="teacher_context was 64 and is now 65"):
        jaxsp.compress(
            calm_model, TEXT, QUERIES, held_out=HELD_OUT, teacher_context=65, out=tmp_path / "pieces",
            resume=True, progress=False,
        )  # fmt: skip
    pieces = run("pieces", resume=True)
    assert_same_sigma(pieces.prompt.sigma, whole.prompt.sigma)
    assert pieces.report["parts"] == whole.report["parts"]
    assert whole.prompt.sigma["context_length"] == 55  # z stands behind the longest
    text = (tmp_path / "whole" / "report.md").read_text()
    assert "read in 3 parts of 55, 51, 52 tokens" in text
    assert brackets.IN_PARTS["full_context"] in text
    assert brackets.BRACKETS["first_part"] in text
    found = jaxsp.evaluate(calm_model, whole.prompt, HELD_OUT, progress=False)
    assert found["parts"]["tokens"] == [55, 51, 52]
    ours = whole.report["held_out"]["brackets"]["prompt"]["kl"]
    assert found["held_out"]["brackets"]["prompt"]["kl"] == pytest.approx(ours, abs=1e-5)


@pytest.mark.slow
def test_many_documents_of_parts_beside_short_ones(calm_model):
    rows = [
        {"id": "long", "context": TEXT, "queries": QUERIES, "held_out": HELD_OUT, "teacher_context": 64},
        {"id": "short", "context": TEXT, "queries": QUERIES, "held_out": HELD_OUT},
    ]
    options = {**OPTIONS, "steps": 2, "batch_size": 2, "progress": False}
    long, short = jaxsp.compress_many(calm_model, rows, **options)
    (alone,) = jaxsp.compress_many(calm_model, rows[:1], **options)
    assert len(long.report["parts"]["tokens"]) == 3
    assert "parts" not in short.report
    assert_same_sigma(long.prompt.sigma, alone.prompt.sigma, atol=1e-4)
