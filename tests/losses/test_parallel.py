"""Right, and no more work, under every way of being parallel."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxsp import losses
from jaxsp.losses import (
    OBJECTIVES,
    chunked_head,
    fused_kl_divergence,
    fused_objective,
    fused_topk,
    vocabulary,
)
from tests import programs
from tests.conftest import slow_beside
from tests.losses.problem import LIKE_OTHERS, make_inputs

B, T, D, V = 8, 32, 6, 128
CHUNKS = 4
random = np.random.RandomState(0)
TEACHER, STUDENT = (random.standard_normal((B, T, D)).astype(np.float32) for _ in range(2))
HEAD = random.standard_normal((V, D)).astype(np.float32)
MASK = random.uniform(size=(B, T)) < 0.6


def mesh_of(devices: int, kind: AxisType = AxisType.Auto):
    return jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices])


def rows_of_products(program: Any, *widths: int) -> set[int]:
    """Rows, on each device, of the products of one of these widths: by default of those that give logits."""
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* dot\(", programs.text(program))
    sizes = [[int(size) for size in shape.split(",")] for shape in shapes]
    return {math.prod(size[:-1]) for size in sizes if size[-1] in (widths or (V,))}


@pytest.mark.parametrize("devices", [4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "some"])
@pytest.mark.parametrize("how", ["jit", "explicit", "vmap", "shard_map"])
def test_each_device_computes_its_own_rows_alone(how, mask, devices):
    """Counted in the compiled program: rows of a product times chunks are a device's positions."""
    mesh = mesh_of(devices, AxisType.Explicit if how == "explicit" else AxisType.Auto)
    rows = NamedSharding(mesh, P("data"))

    def loss(student, teacher, mask, size):
        return jnp.sum(fused_kl_divergence(teacher, student, HEAD, mask, chunk_size=size))

    step = jax.value_and_grad(functools.partial(loss, size=B * T // CHUNKS))
    arrays = STUDENT, TEACHER, mask
    if how == "vmap":
        step = jax.vmap(jax.value_and_grad(functools.partial(loss, size=T // CHUNKS)))
    elif how == "shard_map":
        one = jax.value_and_grad(functools.partial(loss, size=B * T // devices // CHUNKS))

        def local(*arrays):
            value, gradient = one(*arrays)
            return jax.lax.psum(value, "data"), gradient

        specs = P("data"), P("data"), None if mask is None else P("data")
        step = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), P("data")))
    placed = jax.device_put(arrays, rows)
    if how == "explicit":
        lowered = jax.jit(step).lower(*placed)
    else:  # the arrays' types do not say where they are
        lowered = jax.jit(step, in_shardings=jax.tree.map(lambda _: rows, arrays)).lower(*arrays)
    program = lowered.compile()
    assert rows_of_products(program, V, D) == {B * T // devices // CHUNKS}
    value, gradient = program(*placed)
    expected = losses.kl_divergence(TEACHER @ HEAD.T, STUDENT @ HEAD.T, mask)
    np.testing.assert_allclose(np.sum(value), np.sum(expected), rtol=1e-5)
    slope = jax.grad(lambda x: jnp.sum(losses.kl_divergence(TEACHER @ HEAD.T, x @ HEAD.T, mask)))(STUDENT)
    np.testing.assert_allclose(gradient, slope, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_devices_of_the_rows_as_far_as_types_say(kind):
    """Arrays outside of a program, and Explicit axes; the usual chunk of each is for one device."""
    rows, found = NamedSharding(mesh_of(4, kind), P("data")), []
    array = jax.device_put(STUDENT, rows)
    jax.jit(lambda x: found.append(vocabulary.parts(x)) or x)(array)
    assert vocabulary.parts(array) == 4
    assert found[-1] == (4 if kind == AxisType.Explicit else 1)
    assert vocabulary.parts(jnp.asarray(STUDENT)) == 1


def test_rows_are_grouped_by_the_devices_of_their_mesh():
    """Not by all that there are: the fewer groups of rows, the more even they are."""
    found = []
    program = jax.jit(lambda x: found.append(chunked_head._devices([x])) or x)
    program(jax.device_put(STUDENT, NamedSharding(mesh_of(4), P("data"))))
    with jax.set_mesh(mesh_of(2)):
        program(STUDENT)
    program(STUDENT)
    assert found == [4, 2, jax.device_count()]


def test_rows_are_divided_where_the_head_alone_is_mapped():
    """``shard_map`` over the vocabulary; over the rows' axis jit divides the work."""
    mesh = jax.make_mesh((2, 4), ("data", "vocabulary"), axis_types=(AxisType.Auto,) * 2)

    def local(teacher, student, head):
        size = B * T // CHUNKS
        return fused_kl_divergence(teacher, student, head, chunk_size=size, axis_name="vocabulary")

    specs = P(), P(), P("vocabulary")
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), axis_names={"vocabulary"})
    places = [NamedSharding(mesh, P(axis)) for axis in ("data", "data", "vocabulary")]
    program = jax.jit(run, in_shardings=places).lower(TEACHER, STUDENT, HEAD).compile()
    assert rows_of_products(program, V // 4) == {B * T // 2 // CHUNKS}
    found = program(*map(jax.device_put, (TEACHER, STUDENT, HEAD), places))
    np.testing.assert_allclose(found, losses.kl_divergence(TEACHER @ HEAD.T, STUDENT @ HEAD.T), atol=1e-5)


def test_prompts_and_rows_before_the_positions():
    """Rows cut along the second axis of three, as far as it goes; values stand where they stood."""
    teacher, student = (np.stack([x, x[::-1]]) for x in (TEACHER, STUDENT))
    mask = np.stack([MASK, ~MASK])
    place = NamedSharding(mesh_of(4), P(None, "data"))
    loss = functools.partial(fused_kl_divergence, unembedding=jnp.asarray(HEAD), chunk_size=2 * B * 4)
    program = jax.jit(lambda t, s, m: loss(t, s, mask=m), in_shardings=place)
    assert rows_of_products(program.lower(teacher, student, mask).compile()) == {2 * B}
    expected = losses.kl_divergence(teacher @ HEAD.T, student @ HEAD.T, mask)
    np.testing.assert_allclose(program(teacher, student, mask), expected, atol=1e-5)


INPUTS = make_inputs(3, (4, 4))
SOME = np.random.RandomState(4).uniform(size=(4, 4)) < 0.7
STATES = ("teacher_hidden", "student_hidden")


@pytest.mark.parametrize("name", slow_beside(OBJECTIVES, *LIKE_OTHERS))
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_explicit_axes(name, fused):
    """Value and gradient of each entry, on the axes that ``jax.make_mesh`` makes by default."""
    entry, head = OBJECTIVES[name], jnp.asarray(random.standard_normal((7, 5)), jnp.float32)

    def loss(student, inputs, mask):
        if fused:
            given = {key: inputs[key] for key in ("teacher_hidden", "targets")}
            values = fused_objective(name, student, head, mask, chunk_size=4, **given)[0]
        else:
            wrt = next(key for key in entry.inputs if key.startswith("student"))
            values = entry(mask=mask, **{**inputs, wrt: student})
        return jnp.sum(values), values

    key = "student_hidden" if fused else next(key for key in entry.inputs if key.startswith("student"))
    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    arrays = INPUTS[key], INPUTS, SOME
    expected = both(*arrays)
    rows = NamedSharding(mesh_of(4, AxisType.Explicit), P("data"))
    found = both(*jax.tree.map(lambda x: jax.device_put(x, rows), arrays))
    assert jax.typeof(found[0][1]).sharding.spec[0] == "data"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_explicit_axes_of_all_else():
    inputs = {name: jnp.asarray(array) for name, array in INPUTS.items()}
    logits, ids = inputs["student_logits"], inputs["targets"]
    head = jnp.asarray(random.standard_normal((7, 5)), jnp.float32)
    functions = (
        lambda x, y, ids: losses.topk(x, 3),
        lambda x, y, ids: losses.sequence_log_likelihood(x, ids),
        lambda x, y, ids: losses.candidate_scores(x[:, None], ids[:, None]),
        lambda x, y, ids: losses.predict(x[:, None], ids[:, None]),
        lambda x, y, ids: losses.sequence_mismatch(x, 2 * x),
        lambda x, y, ids: losses.masked_mean(losses.entropy(x), ids > 2, weights=ids[:, 0] * 1.0),
        lambda x, y, ids: fused_topk(y, head, ids > 2, k=3, chunk_size=4),
    )
    rows = NamedSharding(mesh_of(4, AxisType.Explicit), P("data"))
    arrays = logits, inputs["student_hidden"], ids
    for function in functions:
        found = jax.jit(function)(*(jax.device_put(x, rows) for x in arrays))
        expected = jax.jit(function)(*arrays)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("name", slow_beside(["kl", "reverse_kl", "js", "skewed_kl", "alpha", "renyi",
    "total_variation", "entropy", "nll"], "kl", "alpha", "renyi", "total_variation"))  # fmt: skip
def test_plain_losses_of_a_sharded_vocabulary(name):
    """Logits ``[b, t, v]`` cut along v: no shard sees all of them, each gets its own gradient."""
    entry = OBJECTIVES[name]
    inputs = {**make_inputs(1, (3,), 16)}
    mesh = mesh_of(8)

    def total(student, teacher, targets, mask, axis=None):
        values = entry(
            mask=mask, teacher_logits=teacher, student_logits=student, targets=targets, axis_name=axis
        )
        return jnp.sum(values * jnp.arange(1.0, 4.0)), values

    mask = np.array([True, False, True])
    arrays = inputs["student_logits"], inputs["teacher_logits"], inputs["targets"], mask
    cut = P(None, "data")
    local = jax.grad(functools.partial(total, axis="data"), has_aux=True)
    run = jax.shard_map(local, mesh=mesh, in_specs=(cut, cut, P(), P()), out_specs=(cut, P()))
    program = jax.jit(run)
    assert "all-gather" not in programs.text(program.lower(*arrays).compile())
    found, expected = program(*arrays), jax.grad(total, has_aux=True)(*map(jnp.asarray, arrays))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_an_accelerators_chunks_are_bounded_by_memory_alone(monkeypatch):
    """Each reads the whole head; on a CPU the last chunk of live positions costs more than that."""
    size = functools.partial(chunked_head.chunk_size, 8192, 49152)
    assert size(masked=True) < size(masked=False, closed=True) == size(masked=False, closed=True, shards=1)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert size(masked=True) == size(masked=False) > 512
    assert size(masked=True, shards=4) > 3 * size(masked=True)  # of all four together


def test_a_head_of_both_sides_is_read_once_on_an_accelerator(monkeypatch):
    """One product of [2 C, D], with the values and gradients of two."""
    loss = functools.partial(fused_kl_divergence, TEACHER, mask=MASK, chunk_size=16, softcap=4.0)

    def both(student, head):
        return jax.value_and_grad(lambda x: jnp.sum(loss(x, head)))(student)

    expected = jax.jit(both)(STUDENT, HEAD)
    monkeypatch.setattr(chunked_head, "is_cpu", lambda: False)
    program = jax.jit(lambda x, head: both(x, head)).lower(STUDENT, HEAD).compile()
    assert rows_of_products(program) == {32}
    found = program(STUDENT, HEAD)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_head_of_another_dtype_is_cast_a_part_at_a_time(dtype, monkeypatch):
    """The program has no room for all of it; values and gradients are those of the head cast before."""
    tokens, width, positions = 4100, 64, 64
    monkeypatch.setattr(chunked_head, "_CAST_BYTES", 2**17)  # a ninth of the head
    shapes = [(positions, width), (positions, width), (tokens, width)]
    student, teacher, head = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    head = jnp.asarray(head / 8, dtype)

    def loss(student, head, size):
        return jnp.sum(fused_kl_divergence(teacher, student, head, chunk_size=size))

    both = jax.jit(jax.value_and_grad(loss), static_argnames="size")
    program = both.lower(student, head, size=4).compile()
    assert programs.memory(program).temp_size_in_bytes < 4 * tokens * width
    found, expected = both(student, head, size=32), both(student, head.astype(jnp.float32), size=32)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, expected)
