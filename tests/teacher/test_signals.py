"""The contract of the teacher's signals, over the table: a new entry is covered by its line there."""

from __future__ import annotations

import dataclasses
import re
import shutil
from typing import Any

import jax
import numpy as np
import pytest

import jaxsp
from jaxsp import distributions, plan, processes
from jaxsp.data.documents import as_queries
from jaxsp.data.examples import TARGET_INPUTS
from jaxsp.data.packing import Packing
from jaxsp.data.ragged import Ragged
from jaxsp.evaluation.metrics import OF_TOP_K, POSITION_METRICS, at_positions
from jaxsp.losses import OBJECTIVES, as_objective
from jaxsp.models import decoder
from jaxsp.models.output_head import OutputHead
from jaxsp.models.sharding import as_mesh
from jaxsp.plan.program import batch_shapes
from jaxsp.progress import Display
from jaxsp.runs.job import make_job
from jaxsp.runs.on_policy import OnPolicyRows
from jaxsp.runs.problems import Problems, bracket_key
from jaxsp.settings import make_settings
from jaxsp.teacher import problem as problems, targets
from jaxsp.teacher.another import Teacher
from jaxsp.teacher.problem import read_part, read_preamble, run_teacher, said_key, teacher_key, tokenize
from jaxsp.teacher.signals import SIGNALS, USUAL, Wanted
from jaxsp.teacher.store import Store, entries
from jaxsp.training.drivers import DRIVERS
from jaxsp.training.start import start_state
from jaxsp.training.state import stack
from jaxsp.training.update import Frozen, UpdateSettings
from jaxsp.typing import Interrupted, UserError
from tests import programs, tiny
from tests.conftest import CONTEXT, QUERIES, assert_same_sigma

OBJECTIVE = {"hidden": "kl", "top_k": "topk_kl(k=5)"}
"""For each signal, an objective that needs it."""
SETTINGS: dict[str, Any] = {"prompt_length": 4, "kind": "embedding", "batch_size": 4, "max_answer_tokens": 6}
FACTS = ["How long is the cable?", "Is the lid of steel?"]
V = tiny.VOCAB

names = pytest.mark.parametrize("name", SIGNALS)


def wanted(name: str, tokens: int = V) -> Wanted:
    return Wanted.by(as_objective(OBJECTIVE[name]), tokens)


def asked(model, wanted, store=None, parts=False, **more):
    """The problem of eight queries to train on and two held out."""
    settings = make_settings({**SETTINGS, **({"teacher_context": 48} if parts else {})})
    train = [*FACTS, *QUERIES[2:8]]
    job = tokenize(model, CONTEXT, as_queries(train), as_queries(QUERIES[8:]), settings)
    display, preamble = Display(visible=False), read_preamble(model)
    return run_teacher(model, job, settings.teacher, preamble, display, store, wanted, **more)


def leaves(rows, name: str) -> list[np.ndarray]:
    """A signal's arrays, where there is an answer."""
    return [np.concatenate(leaf.rows) for leaf in jax.tree.leaves(rows.targets[name])]


def assert_equal(ours, theirs) -> None:
    assert ours.answers == theirs.answers
    for a, b in zip(jax.tree.leaves(ours.rows), jax.tree.leaves(theirs.rows), strict=True):
        np.testing.assert_array_equal(a, b)


# Whatever the signal


def test_every_signal_has_an_objective_here_and_inputs():
    assert set(SIGNALS) == set(OBJECTIVE) == set(TARGET_INPUTS) - {"tokens"}
    for name, objective in OBJECTIVE.items():
        assert wanted(name).train == name
        assert name in as_objective(objective).needs
        assert SIGNALS[name].__doc__


@names
def test_those_to_train_on_have_it_and_those_held_out_have_all(calm_model, name):
    """Nobody asks for what a row has not: a batch of both would be an error."""
    problem = asked(calm_model, wanted(name))
    assert set(problem.train.targets) == {"tokens", name}
    assert set(problem.held_out.targets) == {"tokens", "hidden"}
    assert len(problem.train) == 8
    assert all(len(array) == problem.train.mask.sum() for array in leaves(problem.train, name))
    assert problem.take([9, 0, 1], train=0).wanted == problem.wanted
    if name != "hidden":
        sizes = [len(row) for row in problem.rows.targets["hidden"].rows]
        assert sizes == [0] * 8 + problem.rows.mask[8:].sum(axis=1).tolist()
        with pytest.raises(ValueError, match="broadcast"):
            problem.packing.pack(problem.rows, np.array([7, 8]))
    inputs = problem.train.teacher_inputs
    assert set(TARGET_INPUTS[name]) < set(inputs)


