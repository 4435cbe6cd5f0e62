"""The fused objectives in a trainer: schedules, weights, a trained head, biases, second derivatives."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from jaxsp import losses
from jaxsp.losses import OBJECTIVES, fused_kl_divergence, fused_objective, mixture, parse
from jaxsp.typing import UserError
from tests import programs
from tests.conftest import slow_beside
from tests.losses.problem import VARIANTS, B, T

D, V = 5, 24
random = np.random.RandomState(0)
TEACHER, STUDENT = (random.standard_normal((B, T, D)).astype(np.float32) for _ in range(2))
HEAD = random.standard_normal((V, D)).astype(np.float32)
TARGETS = random.randint(0, V, (B, T))
MASK = random.uniform(size=(B, T)) < 0.6
WEIGHTS = random.uniform(size=(B, T)).astype(np.float32)


def fused(objective, student: Any = STUDENT, head: Any = HEAD, mask: Any = MASK, **options: Any):
    given = {"teacher_hidden": TEACHER, "targets": TARGETS, "chunk_size": 4}
    return fused_objective(objective, student, head, mask, **{**given, **options})[0]


def plain(objective, student: Any = STUDENT, head=HEAD, mask: Any = MASK, teacher_head=HEAD, **options: Any):
    student, head = jnp.asarray(student), jnp.asarray(head)
    logits = {"teacher_logits": jnp.asarray(TEACHER) @ teacher_head.T, "student_logits": student @ head.T}
    hidden = {"teacher_hidden": jnp.asarray(TEACHER), "student_hidden": student}
    return objective(mask=mask, targets=jnp.asarray(TARGETS), **logits, **hidden, **options)


def close(found, expected, tolerance=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected
    )


TRACEABLE = [
    (name, *options.items())
    for name, options in VARIANTS
    if set(options) & {"temperature", "beta", "label_smoothing"} or (name, *options) in
    (("alpha", "alpha"), ("skewed_kl", "alpha"))
]  # fmt: skip


@pytest.mark.parametrize("path", [fused, plain])
@pytest.mark.parametrize(("name", "option"), TRACEABLE)
def test_a_traced_number_is_the_known_one(name, option, path):
    """As a schedule's within one program; no gradient flows to it."""
    option, number = option
    entry = name if path is fused else OBJECTIVES[name]
    with_number = OBJECTIVES[name].with_options(**{option: number})

    def total(student, number):
        return jnp.sum(path(entry, student, **{option: number}) * WEIGHTS)

    found = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(STUDENT, number)
    expected = jax.jit(jax.value_and_grad(lambda x: jnp.sum(path(with_number, x) * WEIGHTS)))(STUDENT)
    close((found[0], found[1][0]), expected)
    assert found[1][1] == 0


@pytest.mark.parametrize(
    ("name", "option", "ends"),
    [
        ("js", "beta", ("kl", "reverse_kl")),
        ("alpha", "alpha", ("reverse_kl", "kl")),
        ("skewed_kl", "alpha", ("kl",)),
    ],
)
def test_a_schedule_may_reach_the_ends(name, option, ends):
    both = jax.jit(jax.value_and_grad(lambda x, n: jnp.sum(fused(name, x, **{option: n}))))
    for number, end in enumerate(ends):
        expected = jax.value_and_grad(lambda x, end=end: jnp.sum(fused(end, x)))(jnp.asarray(STUDENT))
        close(both(STUDENT, float(number)), expected)
        known = losses.parse(f"{name}({option}={number})")
        close(plain(known), plain(OBJECTIVES[end]))


def test_a_number_out_of_range_reads_nan_where_it_cannot_be_checked():
    for name, option, wrong in (
        ("kl", "temperature", 0.0),
        ("js", "beta", 1.5),
        ("nll", "label_smoothing", -1.0),
    ):
        values = np.asarray(jax.jit(lambda n, name=name, option=option: fused(name, **{option: n}))(wrong))
        assert np.isnan(values[MASK]).all()
        assert (values[~MASK] == 0).all()
        with pytest.raises(ValueError, match=f"{option} must"):
            fused(name, **{option: wrong})
    with pytest.raises(ValueError, match="k must be a whole number of at least 1"):
        jax.jit(lambda k: fused("topk_kl", k=k))(3)


