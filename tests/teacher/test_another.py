"""Another model as the teacher: exact by its own head, refused where it can't be, part of what a run is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsp
from jaxsp import distributions
from jaxsp.data.documents import as_queries
from jaxsp.data.packing import Packing
from jaxsp.evaluation.metrics import OF_ANSWERS, at_positions, mean_kl_function
from jaxsp.models import decoder
from jaxsp.models.sharding import as_mesh
from jaxsp.options import WithTeacher
from jaxsp.progress import Display
from jaxsp.runs.job import make_job
from jaxsp.runs.runner import Runner
from jaxsp.runs.start import Start, run_one
from jaxsp.settings import make_settings
from jaxsp.teacher.another import Teacher
from jaxsp.teacher.problem import read_preamble, run_teacher, teacher_key, tokenize
from jaxsp.training.drivers import DRIVERS, sharded_update
from jaxsp.training.start import start_state
from jaxsp.training.state import stack
from jaxsp.training.update import Frozen, UpdateSettings, loss_totals
from jaxsp.typing import UserError
from tests import programs, tiny
from tests.conftest import CONTEXT, QUERIES, assert_same_sigma

SETTINGS = make_settings(
    {"prompt_length": 4, "kind": "embedding", "optimizer": "adam", "max_answer_tokens": 4, "batch_size": 4}
)
TEXTS = CONTEXT, as_queries(QUERIES[:4]), as_queries(QUERIES[4:6])
GEMMA = {"model_type": "gemma2", "hidden_size": 48, "head_dim": 12}
"""Wider than the student, and with a softcap of its logits."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def student(folder):
    return jaxsp.load_model(tiny.write(folder / "student", gain=1.0, vocab_size=260), dtype="float32")


@pytest.fixture(scope="module")
def other(folder):
    """Its vocabulary is padded by four more rows."""
    written = tiny.write(folder / "other", seed=1, gain=1.0, vocab_size=264, **GEMMA)
    return jaxsp.load_model(written, dtype="float32")


def taught(student, other, settings=SETTINGS):
    """The teacher, and the student's problem."""
    teacher = Teacher.of(student, other)
    assert teacher is not None
    asked = tokenize(other, *TEXTS, settings)
    said = run_teacher(other, asked, settings.teacher, read_preamble(other), Display(visible=False))
    own = tokenize(student, *TEXTS, settings)
    return teacher, teacher.problem(said, own, read_preamble(teacher.student), settings), said


@pytest.fixture(scope="module")
def lesson(student, other):
    return taught(student, other)


@pytest.fixture(scope="module")
def problem(lesson):
    return lesson[1]


