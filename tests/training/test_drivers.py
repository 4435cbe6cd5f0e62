"""Layouts of devices: each gives what one device gives, with no more said between them than needed."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

import jaxsp
from jaxsp.data.documents import as_queries
from jaxsp.data.packing import Packing
from jaxsp.models import sharding
from jaxsp.models.sharding import as_mesh
from jaxsp.progress import Display
from jaxsp.prompts import DEFAULT_KIND, PROMPT_KINDS, Draws, per_head
from jaxsp.settings import make_settings
from jaxsp.teacher.problem import read_preamble, run_teacher, tokenize
from jaxsp.training.drivers import DRIVERS, MeshDriver, sharded_update
from jaxsp.training.start import start_state
from jaxsp.training.state import stack, unstack
from jaxsp.training.update import Frozen, UpdateSettings
from jaxsp.typing import UserError
from tests import programs, tiny
from tests.conftest import CONTEXT, QUERIES, assert_same_sigma, slow_beside

LAYOUTS = ["data=8", "data=2,model=4", "model=4", "data=4,model=2", "data=2,fsdp=4", "fsdp=2,model=4"]


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


SETTINGS = make_settings({"prompt_length": 4, "steps": 10, "max_answer_tokens": 6})
KINDS = {kind: make_settings({"kind": kind}, base=SETTINGS) for kind in PROMPT_KINDS}


@pytest.fixture(scope="module")
def problem(model):
    queries = as_queries(QUERIES)
    job = tokenize(model, CONTEXT, queries[:8], queries[8:], SETTINGS)
    return run_teacher(model, job, SETTINGS.teacher, read_preamble(model), Display(visible=False))


def driver_of(model, problem, parallel, mesh=None, kind=DEFAULT_KIND):
    settings = UpdateSettings.of(model.config, KINDS[kind])
    frozen = Frozen(model.params, problem.preamble)
    return DRIVERS[parallel](frozen, settings, mesh=mesh and as_mesh(mesh))


def packing_of(problem):
    return Packing.of(problem.rows.lengths, SETTINGS.training.batch_size)


def batch_of(problem, driver, drawn):
    """A batch of one prompt, in a shape that the driver's devices can share."""
    rows = problem.train
    packing = packing_of(problem).over(driver.multiple, int(rows.lengths.max()))
    return jax.tree.map(lambda leaf: leaf[None], packing.pack(rows, drawn))


def trained(model, problem, driver, kind=DEFAULT_KIND):
    rows, packing = problem.train, packing_of(problem)
    states = driver.place(stack([start_state(model, problem, KINDS[kind])]))
    losses = []
    for _ in range(SETTINGS.training.updates):
        fetched = driver.fetch(states)
        drawn = packing.draw(rows.lengths, int(fetched.cursor[0]), np.asarray(fetched.key[0]))
        states, metrics = driver.step(states, batch_of(problem, driver, drawn))
        losses.append(float(metrics["loss"][0]))
    return losses, unstack(driver.fetch(states), 0).sigma


@pytest.fixture(scope="module")
def on_one_device(model, problem):
    return trained(model, problem, driver_of(model, problem, "jit"))


@pytest.mark.parametrize(
    "mesh", [None, *slow_beside(LAYOUTS, "data=8", "model=4", "data=4,model=2", "fsdp=2,model=4")]
)
def test_every_layout_trains_like_one_device(model, problem, on_one_device, mesh):
    driver = driver_of(model, problem, "mesh" if mesh else "pmap", mesh)
    losses, sigma = trained(model, problem, driver)
    assert_same(losses, sigma, on_one_device)


def assert_same(losses, sigma, expected):
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    assert_same_sigma(sigma, expected[1], within=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in PROMPT_KINDS if kind != DEFAULT_KIND])
def test_every_kind_trains_on_devices_like_on_one(model, problem, kind):
    """Under pmap, too, where a part of σ is drawn."""
    one = trained(model, problem, driver_of(model, problem, "jit", kind=kind), kind)
    drivers = [driver_of(model, problem, "mesh", "data=2,model=4", kind)]
    if isinstance(PROMPT_KINDS[kind], Draws):
        drivers.append(driver_of(model, problem, "pmap", kind=kind))
    for driver in drivers:
        assert_same(*trained(model, problem, driver, kind), one)