@names
def test_what_is_written_is_read(calm_model, tmp_path, monkeypatch, name):
    """Every bit, of several files, from mapped ones; a second run asks nobody, and says so."""
    monkeypatch.setattr(targets, "SHARD_BYTES", 300)
    memory, lines = asked(calm_model, wanted(name)), list[str]()
    written = asked(calm_model, wanted(name), Store(tmp_path))
    monkeypatch.setattr(problems, "answer_ids", None)
    monkeypatch.setattr(targets, "in_batches", None)
    read = asked(calm_model, wanted(name), Store(tmp_path, say=lines.append))
    assert lines == [f"Teacher's answers and signals: read from {tmp_path}"]
    assert len(list(tmp_path.glob(f"*/{name}-0-*.bin"))) > 2
    for problem in (written, read):
        assert_equal(problem, memory)
        for leaf in jax.tree.leaves(problem.train.targets[name]):
            assert isinstance(leaf, Ragged)
            assert not any(row.flags.owndata for row in leaf.rows if len(row))
    shutil.rmtree(tmp_path)
    assert_equal(read, memory)


@names
def test_damage_is_an_error_of_a_run_and_mended_in_the_shared_store(calm_model, tmp_path, name):
    first = asked(calm_model, wanted(name), Store(None, tmp_path / "shared"))
    (entry,) = (tmp_path / "shared").iterdir()
    file, lines = entry / f"{name}-0-00000.bin", list[str]()
    data = file.read_bytes()
    file.unlink()  # the problem at hand reads the old one
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    again = asked(calm_model, wanted(name), Store(None, tmp_path / "shared", lines.append))
    assert_equal(again, first)
    assert re.search(rf"{file.name} has another SHA-256 .* It is made anew\.", lines[0]), lines
    asked(calm_model, wanted(name), Store(tmp_path / "own", tmp_path / "shared"))
    (tmp_path / "own" / entry.name / file.name).unlink()
    with pytest.raises(UserError, match=rf"{file.name} is missing. Start anew with --overwrite."):
        asked(calm_model, wanted(name), Store(tmp_path / "own", tmp_path / "shared"))


@names
def test_a_row_says_in_a_part_what_it_says_alone(calm_model, name):
    """Each query by the part that it is taught by; whatever it is packed with."""
    problem = asked(calm_model, wanted(name), parts=True)
    parts, numbers = np.unique(problem.job.part_of[:8], return_index=True)
    assert len(parts) > 1
    rows, params, config = problem.train, calm_model.params, calm_model.config
    for i in numbers.tolist():
        context = read_part(calm_model, problem.job, int(problem.job.part_of[i]), problem.preamble)
        row = jaxsp.make_rows([problem.job.query_ids[i]], [problem.answers[i]])
        alone = SIGNALS[name].at_positions(params, config, context, row, **dict(problem.wanted.options))
        for found, expected in zip(jax.tree.leaves(rows.targets[name]), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(found[i, : len(problem.answers[i])], expected[0], rtol=1e-4, atol=1e-5)


def steps(model, problem, settings, parallel="jit", mesh=None):
    """The state and the losses of two prompts after three steps."""
    frozen, chosen = Frozen(model.params, problem.preamble), UpdateSettings.of(model.config, settings)
    driver = DRIVERS[parallel](frozen, chosen, slots=2, mesh=mesh and as_mesh(mesh))
    starts = [start_state(model, problem, make_settings({"seed": s}, base=settings)) for s in range(2)]
    states, losses = driver.place(stack(starts)), []
    train = problem.train
    packing = Packing.of(train.lengths, 4).over(driver.multiple, int(train.lengths.max()))
    for i in range(3):
        batches = [packing.pack(train, (np.arange(4) + i + s) % 8) for s in range(2)]
        states, metrics = driver.step(states, jax.tree.map(lambda *leaves: np.stack(leaves), *batches))
        losses.append(np.asarray(metrics["loss"]).tolist())
    return driver.fetch(states), losses


@pytest.fixture(scope="module")
def even_model(tmp_path_factory):
    """Its heads and its vocabulary divide by two and four."""
    folder = tmp_path_factory.mktemp("model")
    written = tiny.write(folder, gain=1.0, num_key_value_heads=4, vocab_size=260, tie_word_embeddings=True)
    return jaxsp.load_model(written, dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [("pmap", None), ("mesh", "data=2,model=2"), ("mesh", "data=8")])
@names
def test_every_driver_trains_on_it_like_one_device(even_model, name, layout):
    settings = make_settings({**SETTINGS, "objective": OBJECTIVE[name], "optimizer": "adam"})
    problem = asked(even_model, wanted(name, 260))
    expected, losses = steps(even_model, problem, settings)
    found, ours = steps(even_model, problem, settings, *layout)
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    assert_same_sigma(found.sigma, expected.sigma, within=1e-5)
    assert losses[2] != losses[0]


@names
def test_a_plan_knows_the_shapes_of_its_batches(calm_model, name):
    problem, packing = asked(calm_model, wanted(name)), Packing(2, 100)
    planned = batch_shapes(calm_model.config, packing, as_objective(OBJECTIVE[name]))
    batch = packing.pack(problem.train, np.arange(2))
    assert jax.tree.structure(planned) == jax.tree.structure(batch)
    shapes = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(one)] for one in (planned, batch)]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_a_plan_counts_the_bytes_of_what_is_kept(calm_model):
    """Each answer position takes 8 k + 4 bytes in place of four times the width."""
    packing, config = Packing(2, 100), calm_model.config
    settings = [make_settings({**SETTINGS, "objective": OBJECTIVE[n]}) for n in ("hidden", "top_k")]
    sizes = [
        programs.memory(plan.compiled(config, one, packing, None)).argument_size_in_bytes for one in settings
    ]
    assert sizes[0] - sizes[1] == packing.tokens * (4 * config.width - (8 * 5 + 4))


