"""The contract of the losses, over the whole table of objectives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsp import losses
from jaxsp.losses import OBJECTIVES
from jaxsp.typing import UserError
from tests.losses import oracle

B, T, V = 3, 4, 7
random = np.random.RandomState(0)
TEACHER = (3 * random.standard_normal((B, T, V))).astype(np.float32)
STUDENT = (3 * random.standard_normal((B, T, V))).astype(np.float32)
TARGETS = random.randint(0, V, (B, T))
MASK = random.uniform(size=(B, T)) < 0.6

names = pytest.mark.parametrize("name", OBJECTIVES)
differentiable = pytest.mark.parametrize(
    "name", [name for name, entry in OBJECTIVES.items() if entry.differentiable]
)


def value(name, teacher=TEACHER, student=STUDENT, targets=TARGETS, mask=None):
    return OBJECTIVES[name](
        jnp.asarray(teacher),
        jnp.asarray(student),
        jnp.asarray(targets),
        None if mask is None else jnp.asarray(mask),
    )


def gradient(name, mask=None, teacher=TEACHER, student=STUDENT):
    def total(teacher, student):
        return value(name, teacher, student, mask=mask).sum()

    return jax.grad(total, argnums=(0, 1))(jnp.asarray(teacher), jnp.asarray(student))


def test_every_objective_has_an_oracle():
    assert set(oracle.ORACLES) == set(OBJECTIVES)


@names
def test_value_equals_the_float64_oracle(name):
    expected = oracle.ORACLES[name](TEACHER, STUDENT, TARGETS)
    out = value(name)
    assert out.shape == (B, T)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-6)


@names
def test_gradient_equals_the_float64_oracle(name):
    to_teacher, to_student = gradient(name)
    np.testing.assert_allclose(
        to_student, oracle.gradient(name, TEACHER, STUDENT, TARGETS), atol=2e-6
    )
    assert (np.asarray(to_teacher) == 0).all()


@differentiable
def test_differentiable_entries_have_a_gradient_and_others_none(name):
    assert np.abs(gradient(name)[1]).max() > 1e-3


def test_zero_one_has_no_gradient():
    assert (np.asarray(gradient("zero_one")[1]) == 0).all()


@names
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_masked_positions_are_exactly_zero_even_over_nan(name, poison):
    teacher, student = TEACHER.copy(), STUDENT.copy()
    teacher[~MASK] = student[~MASK] = poison
    out = np.asarray(value(name, teacher, student, mask=MASK))
    assert (out[~MASK] == 0).all()
    np.testing.assert_array_equal(out[MASK], np.asarray(value(name))[MASK])
    to_student = np.asarray(gradient(name, MASK, teacher, student)[1])
    assert (to_student[~MASK] == 0).all()
    np.testing.assert_allclose(to_student[MASK], np.asarray(gradient(name)[1])[MASK], atol=1e-7)
    assert (np.asarray(value(name, teacher, student, mask=np.zeros((B, T), bool))) == 0).all()


@names
def test_banned_tokens_are_legal(name):
    teacher, student = TEACHER.copy(), STUDENT.copy()
    teacher[..., 2] = student[..., 2] = -np.inf
    targets = np.where(TARGETS == 2, 3, TARGETS)
    keep = [0, 1, 3, 4, 5, 6]
    without = oracle.ORACLES[name](teacher[..., keep], student[..., keep], targets - (targets > 2))
    np.testing.assert_allclose(
        value(name, teacher, student, targets), without, rtol=2e-6, atol=1e-6
    )
    assert np.isfinite(gradient(name, teacher=teacher, student=student)[1]).all()


@names
def test_extreme_logits_stay_finite(name):
    out = value(name, TEACHER * 3e3, STUDENT * 3e3)
    assert np.isfinite(out).all()
    assert np.isfinite(gradient(name, teacher=TEACHER * 3e3, student=STUDENT * 3e3)[1]).all()


@names
def test_equal_distributions_cost_nothing(name):
    if OBJECTIVES[name].needs == "distribution":
        np.testing.assert_allclose(value(name, TEACHER, TEACHER + 5.0), 0, atol=1e-6)


@names
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_are_computed_in_float32(name, dtype):
    teacher, student = (jnp.asarray(a, dtype) for a in (TEACHER, STUDENT))
    out = value(name, teacher, student)
    assert out.dtype == jnp.float32
    exact = oracle.ORACLES[name](
        np.asarray(teacher, np.float64), np.asarray(student, np.float64), TARGETS
    )
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)


@names
def test_vmap_and_jit_equal_the_batch(name):
    whole = value(name)
    mapped = jax.vmap(lambda *a: OBJECTIVES[name](*a))(TEACHER, STUDENT, TARGETS, MASK | True)
    np.testing.assert_allclose(mapped, whole, atol=1e-6)
    jitted = jax.jit(lambda *a: OBJECTIVES[name](*a))(TEACHER, STUDENT, TARGETS)
    np.testing.assert_allclose(jitted, whole, atol=1e-6)


@names
@pytest.mark.parametrize("shape", [(1, 1, V), (2, 0, V), (2, 3, 1), (T, V)])
def test_edge_shapes(name, shape):
    teacher, student = np.ones(shape, np.float32), np.zeros(shape, np.float32)
    out = value(name, teacher, student, np.zeros(shape[:-1], np.int32))
    assert out.shape == shape[:-1]
    assert np.isfinite(out).all()


@names
def test_bad_arguments_are_named(name):
    with pytest.raises(ValueError, match="mask must have shape"):
        value(name, mask=np.ones((T,), bool))
    with pytest.raises(ValueError, match="mask must be boolean"):
        value(name, mask=np.ones((B, T), np.float32))
    with pytest.raises(ValueError, match="student_logits must be floating"):
        value(name, student=STUDENT.astype(np.int32))
    with pytest.raises(ValueError, match="must have shape"):
        value(name, teacher=TEACHER[0, 0], student=STUDENT[0, 0])
    if OBJECTIVES[name].needs == "distribution":
        with pytest.raises(ValueError, match="one shape"):
            value(name, teacher=TEACHER[..., :-1])
    else:
        with pytest.raises(ValueError, match="targets must be integer"):
            value(name, targets=TARGETS.astype(np.float32))
        with pytest.raises(ValueError, match="targets must have shape"):
            value(name, targets=TARGETS[0])


def test_a_mask_for_the_wrong_axis_is_refused_when_all_sizes_are_equal():
    """The B = T = V trap: [t] would broadcast silently."""
    logits = np.ones((4, 4, 4), np.float32)
    with pytest.raises(ValueError, match="mask must have shape"):
        losses.kl_divergence(logits, logits, jnp.ones((4,), bool))


def test_swapped_sides_are_told_apart():
    assert not np.allclose(value("kl"), value("kl", STUDENT, TEACHER))
    np.testing.assert_allclose(value("kl", STUDENT, TEACHER), value("reverse_kl"), rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js"])
def test_temperature(name, temperature):
    out = OBJECTIVES[name].function(
        jnp.asarray(TEACHER), jnp.asarray(STUDENT), temperature=temperature
    )
    expected = oracle.ORACLES[name](TEACHER, STUDENT, temperature=temperature)
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-6)
    with pytest.raises(ValueError, match="temperature must be positive, not 0"):
        OBJECTIVES[name].function(jnp.asarray(TEACHER), jnp.asarray(STUDENT), temperature=0)


def test_js_bounds_and_limits():
    t, s = jnp.asarray(TEACHER), jnp.asarray(STUDENT)
    np.testing.assert_allclose(losses.js_divergence(t, s), losses.js_divergence(s, t), rtol=1e-5)
    assert (np.asarray(losses.js_divergence(100 * t, 100 * s)) <= np.log(2) + 1e-6).all()
    t, s = t / 3, s / 3  # the limits are reached sooner where no probability is tiny
    near_zero = losses.js_divergence(t, s, beta=1e-3) / 1e-3
    np.testing.assert_allclose(near_zero, losses.kl_divergence(t, s), rtol=0.01)
    near_one = losses.js_divergence(t, s, beta=1 - 1e-3) / 1e-3
    np.testing.assert_allclose(near_one, losses.reverse_kl_divergence(t, s), rtol=0.01)
    for beta in (0.0, 1.0):
        assert (np.asarray(losses.js_divergence(t, s, beta=beta)) == 0).all()
    with pytest.raises(ValueError, match=r"beta must lie between 0 and 1, not 1\.5"):
        losses.js_divergence(t, s, beta=1.5)


def test_zero_one_ties_go_to_the_lowest_id():
    tied = jnp.array([[1.0, 1.0, 0.0]])
    assert losses.zero_one(tied, jnp.array([[5.0, 0.0, 0.0]])) == 0
    assert losses.zero_one(tied, jnp.array([[0.0, 5.0, 0.0]])) == 1


def test_reduction_is_that_of_the_whole_not_of_the_parts():
    values = jnp.arange(6.0).reshape(2, 3)
    mask = jnp.array([[True, False, False], [True, True, True]])
    parts = [losses.masked_sum(v, m) for v, m in zip(values, mask, strict=True)]
    assert losses.masked_mean(losses.merge(*parts)) == losses.masked_mean(values, mask) == 3.0
    assert losses.masked_mean(values, jnp.zeros((2, 3), bool)) == 0.0


def test_trainable():
    assert losses.trainable("kl") is OBJECTIVES["kl"]
    with pytest.raises(UserError, match="Unknown objective 'kll'; choose one of kl, "):
        losses.trainable("kll")
    with pytest.raises(UserError, match="piecewise constant"):
        losses.trainable("zero_one")


def test_losses_import_neither_flax_nor_transformers(python):
    code = (
        "import sys, jaxsp.losses; print([m for m in ('flax', 'transformers', 'optax', 'orbax',"
        " 'matplotlib', 'tyro', 'rich') if m in sys.modules])"
    )
    assert python("-c", code).stdout.strip() == "[]"