def step_text(model, problem, mesh, kind=DEFAULT_KIND):
    driver = driver_of(model, problem, "mesh", mesh, kind)
    assert isinstance(driver, MeshDriver)
    states = driver.place(stack([start_state(model, problem, KINDS[kind])]))
    batches = batch_of(problem, driver, np.arange(8))
    return programs.text(sharded_update.lower(states, batches, **driver._step.keywords).compile())


def collectives(text):
    kinds = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return Counter(re.findall(rf" ({kinds})(?:-start)?\(", text))


def test_of_a_data_parallel_step_only_the_gradient_is_exchanged(model, problem):
    assert collectives(step_text(model, problem, "data=8")) == {"all-reduce": 1}


@pytest.mark.parametrize("mesh", slow_beside(["data=2,model=4", "model=4"], "model=4"))
def test_weights_are_never_gathered(model, problem, mesh):
    """Nothing is, but slots where they lie in one axis with heads, which the devices share."""
    assert set(collectives(step_text(model, problem, mesh, "key_value"))) == {"all-reduce"}
    text = step_text(model, problem, mesh, "per_head")
    assert set(collectives(text)) <= {"all-reduce", "all-gather"}
    widest, heads = per_head.WIDEST * SETTINGS.prompt.prompt_length, model.config.kv_heads
    for shape in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text):
        assert {widest, heads} <= set(map(int, shape.split(","))), shape


def test_weights_in_parts_are_gathered_a_layer_at_a_time(model, problem):
    """In the loop over layers and in that of the backward pass, each matrix once; the vocabulary once a step.

    Over ``model`` each device gathers its own part alone.
    """
    c, parts = model.config, {"data=2,fsdp=4": 1, "fsdp=2,model=4": 4}
    layer = [c.width * c.heads * c.head_width] * 2 + [c.width * c.kv_heads * c.head_width] * 2
    layer += [c.width * c.mlp_width] * 3
    for mesh, share in parts.items():
        text = step_text(model, problem, mesh, "key_value")
        gathered = [re.findall(r"\d+", s) for s in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)]
        sizes = sorted(math.prod(map(int, shape)) * share for shape in gathered)
        assert sizes == sorted([*layer, *layer, c.vocab_size * c.width])
        assert all(len(shape) == 2 for shape in gathered), "not of all layers at once"


def test_weights_in_parts_take_their_part_of_memory(model):
    """Norms and biases alone are on every device."""
    whole, cut = (as_bytes(model.on(as_mesh(mesh)).params) for mesh in ("data=8", "fsdp=8"))
    assert whole / 8 < cut < whole / 7