def test_a_mixture_at_a_traced_temperature_is_that_of_the_temperature():
    text = {"kl": 0.7, "js": 1.0, "nll": 0.3}
    for path in (fused, plain):
        found = jax.jit(lambda t, path=path: path(mixture(**text), temperature=t))(3.0)
        close(found, path(mixture(**text, temperature=3.0)))
    close(fused("kl=0.7,js,nll=0.3", temperature=3.0), fused(mixture(**text, temperature=3.0)))


def test_terms_keep_their_balance_at_every_temperature():
    """Hinton et al. 2015: gradients of the teacher's part shrink by the square, so that is made up for."""

    def size(objective):
        slope = jax.grad(lambda x: jnp.sum(plain(parse(objective), x)))(jnp.asarray(STUDENT))
        return float(jnp.linalg.norm(slope))

    usual = size("kl") / size("nll")
    for temperature in (4, 8):
        mixed = mixture(kl=0.5, nll=0.5, temperature=temperature)
        terms: Any = mixed
        (of_kl, kl), (of_nll, _) = terms.terms
        assert (of_kl, of_nll, str(kl)) == (0.5 * temperature**2, 0.5, f"kl(temperature={temperature})")
        balance = size(f"kl(temperature={temperature})=1,kl=1e-30") * temperature**2 / size("nll")
        assert 0.3 < balance / usual < 3


@pytest.mark.parametrize(
    "weights", [WEIGHTS, np.array([0.5, 0.0, 2.0], np.float32)], ids=["each", "sequences"]
)
def test_weights_of_positions_and_of_sequences(weights):
    spread = weights if weights.ndim == 2 else np.broadcast_to(weights[:, None], (B, T))
    for mask in (None, MASK):
        both = jax.value_and_grad(lambda x, mask=mask: jnp.sum(fused("js", x, mask=mask, weights=weights)))
        theirs = jax.value_and_grad(
            lambda x, mask=mask: jnp.sum(plain(OBJECTIVES["js"], x, mask=mask) * spread)
        )
        close(both(jnp.asarray(STUDENT)), theirs(jnp.asarray(STUDENT)))


def test_what_has_no_weight_is_not_read():
    """The first positions skipped, whatever is there."""
    weights = np.broadcast_to(np.arange(T) >= 2, (B, T)).astype(np.float32)
    student = np.where(weights[..., None] > 0, STUDENT, np.nan)
    both = jax.value_and_grad(lambda x: jnp.sum(fused("kl", x, mask=None, weights=weights)))
    close(both(jnp.asarray(student)), both(jnp.asarray(STUDENT)))


@pytest.mark.parametrize("name", slow_beside(
    ["kl", "nll", "topk_kl", "kl=0.7,nll=0.3", "cosine_similarity"], "nll", "cosine_similarity"
))  # fmt: skip
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "some"])
def test_a_trained_head_has_its_gradient(name, mask):
    """With the part of every position weighed by its own cotangent; the teacher's head is another one."""
    other = HEAD[::-1].copy()
    options = {"teacher_unembedding": other, "softcap": 3.0, "head_gradient": True, "chunk_size": 5}

    def ours(student, head):
        return jnp.sum(fused(name, student, head, mask, **options) * WEIGHTS)

    def theirs(student, head):
        cap = lambda x: 3 * jnp.tanh(x / 3)  # noqa: E731
        logits = {"teacher_logits": cap(TEACHER @ other.T), "student_logits": cap(student @ head.T)}
        states = {"teacher_hidden": jnp.asarray(TEACHER), "student_hidden": student}
        return jnp.sum(WEIGHTS * parse(name)(mask=mask, targets=jnp.asarray(TARGETS), **logits, **states))

    both = (jax.jit(jax.value_and_grad(f, argnums=(0, 1))) for f in (ours, theirs))
    found, expected = (f(jnp.asarray(STUDENT), jnp.asarray(HEAD)) for f in both)
    close(found, expected)


