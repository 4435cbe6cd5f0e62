"""On-policy training: σ's own answers under the teacher's distributions, the same after a resume."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
import pytest

import jaxsp
from jaxsp import distributions
from jaxsp.data.packing import Packing
from jaxsp.evaluation import report
from jaxsp.losses import Objective
from jaxsp.models import decoder
from jaxsp.progress import Display
from jaxsp.runs import on_policy
from jaxsp.runs.job import make_job
from jaxsp.runs.on_policy import OnPolicyRows
from jaxsp.runs.problems import Problems
from jaxsp.settings import make_settings
from jaxsp.teacher.another import Teacher
from jaxsp.teacher.problem import read_part, read_preamble
from jaxsp.teacher.store import Store
from jaxsp.training.slots import Slot, Step, TrainingJob
from jaxsp.training.start import start_state
from jaxsp.typing import UserError
from tests import tiny
from tests.conftest import CONTEXT, QUERIES, assert_same_sigma

OPTIONS: dict[str, Any] = {
    "prompt_length": 4, "kind": "embedding", "steps": 10, "batch_size": 3, "max_answer_tokens": 6,
    "evaluate_every": 10, "checkpoint_every": 4, "on_policy": 0.5, "on_policy_every": 5,
}  # fmt: skip
GIVEN = {"query": "Is it given?", "answer": "Yes."}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A wider model with a template of its own."""
    shape = {"model_type": "gemma2", "hidden_size": 48, "head_dim": 12}
    written = tiny.write(tmp_path_factory.mktemp("other") / "model", seed=1, gain=1.0, **shape)
    file = written / "tokenizer_config.json"
    (written / "chat_template.jinja").unlink(missing_ok=True)
    template = "{% for m in messages %}USER: {{ m['content'] }}\nBOT: {% endfor %}"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    return jaxsp.load_model(written, dtype="float32")


def made(model, teacher=None, **changed):
    """The rows of a job of which one query has an answer given, and σ before training."""
    facts = ["How long is the cable?", "Is the lid of steel?", "Of glass?"]
    queries, held_out = [*QUERIES[:4], *facts, GIVEN], QUERIES[7:8]
    row = {"id": "a", "context": CONTEXT, "queries": queries, "held_out": held_out}
    found = Teacher.of(model, teacher)
    job = make_job(model, row, {**OPTIONS, **changed}, found)
    problems, display = Problems(model, read_preamble(model), Store(None), found), Display(visible=False)
    problem = problems.of(job, display)
    own = OnPolicyRows(model, problems.asked, problems.teacher_preamble, problem, job.settings, display)
    return own, start_state(model, problem, job.settings).sigma


@pytest.mark.slow
@pytest.mark.parametrize("case", ["alone", "parts", "teacher"])
def test_the_teacher_speaks_on_the_prompts_own_answers(calm_model, other, case):
    """The answers are σ's greedy ones; there the targets are the teacher's, and all others stay."""
    teacher = other if case == "teacher" else None
    own, sigma = made(calm_model, teacher, **({"teacher_context": 48} if case == "parts" else {}))
    answers, rows = own.refreshed(sigma, 0)
    some = [i for i, ids in enumerate(answers) if ids is not None]
    problem, (params, config) = own.problem, (calm_model.params, calm_model.config)
    train, read = problem.train, problem.read
    assert len(some) == 4  # of the seven without an answer given
    assert some != [0, 1, 2, 3]
    assert (len(set(read.part_of[own._numbers[some]])) > 1) == (case == "parts")

    prefix = distributions.prompt_prefix(params, config, sigma, problem.preamble, "embedding")
    states = distributions.answer_hidden(params, config, prefix, rows.take(some))
    greedy = np.asarray(decoder.unembed(params, config, states)).argmax(axis=-1)
    mask, tokens = rows.mask[some], rows.targets["tokens"][some]
    np.testing.assert_array_equal(greedy[mask], tokens[mask])
    for ids, row, there in zip([answers[i] for i in some], tokens, mask, strict=True):
        assert ids == row[there].tolist()
    theirs = [problem.answers[own._numbers[i]] for i in some]
    assert [answers[i] for i in some] != theirs

    asked = own.teacher
    for i in some:
        number = own._numbers[i]
        context = read_part(asked, read, int(read.part_of[number]), own.teacher_preamble)
        ids = answers[i] or []
        alone = jaxsp.make_rows([read.query_ids[number]], [ids])
        expected = distributions.answer_hidden(asked.params, asked.config, context, alone)[0]
        found = rows.targets["hidden"][i, : len(ids)]
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    for i in set(range(len(train))) - set(some):
        for name in ("tokens", "hidden"):
            theirs = np.asarray(train.targets[name])[i, train.mask[i]]
            np.testing.assert_array_equal(np.asarray(rows.targets[name])[i, rows.mask[i]], theirs)
    jax.tree.map(np.testing.assert_array_equal, own.rows(answers), rows)
    assert "on_policy" in own.display.seconds


def test_other_queries_are_drawn_at_other_steps_and_by_other_seeds(calm_model):
    own, sigma = made(calm_model)
    again, _ = made(calm_model, seed=1)

    def drawn(own, step):
        return [i for i, ids in enumerate(own._answers(sigma, step)) if ids is not None]

    draws = [drawn(own, 0), drawn(own, 5), drawn(own, 10), drawn(again, 0)]
    assert len({tuple(draw) for draw in draws}) > 2
    assert draws[0] == drawn(own, 0)
    assert drawn(again, 0) != draws[0] or drawn(again, 5) != draws[1]
    assert all(7 not in draw for draw in draws)  # an answer is given


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (1.0, 7)])
def test_at_least_one_and_at_most_all_without_an_answer_given(calm_model, fraction, count):
    own, sigma = made(calm_model, on_policy=fraction)
    assert sum(ids is not None for ids in own._answers(sigma, 0)) == count


