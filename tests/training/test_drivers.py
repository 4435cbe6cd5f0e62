"""Layouts of devices: each gives what one device gives, with no more said between them than needed."""

from __future__ import annotations

import re
import shutil
from collections import Counter

import numpy as np
import pytest

import jaxsp
from jaxsp import stages
from jaxsp.progress import Display
from jaxsp.data.documents import as_queries
from jaxsp.data.packing import Packing
from jaxsp.evaluation.brackets import read_context
from jaxsp.models.sharding import as_mesh
from jaxsp.settings import make_settings
from jaxsp.training.drivers import DRIVERS, MeshDriver
from jaxsp.training.update import Frozen
from jaxsp.typing import UserError
from tests import tiny
from tests.conftest import CONTEXT, QUERIES

LAYOUTS = ["data=8", "data=2,model=4", "model=4", "data=4,model=2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Eight heads of four widths, and a vocabulary that divides: for four devices."""
    directory = tiny.write(
        tmp_path_factory.mktemp("model"),
        gain=1.0,
        num_key_value_heads=4,
        vocab_size=260,
        tie_word_embeddings=True,
    )
    return jaxsp.load_model(directory, dtype="float32")


@pytest.fixture(scope="module")
def lesson(model):
    settings = make_settings({"length": 4, "steps": 10, "max_answer_tokens": 6})
    queries = as_queries(QUERIES)
    task = stages.encode_task(model, CONTEXT, queries[:8], queries[8:], settings)
    before = read_context(model, task.before_ids)
    return stages.teach(model, task, settings, before, None, Display(visible=False))[0]


def driver_of(model, lesson, parallel, mesh=None):
    settings = stages.update_settings(model.config, lesson.settings)
    frozen = Frozen(model.params, lesson.before)
    return DRIVERS[parallel](frozen, settings, mesh and as_mesh(mesh))


def trained(model, lesson, driver):
    rows, packing = lesson.train_rows, lesson.packing
    spread = packing.over(driver.multiple, int(rows.lengths.max()))
    state = driver.place(stages.initial_state_of(model, lesson))
    losses = []
    for _ in range(lesson.settings.steps):
        fetched = driver.fetch(state)
        drawn = packing.draw(rows.lengths, int(fetched.cursor), np.asarray(fetched.key))
        state, metrics = driver.step(state, spread.pack(rows, drawn))
        losses.append(float(metrics["loss"]))
    return losses, np.asarray(driver.fetch(state).sigma["embeddings"])


@pytest.fixture(scope="module")
def on_one_device(model, lesson):
    return trained(model, lesson, driver_of(model, lesson, "jit"))


@pytest.mark.parametrize("mesh", [None, *LAYOUTS])
def test_every_layout_trains_like_one_device(model, lesson, on_one_device, mesh):
    driver = driver_of(model, lesson, "mesh" if mesh else "pmap", mesh)
    losses, sigma = trained(model, lesson, driver)
    np.testing.assert_allclose(losses, on_one_device[0], rtol=1e-5)
    expected = on_one_device[1]
    np.testing.assert_allclose(sigma, expected, atol=1e-5 * np.abs(expected).max())


def collectives(model, lesson, mesh):
    driver = driver_of(model, lesson, "mesh", mesh)
    assert isinstance(driver, MeshDriver)
    rows = lesson.train_rows
    batch = lesson.packing.over(driver.multiple, int(rows.lengths.max())).pack(rows, np.arange(8))
    state = driver.place(stages.initial_state_of(model, lesson))
    compiled = driver.lower(state, batch).compile().as_text()
    kinds = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return Counter(re.findall(rf" ({kinds})(?:-start)?\(", compiled))


def test_of_a_data_parallel_step_only_the_gradient_is_exchanged(model, lesson):
    assert collectives(model, lesson, "data=8") == {"all-reduce": 1}


@pytest.mark.parametrize("mesh", ["data=2,model=4", "model=4"])
def test_weights_are_never_gathered(model, lesson, mesh):
    assert set(collectives(model, lesson, mesh)) == {"all-reduce"}


def test_a_whole_compression_on_a_mesh(model, tmp_path):
    """The teacher, generation and evaluation as well; and it goes on where another layout stopped."""
    options = {"length": 4, "steps": 6, "max_answer_tokens": 6, "checkpoint_every": 2}
    options |= {"progress": False}
    expected = jaxsp.compress(model, CONTEXT, QUERIES, **options)
    mesh = {"parallel": "mesh", "mesh": "data=2,model=4"}
    spread = jaxsp.compress(model, CONTEXT, QUERIES, out=tmp_path / "a", **mesh, **options)
    sigma = expected.prompt.sigma["embeddings"]
    close = {"atol": 1e-5 * np.abs(sigma).max()}
    np.testing.assert_allclose(spread.prompt.sigma["embeddings"], sigma, **close)
    for name, value in expected.report["held_out"]["conditions"]["prompt"].items():
        assert spread.report["held_out"]["conditions"]["prompt"][name] == pytest.approx(
            value, abs=1e-4
        )
    assert [q["answer_full_context"] for q in spread.report["queries"]] == [
        q["answer_full_context"] for q in expected.report["queries"]
    ]
    stopped = tmp_path / "a" / "run" / "checkpoints" / "6"
    shutil.rmtree(stopped)
    resumed = jaxsp.compress(model, CONTEXT, QUERIES, out=tmp_path / "a", resume=True, **options)
    np.testing.assert_allclose(resumed.prompt.sigma["embeddings"], sigma, **close)


MANY = [
    {"id": f"{i}", "context": f"{CONTEXT} No. {i}.", "queries": QUERIES, "seed": i}
    for i in range(3)
]
MANY.append({**MANY[0], "id": "other", "objective": "nll"})


@pytest.fixture(scope="module")
def many_on_one_device(model):
    options = {"length": 4, "steps": 6, "max_answer_tokens": 6, "progress": False}
    return list(jaxsp.compress_many(model, MANY, **options)), options


@pytest.mark.parametrize("mesh", ["data=8", "data=2,model=4"])
def test_many_prompts_over_a_mesh(model, many_on_one_device, mesh):
    """One of them with other objectives has empty slots beside it; each is what it is on one device."""
    expected, options = many_on_one_device
    spread = jaxsp.compress_many(model, MANY, parallel="mesh", mesh=mesh, **options)
    for ours, theirs in zip(spread, expected, strict=True):
        sigma = theirs.prompt.sigma["embeddings"]
        np.testing.assert_allclose(
            ours.prompt.sigma["embeddings"], sigma, atol=1e-5 * np.abs(sigma).max()
        )
        gaps = [r.report["gap_closed"]["value"] for r in (ours, theirs)]
        assert gaps[0] == pytest.approx(gaps[1], abs=1e-4)


def test_a_batch_that_the_mesh_does_not_divide(model, lesson):
    """``train`` rounds the rows up; who calls the driver is told."""
    driver = driver_of(model, lesson, "mesh", "data=4,model=2")
    state = driver.place(stages.initial_state_of(model, lesson))
    batch = Packing(6, lesson.packing.length).pack(lesson.train_rows, np.arange(2))
    with pytest.raises(UserError, match="batch size 6 can't be divided over 4 devices"):
        driver.step(state, batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": "data=3"}, "takes 3 devices, which doesn't divide the 8 there are"),
        ({"mesh": "data=4,model=4"}, "takes 16 devices, which doesn't divide the 8 there are"),
        (
            {"mesh": "rows=2"},
            "--mesh must be like data=2,model=4, axes data and model; got 'rows=2'",
        ),
        ({"mesh": "data=0"}, "got 'data=0'"),
        ({"mesh": "data"}, "got 'data'"),
        (
            {"mesh": "model=8"},
            "--mesh model=8 doesn't divide the model's 4 heads; choose one of 1, 2, 4",
        ),
        ({"mesh": "data=2", "parallel": "pmap"}, "--mesh data=2 needs --parallel mesh, not pmap"),
    ],
)
def test_a_layout_that_cannot_be(model, tmp_path, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        jaxsp.compress(
            model, CONTEXT, QUERIES, out=tmp_path / "out", **{"parallel": "mesh", **settings}
        )
    assert not (tmp_path / "out").exists()
