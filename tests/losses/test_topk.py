"""The top-k forms against the full divergence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsp.losses import kl_divergence, top_k, topk_kl_divergence, truncated_kl_divergence

random = np.random.RandomState(0)
TEACHER, STUDENT = (jnp.asarray(2 * random.standard_normal((6, 50)), jnp.float32) for _ in "ts")


def test_top_k_is_of_the_whole_distribution():
    best = top_k(TEACHER, 4)
    log_probs = np.asarray(jax.nn.log_softmax(TEACHER))
    np.testing.assert_array_equal(best.ids, np.argsort(-log_probs, kind="stable")[:, :4])
    np.testing.assert_allclose(best.log_probs, -np.sort(-log_probs)[:, :4], rtol=1e-6)
    assert top_k(TEACHER, 99).ids.shape == (6, 50)
    with pytest.raises(ValueError, match="k must be a whole number of at least 1, not 0"):
        top_k(TEACHER, 0)


def test_rises_with_k_to_the_full_divergence():
    @jax.jit
    def at_several(teacher, student):
        values = [topk_kl_divergence(*top_k(teacher, k), student) for k in (1, 5, 20, 49, 50)]
        return values, kl_divergence(teacher, student)

    values, full = jax.tree.map(np.asarray, at_several(TEACHER, STUDENT))
    for less, more in zip(values, [*values[1:], full], strict=True):
        assert (less <= more + 1e-6).all()
    assert (values[0] < full - 0.1).all()
    np.testing.assert_allclose(values[3], full, rtol=1e-5)  # a tail of one token is no coarsening
    np.testing.assert_allclose(values[4], full, rtol=1e-5)


def test_truncated_may_be_negative_and_is_no_divergence():
    best = top_k(TEACHER, 5)
    assert (np.abs(truncated_kl_divergence(*best, TEACHER)) < 1e-6).all()
    kept = jnp.full((6, 50), -9.0)
    kept = jnp.put_along_axis(kept, best.ids, best.log_probs, axis=-1, inplace=False)
    assert (np.asarray(truncated_kl_divergence(*best, kept)) < -0.01).all()
    assert (np.asarray(topk_kl_divergence(*best, kept)) > 0).all()


def test_stored_in_half_precision():
    best = top_k(TEACHER, 8)
    full = topk_kl_divergence(*best, STUDENT)
    half = topk_kl_divergence(best.log_probs.astype(jnp.bfloat16), best.ids, STUDENT)
    np.testing.assert_allclose(half, full, rtol=0.05, atol=0.02)


def test_a_listed_mass_of_one_has_no_tail():
    """By rounding the listed probabilities may sum to a little less than 1, or more."""
    both_ban = jnp.where(jnp.arange(50) < 5, 0.0, -jnp.inf)
    teacher, student = TEACHER + both_ban, STUDENT + both_ban
    for nudge in (-1e-7, 0.0, 1e-7, 1e-3):
        best = top_k(teacher, 5)
        value = topk_kl_divergence(best.log_probs + nudge, best.ids, student)
        np.testing.assert_allclose(value, kl_divergence(teacher, student), rtol=5e-3)
        assert np.isfinite(value).all()


def test_missing_entries_are_minus_infinity():
    best = top_k(TEACHER, 3)
    padded = jnp.pad(best.log_probs, ((0, 0), (0, 2)), constant_values=-jnp.inf)
    unused = jnp.argsort(TEACHER)[:, :2].astype(jnp.int32)
    ids = jnp.concatenate([best.ids, unused], axis=-1)
    nowhere = jnp.full((6, 2), -1, jnp.int32)
    for filled in (ids, jnp.concatenate([best.ids, nowhere], axis=-1)):  # their ids mean nothing
        for function in (topk_kl_divergence, truncated_kl_divergence):
            expected = function(*best, STUDENT)
            np.testing.assert_allclose(function(padded, filled, STUDENT), expected, rtol=1e-6)
            np.testing.assert_allclose(jax.jit(function)(padded, filled, STUDENT), expected, rtol=1e-6)


@pytest.mark.parametrize("depth", [-30.0, -200.0, -1e4])
def test_rounding_in_the_tail_does_not_lift_it_above_the_full_divergence(depth):
    logits = np.random.RandomState(1).standard_normal((200, 1000)).astype(np.float32)
    logits[:, 64:] += depth
    for student, full in ((logits, 0.0), (logits + (logits < depth / 2) * depth, None)):
        full = full if full is not None else kl_divergence(logits, student)
        value = topk_kl_divergence(*top_k(jnp.asarray(logits), 64), jnp.asarray(student))
        assert (np.asarray(value) <= full + 2e-6).all()


def test_narrow_ids():
    wide = jnp.asarray(np.random.RandomState(1).standard_normal((2, 300)), jnp.float32)
    best = top_k(wide, 3)
    for function in (topk_kl_divergence, truncated_kl_divergence):
        small = jnp.minimum(best.ids, 127)
        out = function(best.log_probs, small.astype(jnp.int8), wide)
        np.testing.assert_array_equal(out, function(best.log_probs, small, wide))


@pytest.mark.usefixtures("unchecked")
def test_ids_out_of_range_read_nan_where_they_cannot_be_checked():
    best = top_k(TEACHER, 3)
    for function in (topk_kl_divergence, truncated_kl_divergence):
        for wrong in (-1, 50):
            ids = best.ids.at[2, 1].set(wrong)
            value = np.asarray(jax.jit(function)(best.log_probs, ids, STUDENT))
            assert np.isnan(value[2])
            assert np.isfinite(np.delete(value, 2)).all()
    with pytest.raises(ValueError, match=r"teacher_log_probs must have shape \[6, 'k'\]"):
        topk_kl_divergence(best.log_probs[1:], best.ids[1:], STUDENT)