def as_bytes(params):
    """The bytes of arrays on one device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data=2,model=4", "fsdp=4,model=2"])
def test_a_whole_compression_on_a_mesh(model, tmp_path, layout):
    """The teacher, generation and evaluation as well; and it goes on where another layout stopped.

    From a start that isn't solved for: a solver amplifies the rounding of what it is given.
    """
    options: dict[str, Any] = {"prompt_length": 4, "steps": 6, "max_answer_tokens": 6, "checkpoint_every": 2}
    options |= {"initial": "first"}
    options |= {"progress": False}
    expected = jaxsp.compress(model, CONTEXT, QUERIES, **options)
    mesh: dict[str, Any] = {"parallel": "mesh", "mesh": layout}
    spread = jaxsp.compress(model, CONTEXT, QUERIES, out=tmp_path / "a", **mesh, **options)
    assert_same_sigma(spread.prompt.sigma, expected.prompt.sigma, within=1e-5)
    for name, value in expected.report["held_out"]["brackets"]["prompt"].items():
        assert spread.report["held_out"]["brackets"]["prompt"][name] == pytest.approx(value, abs=1e-4)
    assert [q["answer_full_context"] for q in spread.report["queries"]] == [
        q["answer_full_context"] for q in expected.report["queries"]
    ]

    def stop(step):
        if step.number == 3:
            raise KeyboardInterrupt

    with pytest.raises(jaxsp.Interrupted, match="after step 3 of 6"):
        jaxsp.compress(model, CONTEXT, QUERIES, out=tmp_path / "b", callbacks=[stop], **mesh, **options)
    resumed = jaxsp.compress(model, CONTEXT, QUERIES, out=tmp_path / "b", resume=True, **options)
    assert [line["step"] for line in resumed.lines] == list(range(7))
    assert_same_sigma(resumed.prompt.sigma, expected.prompt.sigma, within=1e-5)


@pytest.mark.slow
def test_a_start_that_is_solved_for_serves_on_a_mesh_as_on_one_device(model):
    options: dict[str, Any] = {"prompt_length": 4, "steps": 0, "max_answer_tokens": 6, "progress": False}
    mesh: dict[str, Any] = {"parallel": "mesh", "mesh": "data=2,model=4"}
    one, spread = (jaxsp.compress(model, CONTEXT, QUERIES, **options, **more) for more in ({}, mesh))
    for name, value in one.report["held_out"]["brackets"]["prompt"].items():
        assert spread.report["held_out"]["brackets"]["prompt"][name] == pytest.approx(value, abs=1e-4)


MANY = [{"id": f"{i}", "context": f"{CONTEXT} No. {i}.", "queries": QUERIES, "seed": i} for i in range(3)]
MANY.append({**MANY[0], "id": "other", "objective": "nll"})


@pytest.fixture(scope="module")
def many_on_one_device(model):
    options: dict[str, Any] = {"prompt_length": 4, "steps": 6, "max_answer_tokens": 6, "progress": False}
    options |= {"initial": "first"}
    return list(jaxsp.compress_many(model, MANY, **options)), options


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,model=4", None])
def test_many_prompts_over_devices(model, many_on_one_device, mesh):
    """One of them with other objectives has empty slots beside it; each is what it is on one device.

    Two devices divide the prompts, eight (pmap) the rows of each, as a mesh of eight does for one prompt.
    """
    expected, options = many_on_one_device
    layout = {"parallel": "mesh", "mesh": mesh} if mesh else {"parallel": "pmap"}
    spread = jaxsp.compress_many(model, MANY, **layout, **options)
    for ours, theirs in zip(spread, expected, strict=True):
        assert_same_sigma(ours.prompt.sigma, theirs.prompt.sigma, within=1e-5)
        gaps = [r.report["gap_closed"]["value"] for r in (ours, theirs)]
        assert gaps[0] == pytest.approx(gaps[1], abs=1e-4)


def test_a_batch_that_the_mesh_does_not_divide(model, problem):
    """The loop rounds the rows up; who calls the driver is told."""
    driver = driver_of(model, problem, "mesh", "data=4,model=2")
    states = driver.place(stack([start_state(model, problem, SETTINGS)]))
    batch = Packing(6, packing_of(problem).length).pack(problem.train, np.arange(2))
    with pytest.raises(UserError, match="batch size 6 can't be divided over 4 devices"):
        driver.step(states, jax.tree.map(lambda leaf: leaf[None], batch))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": "data=3"}, "takes 3 devices, which doesn't divide the 8 there are"),
        ({"mesh": "data=4,model=4"}, "takes 16 devices, which doesn't divide the 8 there are"),
        ({"mesh": "rows=2"}, "--mesh must be like data=2,model=4, axes data, model and fsdp; got 'rows=2'"),
        ({"mesh": "fsdp=64"}, "takes 64 devices"),
        ({"mesh": "data=0"}, "got 'data=0'"),
        ({"mesh": "data"}, "got 'data'"),
        ({"mesh": "model=8"}, "--mesh model=8 doesn't divide the model's 4 heads; choose one of 1, 2, 4"),
        ({"mesh": "data=2", "parallel": "pmap"}, "--mesh data=2 needs --parallel mesh, not pmap"),
    ],
)
def test_a_layout_that_cannot_be(model, tmp_path, settings, message):
    options: dict[str, Any] = {"parallel": "mesh", **settings}
    with pytest.raises(UserError, match=re.escape(message)):
        jaxsp.compress(model, CONTEXT, QUERIES, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_width_that_can_not_be_cut(model):
    with pytest.raises(UserError, match="--mesh fsdp=8 doesn't divide the model's width of 30"):
        sharding.check(model.config.replace(width=30), as_mesh("fsdp=8"))