def test_a_trained_head_under_sharded_rows():
    """Its gradient is the sum over all devices', as shard_map's types ask for."""
    mesh = jax.make_mesh((3,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])

    def total(student, head, teacher, mask):
        return jnp.sum(fused_kl_divergence(teacher, student, head, mask, head_gradient=True))

    def local(*arrays):
        return jax.grad(total, argnums=(0, 1))(*arrays)

    rows = P("data")
    run = jax.shard_map(local, mesh=mesh, in_specs=(rows, P(), rows, rows), out_specs=(rows, P()))
    close(jax.jit(run)(STUDENT, HEAD, TEACHER, MASK), jax.grad(total, argnums=(0, 1))(
        jnp.asarray(STUDENT), jnp.asarray(HEAD), TEACHER, MASK
    ))  # fmt: skip


def test_a_bias_of_the_head_and_a_scale_of_the_logits():
    bias, scale = random.standard_normal(V).astype(np.float32), 0.3

    def with_bias(hidden):
        return jnp.concatenate([scale * hidden, jnp.ones((*hidden.shape[:-1], 1))], axis=-1)

    head = jnp.concatenate([HEAD, bias[:, None]], axis=1)
    found = fused_kl_divergence(with_bias(TEACHER), with_bias(STUDENT), head, MASK)
    teacher, student = (scale * hidden @ HEAD.T + bias for hidden in (TEACHER, STUDENT))
    close(found, losses.kl_divergence(teacher, student, MASK))


def test_second_derivatives():
    """A Hessian times a vector is the jvp of the gradient, in chunks too."""
    vector = random.standard_normal((B, T, D)).astype(np.float32)
    for name in ("kl", "js", "topk_kl", "kl=0.5,nll=0.5"):
        ours = jax.grad(lambda x, name=name: jnp.sum(fused(name, x) * WEIGHTS))
        theirs = jax.grad(lambda x, name=name: jnp.sum(plain(parse(name), x) * WEIGHTS))
        found, expected = (
            jax.jit(lambda x, f=f: jax.jvp(f, (x,), (vector,)))(STUDENT) for f in (ours, theirs)
        )
        close(found, expected, 1e-4)


def test_second_derivatives_of_a_trained_head():
    arrays = STUDENT, HEAD
    vectors = tuple(random.standard_normal(array.shape).astype(np.float32) for array in arrays)

    def twice(loss):
        both = jax.value_and_grad(lambda x, head: jnp.sum(loss(x, head) * WEIGHTS), argnums=(0, 1))
        return jax.jit(lambda *arrays: jax.jvp(both, arrays, vectors))(*arrays)

    ours = functools.partial(fused, "kl", head_gradient=True)
    close(twice(ours), twice(functools.partial(plain, OBJECTIVES["kl"])), 1e-4)


def test_other_second_derivatives():
    """Forwards alone there is none; backwards twice where no chunk may be left out."""

    def steepness(loss):
        slope = jax.grad(lambda x: jnp.sum(loss(x)))
        return jax.jit(jax.grad(lambda x: jnp.sum(slope(x) ** 2)))(STUDENT)

    ours = functools.partial(fused, "kl", mask=None)
    close(steepness(ours), steepness(functools.partial(plain, OBJECTIVES["kl"], mask=None)), 1e-4)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        steepness(functools.partial(fused, "kl"))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(ours, (jnp.asarray(STUDENT),), (jnp.ones_like(STUDENT),))


def test_metrics_may_be_objectives():
    own = losses.Objective(losses.kl_divergence).with_options(temperature=2.0)
    _, measured = fused_objective(
        "kl", STUDENT, HEAD, teacher_hidden=TEACHER, chunk_size=4, metrics=("js(beta=0.3)", own)
    )
    assert list(measured) == ["js(beta=0.3)", "kl(temperature=2)"]
    close(measured["kl(temperature=2)"], plain(own, mask=None))


def test_labels_of_no_target():
    labels = np.where(MASK, TARGETS, -100)
    found = losses.fused_negative_log_likelihood(STUDENT, labels, HEAD, labels != -100, chunk_size=4)
    close(found, plain(OBJECTIVES["nll"]))


