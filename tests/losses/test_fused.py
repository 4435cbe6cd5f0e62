"""Fused objectives: the plain path's value and gradient, without its memory, under every transformation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxsp import losses
from jaxsp.losses import (
    OBJECTIVES,
    Objective,
    fused_kl_divergence,
    fused_negative_log_likelihood,
    fused_objective,
    mixture,
    parse,
)
from jaxsp.losses.chunked_head import _in_chunks
from tests import programs
from tests.conftest import slow_beside
from tests.losses import oracle
from tests.losses.problem import LIKE_OTHERS, VARIANTS, x64

B, T, D, V = 3, 7, 5, 24
random = np.random.RandomState(0)
TEACHER, STUDENT = (random.standard_normal((B, T, D)).astype(np.float32) for _ in range(2))
HEAD, OTHER_HEAD = (random.standard_normal((V, D)).astype(np.float32) for _ in range(2))
TARGETS = random.randint(0, V, (B, T))
MASK = random.uniform(size=(B, T)) < 0.6
WEIGHTS = random.uniform(size=(B, T)).astype(np.float32)

names = pytest.mark.parametrize("name", slow_beside(OBJECTIVES, *LIKE_OTHERS))


def plain(objective, student=STUDENT, mask=None, teacher_head: Any = HEAD, head: Any = HEAD, cap=lambda x: x):
    student, teacher = jnp.asarray(student), jnp.asarray(TEACHER)
    return objective(
        mask=None if mask is None else jnp.asarray(mask),
        teacher_logits=cap(_logits(teacher, teacher_head)),
        student_logits=cap(_logits(student, head)),
        teacher_hidden=teacher,
        student_hidden=student,
        targets=jnp.asarray(TARGETS),
    )


def _logits(hidden, head):
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


def fused(objective, student=STUDENT, mask=None, head: Any = HEAD, **options):
    mask = None if mask is None else jnp.asarray(mask)
    return fused_objective(
        objective, jnp.asarray(student), jnp.asarray(head), mask,
        **{"teacher_hidden": jnp.asarray(TEACHER), "targets": jnp.asarray(TARGETS), **options},
    )[0]  # fmt: skip


def gradient(function, student: Any = STUDENT, weights: Any = WEIGHTS):
    """The gradient of a weighted sum, so that each position's own cotangent must arrive."""
    return jax.grad(lambda x: jnp.sum(function(x) * weights))(jnp.asarray(student))


def value_and_gradient(function, student: Any = STUDENT):
    """Both in one program: compiling is all of the time."""
    return jax.jit(lambda x: (function(x), gradient(function, x)))(student)


@functools.cache
def plain_program(name, weights=None):
    """Value and gradient of the plain path, for any mask."""
    weights = WEIGHTS if weights is None else weights

    def both(mask):
        theirs = functools.partial(plain, OBJECTIVES[name], mask=mask)
        return theirs(STUDENT), gradient(theirs, weights=weights)

    return jax.jit(both)


def same(a, b, rtol=1e-6):
    """Within ``rtol`` of the largest entry."""
    scale = max(float(np.abs(np.asarray(b, np.float32)).max(initial=0)), 1e-3)
    np.testing.assert_allclose(a, b, atol=4 * rtol * scale, rtol=rtol)