@names
def test_two_processes_say_what_one_says(calm_model, name, monkeypatch):
    """Each every second row of those that have it; what both said is put together."""
    whole = asked(calm_model, wanted(name))
    job, chosen = whole.job, whole.wanted
    rows = dataclasses.replace(whole.rows, targets={"tokens": whole.rows.targets["tokens"]})
    places = chosen.rows(job.is_train)
    prefix = read_part(calm_model, job, 0, whole.preamble)
    shares = []
    for process in range(2):
        monkeypatch.setattr(processes, "rank_and_count", lambda process=process: (process, 2))
        said = targets.by_part(calm_model, lambda _: prefix, 1, job.part_of, rows, chosen, places)
        shares.append(targets.in_order(said))
    theirs = iter([leaf for name in shares[0] for leaf in jax.tree.leaves(shares[1][name])])

    def gather(values, things):
        every = np.zeros((things, *values.shape[1:]), values.dtype)
        every[::2], every[1::2] = values, next(theirs).padded(values.shape[1])
        return every

    monkeypatch.setattr(processes, "gather_strided", gather)
    found = targets.gathered(shares[0], rows, places)
    assert set(found) == set(places)
    for name, values in found.items():
        for ours, expected in zip(
            jax.tree.leaves(values), jax.tree.leaves(whole.rows.targets[name]), strict=True
        ):
            for a, b in zip(ours.rows, expected.rows, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@names
def test_a_mesh_says_what_one_device_says(even_model, name):
    expected, found = (
        asked(model, wanted(name, 260)) for model in (even_model, even_model.on(as_mesh("data=2,model=4")))
    )
    assert found.answers == expected.answers
    for ours, theirs in zip(leaves(found.train, name), leaves(expected.train, name), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@names
def test_a_whole_run_goes_on_to_the_same_bits_and_is_one_of_many(tiny_model, tmp_path, name):
    """Also with sampled answers, and on the prompt's own."""
    options: dict[str, Any] = {
        **SETTINGS, "objective": OBJECTIVE[name], "steps": 8, "checkpoint_every": 3, "progress": False,
        "answers": "sampled:2", "on_policy": 0.5, "on_policy_every": 4,
    }  # fmt: skip

    def stop(step):
        if step.number == 6:
            raise KeyboardInterrupt

    def run(out, **more):
        return jaxsp.compress(tiny_model, CONTEXT, QUERIES, out=tmp_path / out, **options, **more)

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("pieces", callbacks=[stop])
    pieces = run("pieces", resume=True)
    assert_same_sigma(pieces.prompt.sigma, whole.prompt.sigma)
    row = {"id": "a", "context": CONTEXT, "queries": QUERIES}
    (many,) = jaxsp.compress_many(tiny_model, [row], **options)
    assert_same_sigma(many.prompt.sigma, whole.prompt.sigma)
    losses = [line["loss"] for line in whole.lines[1:]]
    assert losses[-1] < losses[0]


# The best tokens and the mass of the rest


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def exact(model, problem, rows, tokens=None):
    """The teacher's log-probabilities at every answer position, from whole logits in float64."""
    context = read_part(model, problem.read, 0, read_preamble(model))
    states = distributions.answer_hidden(model.params, model.config, context, rows)
    logits = np.asarray(decoder.unembed(model.params, model.config, states), np.float64)
    return log_softmax(logits[..., :tokens])


def test_the_best_tokens_are_those_of_the_whole_distribution(calm_model):
    problem = asked(calm_model, wanted("top_k"))
    rows = problem.train
    log_p = exact(calm_model, problem, rows)[rows.mask]
    order = np.argsort(-log_p, axis=-1, kind="stable")
    log_probs, ids, tail = leaves(rows, "top_k")
    assert (log_probs.dtype, ids.dtype, tail.dtype) == (np.float32, np.int32, np.float32)
    np.testing.assert_array_equal(ids, order[:, :5])
    ordered = np.take_along_axis(log_p, order, axis=-1)
    np.testing.assert_allclose(log_probs, ordered[:, :5], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tail, np.exp(ordered[:, 5:]).sum(axis=-1), rtol=1e-4)
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=-1) + tail, 1, atol=1e-5)