def logits_of(model, preamble, job, rows):
    """The model's logits with the whole context before it, float64."""
    context = decoder.read_long(model.params, model.config, job.context_ids[None], preamble)
    states = distributions.answer_hidden(model.params, model.config, context, rows)
    return np.asarray(decoder.unembed(model.params, model.config, states), np.float64)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("swapped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_loss_and_gradient_are_those_of_the_teachers_own_logits(student, other, lesson, swapped):
    """In float64, over the tokens that both have, whichever has more rows; softcap and width are its own."""
    ours, theirs = (other, student) if swapped else (student, other)
    teacher, problem, said = taught(ours, theirs) if swapped else lesson
    assert problem.teacher_head is not None
    assert problem.teacher_head.softcap == theirs.config.logit_softcap
    rows, params, config = problem.rows, ours.params, ours.config
    rows = rows.with_targets(hidden=np.asarray(rows.targets["hidden"]))
    sigma = {"embeddings": ours.embed(problem.job.context_ids[:4]).astype(jnp.float32)}
    frozen, chosen = Frozen(params, problem.preamble, teacher.head), UpdateSettings.of(config, SETTINGS)

    @jax.jit
    def loss_and_gradient(sigma):
        def loss(sigma):
            one = jax.tree.map(lambda leaf: leaf[None], (sigma, rows))
            return loss_totals(one[0], frozen, one[1], chosen).total[0]

        return jax.value_and_grad(loss)(sigma)

    def logits_of_prompt(sigma):
        states = distributions.prompt_hidden(params, config, sigma, problem.preamble, rows, "embedding")
        return decoder.unembed(params, config, states)

    @jax.jit
    def pulled_back(sigma, cotangent):
        logits, back = jax.vjp(logits_of_prompt, sigma)
        return logits, back(cotangent)[0]["embeddings"]

    log_p = log_softmax(logits_of(theirs, said.preamble, said.job, said.rows)[..., :260])
    change = np.zeros((*rows.mask.shape, config.vocab_size), np.float32)
    log_q = log_softmax(pulled_back(sigma, change)[0][..., :260])
    value, gradient = loss_and_gradient(sigma)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    np.testing.assert_allclose(value, kl[rows.mask].sum(), rtol=1e-5)
    change[..., :260] = (np.exp(log_q) - np.exp(log_p)) * rows.mask[..., None]
    expected = pulled_back(sigma, change)[1]
    np.testing.assert_allclose(gradient["embeddings"], expected, atol=2e-5 * np.abs(expected).max())


def test_every_figure_is_by_the_teachers_head(student, other, problem):
    """Those that training watches, those of the report, and the teacher's own, which is the full context."""
    head, packing = problem.teacher_head, problem.packing
    sigma = {"embeddings": student.embed(problem.job.context_ids[:4]).astype(jnp.float32)}
    prefix = distributions.prompt_prefix(student.params, student.config, sigma, problem.preamble, "embedding")
    names = ("kl", "zero_one", "cosine_similarity")
    found = at_positions(student, prefix, problem.rows, packing, names, head)
    assert set(found) == {"kl", "zero_one"}  # hidden states of two widths are not compared
    states = distributions.answer_hidden(student.params, student.config, prefix, problem.rows)
    ours = np.asarray(decoder.unembed(student.params, student.config, states), np.float64)
    theirs = np.asarray(
        decoder.unembed(other.params, other.config, np.asarray(problem.rows.targets["hidden"])), np.float64
    )
    log_p, log_q, mask = log_softmax(theirs[..., :260]), log_softmax(ours), problem.rows.mask
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    np.testing.assert_allclose(found["kl"][mask], kl[mask], rtol=1e-4)
    differs = theirs[..., :260].argmax(axis=-1) != ours.argmax(axis=-1)
    assert found["zero_one"][mask].tolist() == differs[mask].tolist()
    watched = mean_kl_function(student, problem.preamble, "embedding", None, head)
    batch = packing.pack(problem.rows, np.arange(len(problem.rows)))
    together = jax.tree.map(lambda leaf: np.stack([leaf]), (sigma, batch))
    np.testing.assert_allclose(watched(together[0], [together[1]]), kl[mask].mean(), rtol=1e-4)
    full = at_positions(student, None, problem.rows, packing, ("kl", "zero_one", "nll"), head)
    assert np.abs(full["kl"]).max() == np.abs(full["zero_one"]).max() == 0
    own = -np.take_along_axis(log_p, problem.rows.targets["tokens"][..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(full["nll"][mask], own[mask], rtol=1e-4, atol=1e-6)


def steps(model, problem, head, parallel="jit", mesh=None, prompts=1):
    """The states of so many prompts, and their losses, after two steps."""
    frozen, chosen = Frozen(model.params, problem.preamble, head), UpdateSettings.of(model.config, SETTINGS)
    driver = DRIVERS[parallel](frozen, chosen, slots=prompts, mesh=mesh and as_mesh(mesh))
    starts = [
        start_state(model, problem, make_settings({"seed": seed}, base=SETTINGS)) for seed in range(prompts)
    ]
    states, losses = driver.place(stack(starts)), []
    longest = int(problem.rows.lengths.max())
    packing = Packing.of(problem.rows.lengths, 4).over(driver.multiple, longest)
    batch = packing.pack(problem.rows, np.arange(4))
    for _ in range(2):
        batches = jax.tree.map(lambda leaf: np.stack([leaf] * prompts), batch)
        states, metrics = driver.step(states, batches)
        losses.append(np.asarray(metrics["loss"]).tolist())
    return driver.fetch(states), losses


@pytest.mark.slow
def test_the_models_own_head_as_the_teachers_changes_no_bit(student):
    """Through all that another teacher goes through, to what is computed without one."""
    own = tokenize(student, *TEXTS, SETTINGS)
    alone = run_teacher(student, own, SETTINGS.teacher, read_preamble(student), Display(visible=False))
    teacher = Teacher(student, student)
    problem = teacher.problem(alone, own, read_preamble(student), SETTINGS)
    jax.tree.map(np.testing.assert_array_equal, problem.rows, alone.rows)
    with_head, plainly = (steps(student, alone, head) for head in (teacher.head, None))
    assert with_head[1] == plainly[1]
    assert_same_sigma(with_head[0].sigma, plainly[0].sigma)
    rows, packing, before = alone.rows, alone.packing, alone.preamble
    names = "kl", "zero_one"
    figures = [at_positions(student, before, rows, packing, names, head) for head in (teacher.head, None)]
    jax.tree.map(np.testing.assert_array_equal, *figures)


@pytest.mark.parametrize(
    ("parallel", "mesh", "prompts"),
    [
        pytest.param("mesh", "data=2,model=2", 1, marks=pytest.mark.slow),
        pytest.param("pmap", None, 1, marks=pytest.mark.slow),
        pytest.param("pmap", None, 8, marks=pytest.mark.slow),
        pytest.param("mesh", "data=2,model=2", 2, marks=pytest.mark.slow),
        pytest.param("mesh", "model=2", 1, marks=pytest.mark.slow),
        pytest.param("mesh", "fsdp=2,model=2", 2, marks=pytest.mark.slow),
        pytest.param("mesh", "fsdp=4", 1, marks=pytest.mark.slow),
    ],
)
def test_every_driver_trains_like_one_device(student, problem, parallel, mesh, prompts):
    expected, losses = steps(student, problem, problem.teacher_head, prompts=prompts)
    found, ours = steps(student, problem, problem.teacher_head, parallel, mesh, prompts)
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    assert_same_sigma(found.sigma, expected.sigma, within=1e-5)


def test_the_head_is_an_argument_of_the_program(student, problem):
    """Another head of this shape gives another loss without another program."""
    head = problem.teacher_head
    assert head is not None
    _, before = steps(student, problem, head)
    compiled = programs.count(sharded_update)
    _, after = steps(student, problem, dataclasses.replace(head, unembedding=2 * head.unembedding))
    assert programs.count(sharded_update) == compiled
    assert after[0] != before[0]


def test_of_fewer_queries_the_longest_answer_is_shorter(student, other):
    """The teacher's outputs for all that it was asked fit the rows of those that are kept."""
    own = [
        {"query": query, "answer": answer}
        for query, answer in zip(QUERIES[:3], ("a b", "c", "d"), strict=True)
    ]
    teacher, made = Teacher(other, student), as_queries(own)
    asked = tokenize(other, CONTEXT, made, [], SETTINGS)
    said = run_teacher(other, asked, SETTINGS.teacher, read_preamble(other), Display(visible=False)).take(
        [1, 2]
    )
    kept = tokenize(student, CONTEXT, made[1:], [], SETTINGS)
    rows = teacher.problem(said, kept, read_preamble(student), SETTINGS).rows
    assert rows.mask.shape[1] < said.rows.mask.shape[1]
    batch = Packing(1, 100).pack(rows, np.arange(2))
    assert batch.targets["hidden"].shape == (1, 100, other.config.width)


def test_texts_and_ends_are_each_models_own(folder, student):
    """The teacher is asked in its own template; where its answers end, the student's do."""
    written = tiny.write(folder / "template", seed=2, gain=1.0, vocab_size=260, eos_token_id=1)
    file = written / "tokenizer_config.json"
    (written / "chat_template.jinja").unlink(missing_ok=True)
    template = "{% for m in messages %}USER: {{ m['content'] }}\nBOT: {% endfor %}"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    other = jaxsp.load_model(written, dtype="float32")
    teacher, problem, said = taught(student, other)
    tokenizer: Any = other.tokenizer
    assert tokenizer.decode(said.job.query_ids[0]).endswith("\nBOT: ")
    assert problem.job.query_ids == tokenize(student, *TEXTS, SETTINGS).query_ids
    for one in (problem, said):
        query = one.job.query_ids[0]
        assert one.rows.tokens[0, : len(query)].tolist() == query
    assert problem.job.query_ids[0] != said.job.query_ids[0]
    assert (problem.rows.mask == said.rows.mask).all()
    np.testing.assert_array_equal(problem.rows.targets["tokens"], said.rows.targets["tokens"])
    np.testing.assert_array_equal(problem.rows.targets["hidden"], said.rows.targets["hidden"])
    assert teacher.student.stop_ids == (1, 2)
    assert teacher.summary["stop_ids"] == [1, 2]
    assert other.stop_ids == (1, 2)
    assert student.stop_ids == (2,)


def test_a_model_that_says_the_same_is_no_other_teacher(folder, student):
    assert Teacher.of(student, None) is None
    assert Teacher.of(student, student) is None
    assert Teacher.of(student, jaxsp.load_model(folder / "student", dtype="float32")) is None
    options: list[dict[str, Any]] = [{"dtype": "bfloat16"}, {"dtype": "float32", "quantization": "int8"}]
    for changes in options:
        assert Teacher.of(jaxsp.load_model(folder / "student", **changes), student) is not None


@pytest.fixture(scope="module")
def foreign(folder):
    """Models of other vocabularies: two tokens have changed places, one is another, one is more."""
    found = {}
    for name in ("swapped", "renamed", "added"):
        written = tiny.write(folder / name, seed=3, gain=1.0, vocab_size=260)
        file = written / "tokenizer.json"
        content = json.loads(file.read_text())
        words = content["model"]["vocab"]
        if name == "swapped":
            words["a"], words["b"] = words["b"], words["a"]
        else:
            words["aa"] = words.pop("b") if name == "renamed" else 259
            content["model"]["merges"] = [["a", "a"]]
        file.write_text(json.dumps(content))
        found[name] = jaxsp.load_model(written, dtype="float32")
    return found


def job(**more):
    return {"id": "a", "context": CONTEXT, "queries": QUERIES, **more}


FIRST = {**{n: v for n, v in vars(SETTINGS.prompt).items() if v is not None}, "max_answer_tokens": 4}


def test_another_vocabulary_is_refused_but_for_its_answers(student, foreign):
    for name, difference in (
        ("swapped", "the token 'a' has the id "),
        ("renamed", "it lacks the token 'b'"),
        ("added", "260 tokens, not 259"),
    ):
        teacher = Teacher.of(student, foreign[name])
        assert teacher is not None
        assert teacher.head is None
        assert teacher.difference is not None
        assert teacher.difference.startswith(difference)
        for objective in ("kl", "kl=0.5,nll=0.5", "hidden_mse"):
            with pytest.raises(UserError, match=r"another vocabulary than .* --objective nll"):
                make_job(student, job(), {**FIRST, "objective": objective}, teacher)
        make_job(student, job(), {**FIRST, "objective": "nll"}, teacher)
        assert "tokens only" in teacher.message


def test_answers_of_another_vocabulary_are_told_as_texts(student, foreign):
    other = foreign["swapped"]
    teacher, problem, said = taught(student, other)
    assert problem.has_other_teacher
    assert set(problem.rows.targets) == {"tokens"}
    for ours, theirs in zip(problem.answers, said.answers, strict=True):
        decoded = other.tokenizer.decode(theirs, skip_special_tokens=True)
        assert student.tokenizer.decode(ours, skip_special_tokens=True) == decoded
        assert (ours[-1] in student.stop_ids) == (theirs[-1] in other.stop_ids)
    assert teacher.student.stop_ids == student.stop_ids
    rows, packing = problem.rows, problem.packing
    found = at_positions(student, problem.preamble, rows, packing)
    assert set(found) == set(OF_ANSWERS)
    states = distributions.answer_hidden(student.params, student.config, problem.preamble, rows)
    log_q = log_softmax(np.asarray(decoder.unembed(student.params, student.config, states), np.float64))
    tokens = rows.targets["tokens"]
    nll = -np.take_along_axis(log_q, tokens[..., None], axis=-1)[..., 0] * rows.mask
    np.testing.assert_allclose(found["kl"], nll, rtol=1e-4, atol=1e-5)
    missed = (log_q.argmax(axis=-1) != tokens) & rows.mask
    assert found["zero_one"].tolist() == missed.astype(float).tolist()
    full = at_positions(student, None, rows, packing)
    assert all((values == 0).all() for values in full.values())


def test_refusals(folder, student, other):
    """Before any work, with the value and what to do."""
    smaller = dataclasses.replace(student, config=student.config.replace(window=40))
    narrow = dataclasses.replace(other, config=other.config.replace(window=40))
    bare = dataclasses.replace(other, tokenizer=None)
    for match, model, theirs, options in (
        ("hidden_mse compares hidden states, which have 48 entries in .* and 32 in", student, other,
         {"objective": "hidden_mse"}),
        (r"leave no room for the context in the model's window of 40\. Shorten", smaller, other, {}),
        (r"leave no room for the context in the model's window of 40\. Shorten", student, narrow, {}),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            make_job(model, job(), {**FIRST, **options}, Teacher(theirs, model))
    with pytest.raises(UserError, match="a row can't have a teacher of its own"):
        make_job(student, job(teacher="x"), FIRST)
    with pytest.raises(UserError, match="was loaded without a tokenizer"):
        Teacher.of(student, bare)


@pytest.mark.parametrize("initial", ["first", "match"])
def test_a_context_longer_than_the_students_window(student, other, initial):
    """The teacher has read all of it; the student starts from parts, and z stands after the longest."""
    small = dataclasses.replace(student, config=student.config.replace(window=120))
    settings = make_settings({"kind": "key_value", "initial": initial}, base=SETTINGS)
    _, problem, said = taught(small, other, settings)
    assert len(said.job.context_ids) == len(problem.job.context_ids) == 87
    assert len(said.job.parts) == 1
    assert len(problem.job.parts) > 1
    state = start_state(small, problem, settings)
    prefix = distributions.prompt_prefix(
        small.params, small.config, state.sigma, problem.preamble, "key_value"
    )
    end = int(prefix.next_position[0])
    assert end == len(problem.job.preamble_ids) + len(problem.job.longest_part.ids)
    assert end + problem.rows.lengths.max() <= small.config.window
    whole = start_state(student, taught(student, other, settings)[1], settings)
    assert float(whole.sigma["context_length"]) == 87


def test_the_teacher_decides_a_run(student, other, folder, tmp_path, monkeypatch):
    """Its name, weights and dtype: resumed with another or none, a run is refused with the difference."""
    monkeypatch.setattr(Runner, "results", lambda self: iter([None]))
    wider = jaxsp.load_model(folder / "other", dtype="bfloat16")
    start = Start(tmp_path / "out", False, False, Display(visible=False))
    run_one(student, job(), FIRST, start, other)
    again = dataclasses.replace(start, resume=True)
    run_one(student, job(), FIRST, again, other)
    for teacher, difference in (
        (None, r"teacher was '.*other' and is now None"),
        (wider, "teacher_dtype was 'float32' and is now 'bfloat16'"),
    ):
        with pytest.raises(UserError, match=difference):
            run_one(student, job(), FIRST, again, teacher)
    asked = tokenize(other, *TEXTS, SETTINGS)
    keys = {teacher_key(model, asked, SETTINGS.teacher) for model in (student, other, wider)}
    assert len(keys) == 3
    plainly = dataclasses.replace(start, out=tmp_path / "plain")
    run_one(student, job(), FIRST, plainly, student)  # which is none
    settings = json.loads((tmp_path / "plain" / "run" / "settings.json").read_text())
    assert not {"teacher", "teacher_weights", "teacher_dtype"} & set(settings)


def test_full_precision_teaches_an_int8_student(folder, student):
    """One model in two forms: reading the same text, the student is hardly off, and never right on."""
    rounded = WithTeacher(str(folder / "student"), "float32", "int8", teacher=str(folder / "student"))
    model = rounded.load()
    whole = rounded.load_teacher(model)
    assert whole is not None
    assert (model.config.quantization, whole.config.quantization) == ("int8", "none")
    teacher, problem, _ = taught(model, whole)
    assert teacher.summary["fingerprint"] == student.fingerprint
    context = decoder.read_long(model.params, model.config, problem.job.context_ids[None], problem.preamble)
    off, without = (
        at_positions(model, prefix, problem.rows, problem.packing, ("kl",), problem.teacher_head)["kl"].sum()
        for prefix in (context, problem.preamble)
    )
    assert 0 < off < 0.1 * without
    plainly = dataclasses.replace(rounded, quantization="none")
    assert plainly.load_teacher(student) is student  # the same in the same form: loaded once
    assert dataclasses.replace(plainly, teacher=None).load_teacher(student) is None


FAST = ("--length", 4, "--steps", 2, "--batch-size", 4, "--max-answer-tokens", 4, "--kind", "embedding")


@pytest.mark.slow
def test_from_the_command_line(jaxsp_command, folder, student, job, tmp_path):
    """The report and the manifest say by whom; resumed with another teacher, it is refused."""
    out = tmp_path / "out"
    words = (
        "compress", job["context"], "--queries", job["queries"], "--model", folder / "student",
        "--dtype", "float32", "--quantization", "int8", "--teacher", folder / "student", "--out", out,
    )  # fmt: skip
    code, printed, err = jaxsp_command(*words, *FAST)
    assert code == 0, err
    assert f"Taught by {folder / 'student'}." in err
    report = json.loads((out / "report.json").read_text())
    assert report["quantization"] == "int8"
    assert report["taught_by"]["quantization"] == "none"
    brackets = report["held_out"]["brackets"]
    assert brackets["full_context"]["kl"] == 0
    assert 0 < brackets["own_context"]["kl"] < 0.1 * brackets["no_context"]["kl"]
    assert "- taught by: " in (out / "report.md").read_text()
    assert "read by the teacher" in " ".join(printed.split())
    prompt = jaxsp.SoftPrompt.load(out)
    assert prompt.teacher == report["taught_by"]
    assert prompt.teacher is not None
    assert prompt.teacher["fingerprint"] == student.fingerprint
    code, _, err = jaxsp_command(*words, *FAST, "--resume", "--teacher", folder / "other")
    assert code == 2
    assert "teacher was " in err


@pytest.mark.slow
def test_a_prompt_is_measured_against_its_teacher(student, other, foreign, folder, tmp_path):
    """Also one that gave answers alone, and one of many; another teacher is refused."""
    options = {**FIRST, "steps": 2, "batch_size": 4, "progress": False}
    held_out = ["What is left?"]
    made = jaxsp.compress(
        student, CONTEXT, QUERIES, teacher=other, held_out=held_out, out=tmp_path / "a", **options
    )
    found = jaxsp.evaluate(student, tmp_path / "a", held_out, teacher=other, progress=False)
    for name in ("prompt", "no_context", "own_context"):
        ours, theirs = (report["held_out"]["brackets"][name]["kl"] for report in (found, made.report))
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert found["taught_by"] == made.report["taught_by"]
    with pytest.raises(UserError, match=r"was taught by .* Give the teacher that it was"):
        jaxsp.evaluate(student, tmp_path / "a", held_out, teacher=student, progress=False)
    jobs = [job(id=name, held_out=held_out, **more) for name, more in (("x", {}), ("y", {"seed": 1}))]
    many = list(jaxsp.compress_many(student, jobs, teacher=other, out=tmp_path / "many", **options))
    assert_same_sigma(many[0].prompt.sigma, made.prompt.sigma, atol=1e-4)
    answers = jaxsp.compress(
        student, CONTEXT, QUERIES, teacher=foreign["swapped"], held_out=held_out, objective="nll",
        out=tmp_path / "answers", **options,
    )  # fmt: skip
    figures = answers.report["held_out"]["brackets"]
    assert figures["full_context"]["kl"] == 0
    assert figures["prompt"]["kl"] == pytest.approx(figures["prompt"]["nll"])
    assert "tokens only" in (tmp_path / "answers" / "report.md").read_text()
    again = jaxsp.evaluate(student, tmp_path / "answers", held_out, progress=False)
    assert again["held_out"]["brackets"]["prompt"]["kl"] == pytest.approx(figures["prompt"]["kl"], rel=1e-4)
    assert Path(tmp_path / "many" / "results.parquet").is_file()


@pytest.mark.slow
def test_the_teacher_studies_a_document_that_the_student_has_no_room_for(folder, other, heeded, tmp_path):
    written = tiny.write(folder / "small", gain=1.0, vocab_size=260, max_position_embeddings=240)
    model, options = jaxsp.load_model(written, dtype="float32"), {**FIRST, "kind": "per_head", "steps": 2}
    text = f"{CONTEXT} {CONTEXT} {CONTEXT}"
    options["max_answer_tokens"] = 48
    found = jaxsp.compress(
        model, text, teacher=other, study_queries=6, out=tmp_path / "out", progress=False, **options
    )
    assert found.report["settings"]["initial"] == "match"
    assert found.report["context_parts"] > 1
    assert "parts" not in found.report  # those of the teacher, which has read it whole
    brackets = found.report["held_out"]["brackets"]
    assert {"first_part", "retrieved_part"} <= set(brackets)
    assert "own_context" not in brackets
    assert found.report["prefill_seconds"]["full_context"] > 0
    said = (tmp_path / "out" / "report.md").read_text()
    assert "for the longest part of the context" in said
    assert "parts together" not in said
    assert isinstance(found.ask("How long?", max_tokens=4), str)