@names
@pytest.mark.parametrize(
    ("mask", "chunk"),
    [
        pytest.param(mask, chunk, id=f"{kind}-{chunk}", marks=[pytest.mark.slow] if i else [])
        for kind, mask, chunks in (
            ("all", None, (None, 4)),
            ("some", MASK, (4, None, 1, 21)),
            ("none", np.zeros_like(MASK), (4,)),
        )
        for i, chunk in enumerate(chunks)
    ],
)
def test_equals_the_plain_path(name, mask, chunk):
    ours = functools.partial(fused, name, mask=mask, chunk_size=chunk)
    found = value_and_gradient(ours)
    jax.tree.map(same, found, plain_program(name)(np.ones_like(MASK) if mask is None else mask))
    if mask is not None:
        for array in found:
            assert (np.asarray(array)[~mask] == 0).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*v, marks=[pytest.mark.slow] * (v[0] in LIKE_OTHERS)) for v in VARIANTS],
)
def test_each_option_equals_the_plain_path(name, options):
    """Also as metrics, and where the gradient is written out."""
    entry = dataclasses.replace(OBJECTIVES[name], options=options)
    ours = functools.partial(fused, str(entry), mask=MASK, chunk_size=4)
    theirs = functools.partial(plain, entry, mask=MASK)
    found, expected = value_and_gradient(ours), value_and_gradient(theirs)
    jax.tree.map(same, found, expected)
    assert not np.allclose(found[0], plain_program(name)(MASK)[0]), "the option changes nothing"
    measured = fused_objective(
        "entropy", jnp.asarray(STUDENT), jnp.asarray(HEAD), jnp.asarray(MASK), chunk_size=4,
        teacher_hidden=jnp.asarray(TEACHER), targets=jnp.asarray(TARGETS), metrics=(str(entry),),
    )[1]  # fmt: skip
    same(measured[str(entry)], expected[0])


@pytest.mark.parametrize("name", ["topk_kl", "truncated_kl"])
@pytest.mark.parametrize("k", slow_beside([1, 20, 99], 20))
def test_k_entries_are_taken(name, k):
    """The k that the text says, against the float64 oracle; alone and within a mixture."""
    teacher, student = (np.asarray(side, np.float64) @ HEAD.T for side in (TEACHER, STUDENT))
    inputs = {"teacher_logits": teacher, "student_logits": student}
    expected = oracle.ORACLES[name](inputs, k=k)
    slope = oracle.gradient(name, inputs, "student_logits", k=k) @ HEAD * WEIGHTS[..., None]
    entry = parse(f"{name}(k={k})")
    mixed = parse(f"{name}(k={k})=2, topk_kl(k=3), nll")
    rest = oracle.topk_kl(inputs, k=3) + oracle.nll({**inputs, "targets": TARGETS})
    for function in (functools.partial(fused, chunk_size=4), plain):
        values, found = value_and_gradient(functools.partial(function, entry))
        same(values, expected, rtol=4e-6)
        same(found, slope, rtol=4e-6)
        same(jax.jit(functools.partial(function, mixed))(STUDENT), 2 * expected + rest, rtol=4e-6)


@names
def test_bfloat16_within_its_rounding(name):
    """Equal bf16 inputs: values as good as float32's (the logits are); gradients are rounded to 8 bits
    twice, on the way back through the head and at the end."""
    student, head, teacher = (jnp.asarray(a, jnp.bfloat16) for a in (STUDENT, HEAD, TEACHER))
    inputs = {"teacher_hidden": teacher, "targets": jnp.asarray(TARGETS), "chunk_size": 4}
    exact = [np.asarray(a, np.float32) for a in (student, head, teacher)]

    def reference(x):
        return OBJECTIVES[name](
            mask=jnp.asarray(MASK),
            teacher_logits=_logits(exact[2], exact[1]), student_logits=_logits(x, exact[1]),
            teacher_hidden=exact[2], student_hidden=x, targets=jnp.asarray(TARGETS),
        )  # fmt: skip

    values, ours = value_and_gradient(
        lambda x: fused_objective(name, x, head, jnp.asarray(MASK), **inputs)[0], student
    )
    expected, theirs = value_and_gradient(reference, exact[0])
    same(values, expected, rtol=1e-5)
    assert ours.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(ours, np.float32) - theirs)
    assert error <= 2**-7 * np.linalg.norm(theirs)


def test_float32_states_are_not_rounded_to_a_bfloat16_head():
    head = jnp.asarray(HEAD, jnp.bfloat16)
    ours = functools.partial(fused, "kl", head=head, chunk_size=4)
    theirs = functools.partial(
        plain, OBJECTIVES["kl"], head=head.astype("float32"), teacher_head=head.astype("float32")
    )
    same(ours(), theirs())
    same(gradient(ours), gradient(theirs))