def test_a_token_takes_as_many_bytes_as_are_said(calm_model, tmp_path):
    """8 k + 4 of the training queries, where the last hidden states take four times the width."""
    problem = asked(calm_model, Wanted.by(as_objective("topk_kl"), V), Store(tmp_path))
    (entry,) = tmp_path.iterdir()
    sizes = {file.name: file.stat().st_size for file in entry.glob("*.bin")}
    counts = problem.rows.mask.sum(axis=1)
    assert sum(size for name, size in sizes.items() if name.startswith("top_k")) == 516 * counts[:8].sum()
    hidden = sum(size for name, size in sizes.items() if name.startswith("hidden"))
    assert hidden == 4 * calm_model.config.width * counts[8:].sum()
    assert "516" in (SIGNALS["top_k"].__doc__ or "")


@pytest.mark.slow
def test_all_tokens_are_the_full_divergence(calm_model):
    """Trained on as many as there are, σ goes the way of kl, but for rounding."""
    found = {}
    for objective in ("kl", "topk_kl(k=1000)", "topk_kl(k=3)"):
        settings = make_settings({**SETTINGS, "objective": objective, "optimizer": "adam"})
        problem = asked(calm_model, Wanted.by(as_objective(objective), V))
        found[objective] = steps(calm_model, problem, settings)
    (state, losses), (other, theirs), (_, coarse) = found.values()
    np.testing.assert_allclose(theirs, losses, rtol=1e-4, atol=1e-6)
    assert_same_sigma(other.sigma, state.sigma, within=1e-3)
    assert (np.array(coarse[0]) < np.array(losses[0]) - 1e-3).all()