def test_an_id_that_the_teacher_lacks_leaves_its_own_answer(calm_model, monkeypatch):
    own, sigma = made(calm_model)
    monkeypatch.setattr(on_policy, "answer_ids", lambda *a, **k: [[5], [10**6], [5], [5]])
    assert sum(ids is not None for ids in own._answers(sigma, 0)) == 3


def test_off_and_without_open_queries_nothing_changes(calm_model):
    assert made(calm_model, on_policy=0.0)[0].as_training_takes_it() is None
    own, _ = made(calm_model)
    given = [[5] for _ in own.problem.job.given_ids]
    object.__setattr__(own.problem.job, "given_ids", given)
    assert own.as_training_takes_it() is None


class Killed(Exception):
    """Ends a run without a word: nothing is saved."""


@pytest.mark.slow
def test_killed_between_two_refreshes_and_resumed_equals_uninterrupted(tiny_model, tmp_path, monkeypatch):
    """To the bit, on a model where rounding grows; beside one that is to be refreshed just then."""
    monkeypatch.setattr(report, "write", lambda *_: None)  # plots take longer than all else
    job = {"context": CONTEXT, "queries": QUERIES}
    jobs = [
        {"id": "between", **job, "on_policy_every": 5},
        {"id": "then", **job, "seed": 1, "on_policy": 1.0, "on_policy_every": 4},
        {"id": "off", **job, "on_policy": 0.0},
    ]

    def run(out, **more):
        given: dict[str, Any] = {**OPTIONS, "at_once": 3, "progress": False, **more}
        return list(jaxsp.compress_many(tiny_model, jobs, out=tmp_path / out, **given))

    def kill(step: Step) -> None:
        if step.number == 9:
            raise Killed

    whole = run("whole")
    with pytest.raises(Killed):
        run("pieces", callbacks=[kill])
    pieces = run("pieces", resume=True)
    for ours, theirs in zip(pieces, whole, strict=True):
        assert_same_sigma(ours.prompt.sigma, theirs.prompt.sigma)
        for a, b in zip(ours.lines, theirs.lines, strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}
    between, _, off = whole
    assert between.lines[1]["loss"] != off.lines[1]["loss"]
    assert between.lines[0] == off.lines[0]  # what is held out stays
    assert between.report["settings"]["on_policy"] == 0.5
    seconds = [result.report["seconds"]["on_policy"] for result in whole]
    assert seconds[0] > seconds[2] == 0


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"parallel": "pmap"}, {"parallel": "mesh", "mesh": "data=2,model=2"}])
def test_every_driver_trains_on_them_like_one_device(calm_model, more):
    def run(**options):
        given: dict[str, Any] = {**OPTIONS, "batch_size": 8, "steps": 6, "progress": False, **options}
        return jaxsp.compress(calm_model, CONTEXT, QUERIES, **given)

    # Sums over devices have another order, by which Adam divides: 7e-6 was seen. As in test_many.
    assert_same_sigma(run(**more).prompt.sigma, run().prompt.sigma, atol=1e-4)


def square(student_logits, mask):
    return student_logits[..., 0] ** 2


@pytest.mark.parametrize(
    ("objective", "good"),
    [
        ("kl", True),
        ("reverse_kl", True),
        ("js(beta=0.3)", True),
        ("topk_kl", True),
        ("hidden_mse", True),
        ("nll", False),
        ("kl=0.7,nll=0.3", False),
        ("entropy", False),
        (Objective(square, ("student_logits",)), False),
    ],
)
def test_only_objectives_that_compare_with_the_teacher(objective, good):
    settings = make_settings({"objective": objective, "on_policy": 0.5})
    if good:
        on_policy.check(settings)
        return
    with pytest.raises(UserError, match=r"--on-policy 0.5 needs an objective that compares with the teacher"):
        on_policy.check(settings)
    on_policy.check(make_settings({"objective": objective}))


def test_where_every_answer_is_given_there_is_none_to_make(calm_model):
    queries = [{"query": query, "answer": "Yes."} for query in QUERIES]
    row = {"id": "a", "context": CONTEXT, "queries": queries}
    with pytest.raises(UserError, match=r"takes the place of the teacher's answers, but every"):
        make_job(calm_model, row, OPTIONS)
    assert make_job(calm_model, {**row, "study": "on"}, OPTIONS).settings.training.on_policy == 0.5


def test_a_free_slot_takes_nobodys_answers(calm_model):
    """In a list that was stopped a slot may hold a copy beside the answers of a prompt that has ended."""
    own, sigma = made(calm_model)
    answers, _ = own.refreshed(sigma, 0)
    state = start_state(calm_model, own.problem, own.settings)
    rows = own.problem.train, own.problem.held_out
    job = TrainingJob("a", state, *rows, Packing(2, 64), on_policy=own.as_training_takes_it())
    free, used = Slot(job, left=True), Slot(job)
    for slot in (free, used):
        slot.go_on_with(answers)
    assert free.answers is None
    assert free.job is job
    assert used.answers == answers