@pytest.mark.parametrize("name", slow_beside(["kl", "nll", "js"], "nll", "js"))
@pytest.mark.parametrize("transform", ["jit", "vmap", "pmap", "scan", "remat", "all"])
def test_under_transformations(name, transform):
    def loss(student, teacher, targets, mask):
        values = fused_objective(
            name, student, jnp.asarray(HEAD), mask, teacher_hidden=teacher, targets=targets,
            chunk_size=2,
        )[0]  # fmt: skip
        return jnp.sum(values)

    rows = tuple(map(jnp.asarray, (STUDENT, TEACHER, TARGETS, MASK)))
    step = jax.value_and_grad(loss)
    if transform == "jit":
        step = jax.vmap(jax.jit(step))
    elif transform == "vmap":
        step = jax.vmap(step)
    elif transform == "pmap":
        step = jax.pmap(step)
    elif transform == "scan":
        step = functools.partial(jax.lax.map, lambda row, step=step: step(*row))
        rows = (rows,)
    elif transform == "remat":
        step = jax.vmap(jax.value_and_grad(jax.checkpoint(loss)))
    else:
        inner = jax.vmap(jax.checkpoint(step))
        step = jax.jit(lambda *rows: jax.lax.scan(lambda c, row: (c, inner(*row)), 0, rows)[1])
        rows = tuple(a[:, None] for a in rows)
    values, gradients = step(*rows)
    expected, whole = plain_program(name, 1.0)(MASK)
    same(np.asarray(values).reshape(B), expected.sum(axis=-1), rtol=2e-6)
    same(np.asarray(gradients).reshape(B, T, D), whole)


@names
@pytest.mark.parametrize("mapped", slow_beside(["shard_map", "pmap"], "pmap"))
def test_a_head_sharded_over_the_vocabulary(name, mapped):
    """Eight devices with three tokens each; all get the plain path's values and gradients."""

    def local(student, teacher, head, targets, mask):
        def total(x):
            values, measured = fused_objective(
                name, x, head, mask, teacher_hidden=teacher, targets=targets, chunk_size=4,
                softcap=3.0, axis_name="vocabulary",
                metrics=() if name in ("kl", "nll") else ("zero_one",),
            )  # fmt: skip
            return jnp.sum(values * WEIGHTS), (values, measured)

        gradient, (values, measured) = jax.grad(total, has_aux=True)(student)
        return values, gradient, measured

    arrays = tuple(map(jnp.asarray, (STUDENT, TEACHER, HEAD, TARGETS, MASK)))
    if mapped == "pmap":
        spread = (*arrays[:2], HEAD.reshape(8, 3, D), *arrays[3:])
        axes = (None, None, 0, None, None)
        out = jax.pmap(local, axis_name="vocabulary", in_axes=axes)(*spread)
        for leaf in jax.tree.leaves(out):
            same(leaf[7], leaf[0], rtol=0)
        values, gradients, measured = jax.tree.map(lambda a: a[0], out)
    else:
        mesh = jax.make_mesh((8,), ("vocabulary",), axis_types=(jax.sharding.AxisType.Auto,))
        specs = (P(), P(), P("vocabulary"), P(), P())
        run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P()))
        values, gradients, measured = run(*arrays)
        if name in ("kl", "nll"):  # only numbers per position travel, and one sum of gradients
            text = programs.text(run.lower(*arrays).compile())
            assert "all-gather" not in text
            assert f"f32[4,{V}]" not in text
    expected, slope = value_and_gradient(
        functools.partial(plain, OBJECTIVES[name], mask=MASK, cap=lambda x: 3 * jnp.tanh(x / 3))
    )
    same(values, expected, rtol=2e-6)
    same(gradients, slope, rtol=2e-6)
    for metric in measured:
        same(measured[metric], plain(OBJECTIVES[metric], mask=MASK, cap=lambda x: 3 * jnp.tanh(x / 3)))