def test_training_figures_are_those_of_the_entries(calm_model):
    """On training queries by the best tokens, on those held out by all; the KL is at most the whole one."""
    problem = asked(calm_model, wanted("top_k"))
    usual = asked(calm_model, USUAL)
    assert problem.answers == usual.answers
    ours, theirs = (
        at_positions(calm_model, problem.preamble, one.train, problem.packing) for one in (problem, usual)
    )
    assert set(ours) == set(OF_TOP_K) < set(POSITION_METRICS)
    assert (ours["kl"] <= theirs["kl"] + 1e-5).all()
    assert ours["kl"].sum() > 0.1 * theirs["kl"].sum() > 0
    for name in ("zero_one", "nll", "entropy"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
    held_out = [
        at_positions(calm_model, problem.preamble, one.held_out, problem.packing) for one in (problem, usual)
    ]
    for name, values in held_out[0].items():  # by all: but for the rounding of other batches
        np.testing.assert_allclose(values, held_out[1][name], rtol=1e-4, atol=1e-5)


def test_answers_that_the_teacher_gave_are_not_asked_for_again(calm_model, tmp_path, monkeypatch):
    """After a run on kl one on the best tokens reads the answers; of another number it is another entry."""
    usual = asked(calm_model, USUAL, Store(None, tmp_path))
    monkeypatch.setattr(problems, "answer_ids", None)
    lines = list[str]()
    found = asked(calm_model, wanted("top_k"), Store(None, tmp_path, lines.append))
    assert found.answers == usual.answers
    assert lines == [f"Teacher's answers: read from {tmp_path}"]
    store = Store(tmp_path.with_name("own"), tmp_path)
    asked(calm_model, Wanted.by(as_objective("topk_kl(k=6)"), V), store)
    assert len(list(tmp_path.iterdir())) == 3
    (own,) = tmp_path.with_name("own").iterdir()  # not the hidden states, of which it took the answers
    assert list(own.glob("top_k-*.bin"))
    kinds = sorted(entry.about["kind"] for entry in entries(tmp_path))
    assert kinds == ["teacher", "teacher (top_k)", "teacher (top_k)"]


@pytest.mark.slow
def test_objectives_of_one_document_share_its_answers(calm_model, monkeypatch):
    """The teacher of many jobs in one run, without a store, is asked once, whatever each needs of it."""
    calls, answer_ids = [], problems.answer_ids
    monkeypatch.setattr(problems, "answer_ids", lambda *a, **k: calls.append(1) or answer_ids(*a, **k))
    row = {"context": CONTEXT, "queries": QUERIES}
    jobs = [{"id": f"{i}", "objective": o, **row} for i, o in enumerate(("topk_kl", "kl", "truncated_kl"))]
    found = list(jaxsp.compress_many(calm_model, jobs, steps=2, progress=False, **SETTINGS))
    assert len(calls) == 1
    assert ["best_tokens" in result.report["train"] for result in found] == [True, False, True]
    brackets = [result.report["held_out"]["brackets"]["no_context"] for result in found]
    for found in brackets[1:]:
        assert found == pytest.approx(brackets[0], rel=1e-4, abs=1e-6)


def test_the_key_holds_what_is_wanted_and_of_which_queries(calm_model):
    settings = make_settings(SETTINGS)
    texts = as_queries(QUERIES)
    jobs = [tokenize(calm_model, CONTEXT, texts[:n], texts[n:], settings) for n in (8, 7)]

    def keys(objective, tokens=V):
        chosen = Wanted.by(as_objective(objective), tokens)
        return [said_key(teacher_key(calm_model, job, settings.teacher), job, chosen) for job in jobs]

    for objective in ("kl", "nll", "hidden_mse", "kl=0.5,topk_kl=0.5"):  # hidden states give the others, too
        assert keys(objective) == [teacher_key(calm_model, job, settings.teacher) for job in jobs]
    found = [*keys("kl"), *keys("topk_kl"), *keys("topk_kl(k=5)"), *keys("topk_kl", 200)]
    assert len(set(found)) == 7  # of kl it does not matter which are to train on
    assert keys("topk_kl") == keys("truncated_kl") == keys("topk_kl(k=64)") == keys("topk_kl=0.5,nll=0.5")
    sigma = {"embeddings": calm_model.embed(jobs[0].context_ids[:4])}
    brackets = [
        bracket_key(calm_model, jobs[0], make_settings({"objective": o}, base=settings), sigma)
        for o in ("kl", "js", "topk_kl")
    ]
    assert brackets[0] == brackets[1] != brackets[2]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A wider model with a softcap, and a vocabulary that is padded by more rows."""
    shape = {"model_type": "gemma2", "hidden_size": 48, "head_dim": 12, "vocab_size": 264}
    written = tiny.write(tmp_path_factory.mktemp("other") / "model", seed=1, gain=1.0, **shape)
    return jaxsp.load_model(written, dtype="float32")


def made(model, teacher=None, **changed):
    """The problem of a job, and what gives its rows with some of the prompt's own answers."""
    row = {"id": "a", "context": CONTEXT, "queries": QUERIES[:4], "held_out": QUERIES[7:8]}
    found = Teacher.of(model, teacher)
    job = make_job(
        model, row, {**SETTINGS, "objective": OBJECTIVE["top_k"], "on_policy": 0.5, **changed}, found
    )
    every = Problems(model, read_preamble(model), Store(None), found)
    display = Display(visible=False)
    problem = every.of(job, display)
    own = OnPolicyRows(model, every.asked, every.teacher_preamble, problem, job.settings, display)
    return problem, own


@pytest.mark.parametrize("swapped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_another_model_teaches_over_the_tokens_that_both_have(even_model, other, swapped):
    """By its own head and softcap, whichever has more rows: the loss is that of its hidden states."""
    student, teacher = (other, even_model) if swapped else (even_model, other)
    problem, _ = made(student, teacher)
    rows, tokens = problem.train, 260
    assert problem.wanted == Wanted("top_k", (("k", 5), ("tokens", tokens)))
    said = jaxsp.make_rows(
        [problem.read.query_ids[i] for i in range(4)],
        [row[mask].tolist() for row, mask in zip(rows.targets["tokens"], rows.mask, strict=True)],
    )
    log_p = exact(teacher, problem, said, tokens)[said.mask]
    order = np.argsort(-log_p, axis=-1, kind="stable")[:, :5]
    np.testing.assert_array_equal(leaves(rows, "top_k")[1], order)
    found = np.take_along_axis(log_p, order, axis=-1)
    np.testing.assert_allclose(leaves(rows, "top_k")[0], found, rtol=1e-4, atol=1e-5)
    usual, _ = made(student, teacher, objective="kl")
    sigma = {"embeddings": student.embed(problem.job.context_ids[:4]).astype("float32")}
    prefix = distributions.prompt_prefix(student.params, student.config, sigma, problem.preamble, "embedding")
    states = distributions.answer_hidden(student.params, student.config, prefix, usual.train)
    own, theirs = OutputHead.of(student.params, student.config), problem.teacher_head
    expected = distributions.compare("topk_kl(k=5)", states, own, usual.train, theirs)[0]
    found = at_positions(student, prefix, rows, problem.packing, ("topk_kl",), theirs)["topk_kl"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert found.sum() > 0.01


@pytest.mark.slow
def test_the_teacher_says_it_on_the_prompts_own_answers(even_model, other):
    for teacher in (None, other):
        problem, own = made(even_model, teacher)
        rows = own.refreshed(start_state(even_model, problem, own.settings).sigma, 0)[1]
        said = teacher or even_model
        changed = [
            i for i in range(4) if rows.targets["tokens"][i, rows.mask[i]].tolist() != problem.answers[i]
        ]
        assert changed
        ids = [row[mask].tolist() for row, mask in zip(rows.targets["tokens"], rows.mask, strict=True)]
        alone = jaxsp.make_rows([problem.read.query_ids[i] for i in range(4)], ids)
        log_p = exact(said, problem, alone, 260)[alone.mask]
        order = np.argsort(-log_p, axis=-1, kind="stable")[:, :5]
        np.testing.assert_array_equal(leaves(rows, "top_k")[1], order)


@pytest.mark.slow
def test_a_document_alone_gives_what_it_needs(calm_model, heeded, tmp_path):
    """A study knows the hidden states of all its queries; of those to train on the best tokens are kept."""
    settings: dict[str, Any] = {**SETTINGS, "max_answer_tokens": 48, "steps": 2, "study_queries": 4}
    found = jaxsp.compress(
        calm_model, CONTEXT, objective=OBJECTIVE["top_k"], out=tmp_path / "out", progress=False, **settings
    )
    files = (tmp_path / "out" / "run" / "teachers").glob("*/*.bin")
    assert {file.name.split("-")[0] for file in files} == {"hidden", "top_k"}
    kinds = [entry.about["kind"] for entry in entries(tmp_path / "out" / "run" / "teachers")]
    assert sorted(kinds) == ["study", "teacher (top_k)"]
    assert found.report["train"]["best_tokens"] == 5
    said = " ".join((tmp_path / "out" / "report.md").read_text().split())
    assert "The KL on these is that of the teacher's 5 best tokens and of all others together" in said


def test_no_signal_but_the_usual_needs_an_objective_that_asks_for_it():
    for entry in OBJECTIVES.values():
        expected = "top_k" if entry.compares_best else "hidden"
        assert Wanted.by(entry, V).train == expected
    assert Wanted.by(as_objective("topk_kl"), 20).options == (("k", 20), ("tokens", 20))