@pytest.mark.parametrize(("name", "most"), [("kl", 4), ("nll", 2), ("js", 6), ("topk_kl", 4)])
@pytest.mark.usefixtures("optimized")
def test_arrays_over_a_chunks_logits(name, most):
    """Few at a time, as the gradients are written out; differentiated, JS took 8."""
    positions, tokens, chunk = 64, 4096, 32
    shapes = [jax.ShapeDtypeStruct((n, 64), jnp.float32) for n in (positions, positions, tokens)]

    def loss(student, teacher, head):
        given = {"teacher_hidden": teacher, "targets": jnp.zeros(positions, jnp.int32)}
        return jnp.sum(fused_objective(name, student, head, chunk_size=chunk, **given)[0])

    program = jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile()
    assert programs.memory(program).temp_size_in_bytes < (most + 0.25) * 4 * chunk * tokens


def test_a_traced_number_that_an_objective_does_not_have_is_refused():
    for name in ("beta", "temprature"):
        with pytest.raises(UserError, match=f"kl has no option '{name}'"):
            jax.jit(lambda number, name=name: fused("kl", **{name: number}))(0.3)


def test_metrics_are_refused_where_values_alone_are_given():
    """They would be computed and lost."""
    for name, function, arrays in (
        ("kl", fused_kl_divergence, (TEACHER, STUDENT, HEAD)),
        ("nll", losses.fused_negative_log_likelihood, (STUDENT, TARGETS, HEAD)),
    ):
        with pytest.raises(ValueError, match=rf"returns no metrics: .* fused_objective\('{name}', \.\.\."):
            function(*arrays, metrics=("zero_one",))
        close(function(*arrays, metrics=()), function(*arrays))


@pytest.mark.usefixtures("unchecked")
def test_a_function_of_ones_own_sees_one_axis_of_positions():
    """Whatever the devices and the rows: here there are as many of both."""
    seen = []

    def squares(teacher_logits, student_logits, mask):
        seen.append(student_logits.ndim)
        return jnp.sum((teacher_logits - student_logits) ** 2, axis=1)

    teacher, student = (np.resize(x, (jax.device_count(), T, D)) for x in (TEACHER, STUDENT))
    found = fused_objective(losses.Objective(squares), student, HEAD, teacher_hidden=teacher, chunk_size=16)
    np.testing.assert_allclose(found[0], np.sum(((teacher - student) @ HEAD.T) ** 2, axis=-1), rtol=2e-5)
    assert set(seen) == {2}


def test_ones_own_top_k_objective_has_the_teachers_best_tokens():
    inputs = ("teacher_log_probs", "teacher_ids", "student_logits")
    own = losses.Objective(lambda *given: losses.topk_kl_divergence(*given), inputs)
    close(fused(own), fused("topk_kl(k=24)"))


def test_a_single_term_is_not_rescaled():
    term = mixture(kl=0.7)
    for entry in (term.with_options(temperature=jnp.float32(2)), parse("kl=0.7,temperature=2")):
        assert str(entry) == "kl(temperature=2)=0.7"
    traced = jax.jit(lambda temperature: fused(term, temperature=temperature))(2.0)
    close(traced, 0.7 * fused("kl", temperature=2.0))


def test_mixtures_of_far_distributions():
    """A share of the teacher's bounds the skewed KL; without one it is KL, also where q underflows."""
    teacher, student = jnp.array([[0.0, -200.0]]), jnp.array([[-200.0, 0.0]])
    both = jax.jit(
        jax.value_and_grad(lambda x, alpha: losses.skewed_kl_divergence(teacher, x, alpha=alpha).sum())
    )
    for alpha, expected, slope in ((0.0, 200, [-1, 1]), (1e-6, -np.log(1e-6), [0, 0]), (1.0, 0, [0, 0])):
        value, gradient = both(student, alpha)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient, [slope], atol=1e-6)
        known = losses.skewed_kl_divergence(teacher, student, alpha=alpha)
        np.testing.assert_allclose(known, [value], rtol=1e-6)
    np.testing.assert_allclose(losses.js_divergence(teacher, student), [np.log(2)], rtol=1e-6)


def test_renyi_of_far_distributions_is_finite():
    far = jnp.array([[0.0, 40.0]])
    value, gradient = jax.value_and_grad(lambda x: losses.renyi_divergence(far, x).sum())(far[:, ::-1])
    np.testing.assert_allclose(value, 40 - 2 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0.5, -0.5]], rtol=1e-5)