def test_sharded_over_data_and_vocabulary_at_once():
    mesh = jax.make_mesh((2, 4), ("data", "vocabulary"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = (P("data"),) * 2

    def local(student, teacher, head, mask):
        def total(x):
            return jnp.sum(fused_kl_divergence(teacher, x, head, mask, chunk_size=2, axis_name="vocabulary"))

        return jax.value_and_grad(total)(student)

    def summed(*arrays):
        value, gradients = local(*arrays)
        return jax.lax.psum(value, "data"), gradients

    run = jax.shard_map(
        summed, mesh=mesh, in_specs=(*rows, P("vocabulary"), P("data")), out_specs=(P(), P("data"))
    )
    value, gradients = run(STUDENT[:2], TEACHER[:2], HEAD, MASK[:2])
    same(value, plain(OBJECTIVES["kl"], mask=MASK)[:2].sum(), rtol=2e-6)
    same(gradients, gradient(lambda x: plain(OBJECTIVES["kl"], x, MASK), weights=1.0)[:2])


def test_label_smoothing_sharded():
    for smoothing in (0.0, 0.2):
        expected = losses.negative_log_likelihood(
            jnp.asarray(STUDENT) @ HEAD.T, jnp.asarray(TARGETS), label_smoothing=smoothing
        )
        local = functools.partial(
            fused_negative_log_likelihood, label_smoothing=smoothing, axis_name="v", chunk_size=4
        )
        out = jax.pmap(local, axis_name="v", in_axes=(None, None, 0))(STUDENT, TARGETS, HEAD.reshape(8, 3, D))
        same(out[3], expected)


def largest_arrays(jaxpr, least):
    """Shapes of at least ``least`` elements anywhere in a program."""
    found = []
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            if np.prod(shape, dtype=int) >= least:
                found.append(shape)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found += largest_arrays(inner, least) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("name", ["kl", "nll", "js", "topk_kl", "zero_one"])
def test_no_array_of_positions_by_vocabulary(name):
    """Nothing as large as [N, V] in value and gradient; in the plain path there is."""
    N, wide = 64, 512
    x, y = (jnp.ones((N, D)) for _ in range(2))
    head, targets = jnp.ones((wide, D)), jnp.zeros(N, jnp.int32)

    def ours(student):
        return jnp.sum(
            fused_objective(name, student, head, teacher_hidden=y, targets=targets, chunk_size=8)[0]
        )

    def theirs(student):
        logits = {"teacher_logits": y @ head.T, "student_logits": student @ head.T}
        return jnp.sum(OBJECTIVES[name](targets=targets, **logits))

    for function, clean in ((ours, True), (theirs, False)):
        program = jax.make_jaxpr(jax.value_and_grad(function))(x)
        assert (not largest_arrays(program.jaxpr, N * wide // 2)) == clean


@pytest.mark.parametrize("live", [0, 1, 5, 8, 21])
def test_padding_is_dropped_not_computed(live):
    """As many chunks run as the live positions fill, wherever they stand."""
    runs = []

    def count(teacher_logits, student_logits, mask):
        jax.debug.callback(lambda _: runs.append(1), student_logits[0, 0])
        return losses.js_divergence(teacher_logits, student_logits, mask)

    mask = np.zeros(B * T, bool)
    mask[np.random.RandomState(live).permutation(B * T)[:live]] = True
    mask = mask.reshape(B, T)
    values = fused(Objective(count), mask=mask, chunk_size=4)
    jax.effects_barrier()
    same(values, plain(OBJECTIVES["js"], mask=mask))
    assert len(runs) == -(-live // 4)


@names
def test_nan_under_the_mask_reaches_nothing(name):
    """Also where dead positions share a chunk with live ones."""
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[~MASK] = teacher[~MASK] = np.nan
    for softcap in (None, 5.0):
        options = {"mask": MASK, "softcap": softcap, "chunk_size": 21}
        ours = functools.partial(fused, name, teacher_hidden=jnp.asarray(teacher), **options)
        theirs = functools.partial(fused, name, **options)
        found, expected = value_and_gradient(ours, student), value_and_gradient(theirs)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_another_teacher_head_and_softcap_and_temperature(softcap):
    def ours(student):
        return fused_kl_divergence(
            jnp.asarray(TEACHER), student, jnp.asarray(HEAD), jnp.asarray(MASK), temperature=2.0,
            teacher_unembedding=jnp.asarray(OTHER_HEAD), softcap=softcap, chunk_size=4,
        )  # fmt: skip

    def cap(x):
        return x if softcap is None else softcap * jnp.tanh(x / softcap)

    kl = dataclasses.replace(OBJECTIVES["kl"], options=(("temperature", 2.0),))
    theirs = functools.partial(plain, kl, mask=MASK, teacher_head=OTHER_HEAD, cap=cap)
    same(ours(jnp.asarray(STUDENT)), theirs(STUDENT))
    same(gradient(ours), gradient(theirs))


def test_a_wider_teacher():
    teacher, head = random.standard_normal((B, T, 9)), random.standard_normal((V, 9))
    teacher, head = jnp.asarray(teacher, jnp.float32), jnp.asarray(head, jnp.float32)
    ours = fused_kl_divergence(teacher, STUDENT, jnp.asarray(HEAD), teacher_unembedding=head)
    same(ours, losses.kl_divergence(teacher @ head.T, jnp.asarray(STUDENT) @ HEAD.T))


def test_mixture_and_label_smoothing():
    mixed = mixture(kl=0.7, nll=0.3, cosine_similarity=2.0, temperature=2.0)
    ours = functools.partial(fused, mixed, mask=MASK, chunk_size=4)
    theirs = functools.partial(plain, mixed, mask=MASK)
    jax.tree.map(same, value_and_gradient(ours), value_and_gradient(theirs))
    smoothed = lambda x: fused_negative_log_likelihood(  # noqa: E731
        x, jnp.asarray(TARGETS), jnp.asarray(HEAD), label_smoothing=0.1, chunk_size=4
    )
    expected = lambda x: losses.negative_log_likelihood(  # noqa: E731
        x @ HEAD.T, jnp.asarray(TARGETS), label_smoothing=0.1
    )
    jax.tree.map(same, value_and_gradient(smoothed), value_and_gradient(expected))


def test_given_top_k_entries_are_used():
    best = losses.topk(jnp.asarray(TEACHER @ OTHER_HEAD.T), 3)
    ours = fused("topk_kl", teacher_log_probs=best.log_probs, teacher_ids=best.ids, chunk_size=4)
    same(ours, losses.topk_kl_divergence(*best, jnp.asarray(STUDENT @ HEAD.T)))


@pytest.mark.usefixtures("unchecked")
def test_given_top_k_entries_are_checked():
    best = losses.topk(jnp.asarray(TEACHER @ OTHER_HEAD.T), 3)
    for match, wrong in {
        r"teacher_log_probs must have shape \[3, 7, 'k'\]": (best[0].swapaxes(0, 1), best[1]),
        r"teacher_ids must have shape": (best[0], best[1][..., :2]),
        r"teacher_ids must lie in \[0, 24\); got 24": (best[0], jnp.full_like(best[1], V)),
    }.items():
        with pytest.raises(ValueError, match=match):
            fused("topk_kl", teacher_log_probs=wrong[0], teacher_ids=wrong[1], chunk_size=4)
    with pytest.raises(ValueError, match="needs teacher_ids"):
        fused("topk_kl", teacher_log_probs=best.log_probs)


@names
def test_nan_where_it_counts_stays_nan(name):
    teacher, student = TEACHER.copy(), STUDENT.copy()
    if any(i.startswith("teacher") for i in OBJECTIVES[name].inputs):
        teacher[1, 2] = np.nan
        assert np.isnan(np.asarray(fused(name, teacher_hidden=jnp.asarray(teacher)))[1, 2])
    student[1, 2] = np.nan
    out = np.asarray(fused(name, student, np.ones_like(MASK), chunk_size=4))
    assert np.isnan(out[1, 2])
    assert np.isnan(out).sum() == 1


def alpha_divergence(teacher_logits, student_logits, mask, *, alpha=0.5):
    p, q = (jax.nn.log_softmax(side) for side in (teacher_logits, student_logits))
    overlap = jnp.sum(jnp.exp(alpha * p + (1 - alpha) * q), axis=-1)
    return jnp.where(True if mask is None else mask, (1 - overlap) / (alpha * (1 - alpha)), 0.0)


def test_a_divergence_that_the_package_does_not_have():
    """Amari's, against float64 finite differences."""

    def reference(student):
        p, q = (oracle.probabilities(side @ HEAD.T) for side in (TEACHER, student))
        return MASK * (1 - np.sum(p**0.3 * q**0.7, axis=-1)) / 0.21

    mine = Objective(alpha_divergence, options={"alpha": 0.3})
    slope = np.zeros_like(STUDENT, np.float64)
    for place in np.ndindex(slope.shape):
        step = np.zeros_like(slope)
        step[place] = 1e-5
        sides = (np.sum(reference(STUDENT + sign * step) * WEIGHTS) for sign in (1, -1))
        slope[place] = np.subtract(*sides) / 2e-5
    for function in (functools.partial(fused, chunk_size=4), plain):
        own = functools.partial(function, mine, mask=MASK)
        same(own(), reference(STUDENT.astype(np.float64)), rtol=4e-6)
        same(gradient(own), slope, rtol=4e-6)


def test_an_objective_of_ones_own():
    """The same function on other inputs is another objective, whatever is written out for it."""
    for mine in (
        Objective(losses.kl_divergence, ("student_logits", "teacher_logits")),
        Objective(losses.negative_log_likelihood, ("teacher_logits", "targets")),
    ):
        same(fused(mine, chunk_size=4), plain(mine))
        ours, theirs = (functools.partial(f, mine) for f in (fused, plain))
        same(gradient(lambda x, f=ours: f(x, chunk_size=4)), gradient(theirs))
    with pytest.raises(ValueError, match="needs rewards"):
        fused(Objective(losses.kl_divergence, ("rewards", "student_logits")))


@pytest.mark.parametrize("objective", ["kl", "nll"])
def test_options_are_checked(objective):
    name, wrong = {"kl": ("temperature", 0.0), "nll": ("label_smoothing", 2.0)}[objective]
    entry = dataclasses.replace(OBJECTIVES[objective], options=((name, wrong),))
    with pytest.raises(ValueError, match=f"{name} must"):
        fused(entry)


def test_an_infinite_cotangent_under_the_mask():
    """The root of the divergence is a metric; its slope at 0 is infinite."""

    def root(student, loss):
        return jnp.sum(jnp.where(MASK, jnp.sqrt(loss(student)), 0.0))

    ours = jax.grad(root)(jnp.asarray(STUDENT), lambda x: fused("js", x, MASK, chunk_size=4))
    assert (np.asarray(ours)[~MASK] == 0).all()
    assert np.isfinite(ours).all()


def test_under_x64():
    with x64():
        for loss in (
            lambda x: fused_negative_log_likelihood(x, TARGETS, HEAD, label_smoothing=0.1),
            lambda x: fused_kl_divergence(TEACHER, x, HEAD, temperature=np.float64(2)),
            lambda x: fused("js", x, MASK, chunk_size=4),
        ):
            values, pull = jax.vjp(loss, jnp.asarray(STUDENT))
            assert values.dtype == jnp.float32
            assert np.isfinite(pull(jnp.ones_like(values))[0]).all()


def test_a_replicated_student_beside_a_sharded_teacher():
    mesh = jax.make_mesh((3,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(student, teacher, mask):
        def total(x):
            return jnp.sum(fused_kl_divergence(teacher, x, jnp.asarray(HEAD), mask, chunk_size=2))

        value, slope = jax.value_and_grad(total)(student)  # shard_map sums a replicated one's slope
        return jax.lax.psum(value, "data"), slope

    run = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())
    value, slope = run(STUDENT[:1], TEACHER, MASK)

    def expected(x):
        return jnp.where(MASK, losses.kl_divergence(TEACHER @ HEAD.T, jnp.tile(x, (3, 1, 1)) @ HEAD.T), 0)

    same(value, jnp.sum(expected(STUDENT[:1])), rtol=2e-6)
    same(slope, jax.grad(lambda x: jnp.sum(expected(x)))(jnp.asarray(STUDENT[:1])), rtol=2e-6)


def test_metrics_come_in_the_same_pass():
    chosen = ("zero_one", "entropy", "nll", "rank_agreement")
    values, measured = fused_objective(
        "kl", jnp.asarray(STUDENT), jnp.asarray(HEAD), jnp.asarray(MASK), chunk_size=4,
        teacher_hidden=jnp.asarray(TEACHER), targets=jnp.asarray(TARGETS), metrics=chosen,
    )  # fmt: skip
    same(values, plain(OBJECTIVES["kl"], mask=MASK))
    assert tuple(measured) == chosen
    for name in chosen:
        same(measured[name], plain(OBJECTIVES[name], mask=MASK))


def test_no_gradient_to_teacher_and_head():
    def total(teacher, head, other):
        return jnp.sum(
            fused_kl_divergence(teacher, jnp.asarray(STUDENT), head, teacher_unembedding=other, chunk_size=4)
        )

    gradients = jax.grad(total, argnums=(0, 1, 2))(*map(jnp.asarray, (TEACHER, HEAD, OTHER_HEAD)))
    assert all((np.asarray(g) == 0).all() for g in gradients)


def test_nothing_recompiles():
    def run(seed):
        student = STUDENT + seed
        fused("kl", student, MASK, chunk_size=4)
        fused(mixture(kl=0.5, nll=0.5), student, np.roll(MASK, seed), chunk_size=4)
        fused_kl_divergence(TEACHER, jnp.asarray(student), HEAD, temperature=2.0)

    run(0)
    compiled = programs.count(_in_chunks)
    run(1)
    assert programs.count(_in_chunks) == compiled


@pytest.mark.parametrize("shape", [(0, T), (1, 1), (2, 0), (5,)])
def test_edge_shapes(shape):
    student = jnp.ones((*shape, D))
    for mask in (None, jnp.ones(shape, bool)):
        ours = lambda x, mask=mask: fused_kl_divergence(  # noqa: E731
            2 * x, x, jnp.asarray(HEAD), mask, chunk_size=2
        )
        assert ours(student).shape == shape
        assert gradient(ours, student, 1.0).shape == student.shape


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named():
    good = {"teacher_hidden": jnp.asarray(TEACHER), "targets": jnp.asarray(TARGETS)}

    def call(name="kl", student=STUDENT, head=HEAD, mask=None, **changed):
        arrays = jnp.asarray(student), jnp.asarray(head), mask
        return fused_objective(name, *arrays, **{**good, **changed})

    for match, wrong in {
        "student_hidden has vectors of 5 and unembedding rows of 4": {"head": HEAD[:, :4]},
        "unembedding must be floating": {"head": HEAD.astype(int)},
        "unembedding must be floating ": {"head": HEAD[0]},
        "student_hidden must be floating-point vectors": {"student": STUDENT.astype(int)},
        r"teacher_hidden must have shape \[3, 7, 'd'\]": {"teacher_hidden": TEACHER[:, 1:]},
        "teacher_hidden has vectors of 4": {"teacher_hidden": TEACHER[..., :4]},
        "teacher and student must share the vocabulary": {"teacher_unembedding": HEAD[1:]},
        "mask must have shape": {"mask": jnp.ones(T, bool)},
        "mask must be boolean": {"mask": jnp.ones((B, T))},
        "chunk_size must be a whole number of at least 1, not 0": {"chunk_size": 0},
        "softcap must be positive, not -1": {"softcap": -1.0},
        r"targets must lie in \[0, 24\); got 24": {"targets": np.full((B, T), V)},
        "targets must have shape": {"targets": TARGETS[0]},
        "needs teacher_hidden": {"teacher_hidden": None},
        "needs targets": {"targets": None, "name": "nll"},
        "Unknown objective 'kll'": {"name": "kll"},
    }.items():
        with pytest.raises(ValueError, match=match):
            call(**wrong)
    with pytest.raises(ValueError, match="softcap must be a number that is known when the program is traced"):
        jax.jit(lambda softcap: call(softcap=softcap))(3.0)
    with pytest.raises(ValueError, match="temperature must be positive, not 0"):
        fused_kl_divergence(TEACHER, STUDENT, HEAD, temperature=0)
    with pytest.raises(ValueError, match="label_smoothing must lie between 0 and 1"):
        fused_negative_log_likelihood(STUDENT, TARGETS, HEAD, label_smoothing=2)
