"""The top-k forms against the full divergence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsp.losses import (
    js_divergence,
    kl_divergence,
    renormalised_topk_kl_divergence,
    reverse_kl_divergence,
    topk,
    topk_js_divergence,
    topk_kl_divergence,
    topk_reverse_kl_divergence,
    truncated_kl_divergence,
)

random = np.random.RandomState(0)
TEACHER, STUDENT = (jnp.asarray(2 * random.standard_normal((6, 50)), jnp.float32) for _ in "ts")


def test_top_k_is_of_the_whole_distribution():
    best = topk(TEACHER, 4)
    log_probs = np.asarray(jax.nn.log_softmax(TEACHER))
    np.testing.assert_array_equal(best.ids, np.argsort(-log_probs, kind="stable")[:, :4])
    np.testing.assert_allclose(best.log_probs, -np.sort(-log_probs)[:, :4], rtol=1e-6)
    assert topk(TEACHER, 99).ids.shape == (6, 50)
    with pytest.raises(ValueError, match="k must be a whole number of at least 1, not 0"):
        topk(TEACHER, 0)


def test_rises_with_k_to_the_full_divergence():
    @jax.jit
    def at_several(teacher, student):
        values = [topk_kl_divergence(*topk(teacher, k), student) for k in (1, 5, 20, 49, 50)]
        return values, kl_divergence(teacher, student)

    values, full = jax.tree.map(np.asarray, at_several(TEACHER, STUDENT))
    for less, more in zip(values, [*values[1:], full], strict=True):
        assert (less <= more + 1e-6).all()
    assert (values[0] < full - 0.1).all()
    np.testing.assert_allclose(values[3], full, rtol=1e-5)  # a tail of one token is no coarsening
    np.testing.assert_allclose(values[4], full, rtol=1e-5)


def test_truncated_may_be_negative_and_is_no_divergence():
    best = topk(TEACHER, 5)
    assert (np.abs(truncated_kl_divergence(*best, TEACHER)) < 1e-6).all()
    kept = jnp.full((6, 50), -9.0)
    kept = jnp.put_along_axis(kept, best.ids, best.log_probs, axis=-1, inplace=False)
    assert (np.asarray(truncated_kl_divergence(*best, kept)) < -0.01).all()
    assert (np.asarray(topk_kl_divergence(*best, kept)) > 0).all()


def test_stored_in_half_precision():
    best = topk(TEACHER, 8)
    full = topk_kl_divergence(*best, STUDENT)
    rounded = best.log_probs.astype(jnp.bfloat16)
    tail = 1 - jnp.sum(jnp.exp(best.log_probs), axis=-1)
    half = topk_kl_divergence(rounded, best.ids, STUDENT, teacher_tail=tail)
    with pytest.raises(
        ValueError, match="are bfloat16: what they leave of 1 is lost to rounding; give it as tea"
    ):
        topk_kl_divergence(rounded, best.ids, STUDENT)
    np.testing.assert_allclose(half, full, rtol=0.05, atol=0.02)


def test_a_listed_mass_of_one_has_no_tail():
    """By rounding the listed probabilities may sum to a little less than 1, or more."""
    both_ban = jnp.where(jnp.arange(50) < 5, 0.0, -jnp.inf)
    teacher, student = TEACHER + both_ban, STUDENT + both_ban
    for nudge in (-1e-7, 0.0, 1e-7, 1e-3):
        best = topk(teacher, 5)
        value = topk_kl_divergence(best.log_probs + nudge, best.ids, student)
        np.testing.assert_allclose(value, kl_divergence(teacher, student), rtol=5e-3)
        assert np.isfinite(value).all()


def test_missing_entries_are_minus_infinity():
    best = topk(TEACHER, 3)
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
        value = topk_kl_divergence(*topk(jnp.asarray(logits), 64), jnp.asarray(student))
        assert (np.asarray(value) <= full + 2e-6).all()


def test_narrow_ids():
    wide = jnp.asarray(np.random.RandomState(1).standard_normal((2, 300)), jnp.float32)
    best = topk(wide, 3)
    for function in (topk_kl_divergence, truncated_kl_divergence):
        small = best.ids % 43 + jnp.array([0, 43, 84])
        out = function(best.log_probs, small.astype(jnp.int8), wide)
        np.testing.assert_array_equal(out, function(best.log_probs, small, wide))


@pytest.mark.usefixtures("unchecked")
def test_ids_out_of_range_read_nan_where_they_cannot_be_checked():
    best = topk(TEACHER, 3)
    for function in (topk_kl_divergence, truncated_kl_divergence):
        for wrong in (-1, 50):
            ids = best.ids.at[2, 1].set(wrong)
            value = np.asarray(jax.jit(function)(best.log_probs, ids, STUDENT))
            assert np.isnan(value[2])
            assert np.isfinite(np.delete(value, 2)).all()
    with pytest.raises(ValueError, match=r"teacher_log_probs must have shape \[6, 'k'\]"):
        topk_kl_divergence(best.log_probs[1:], best.ids[1:], STUDENT)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_a_teachers_best_tokens_is_refused_where_it_is_known():
    best = topk(TEACHER, 3)
    twice = best.ids.at[2, 1].set(best.ids[2, 0])
    with pytest.raises(ValueError, match=f"a token once at a position; {int(best.ids[2, 0])} is there twice"):
        topk_kl_divergence(best.log_probs, twice, STUDENT)
    with pytest.raises(ValueError, match=r"must be at most 0, as logarithms; got 0\.\d+"):
        topk_kl_divergence(jnp.exp(best.log_probs), best.ids, STUDENT)
    dead = np.arange(6) != 2
    value = topk_kl_divergence(best.log_probs, twice, STUDENT, dead)  # under the mask any will do
    np.testing.assert_array_equal(value[dead], topk_kl_divergence(*best, STUDENT)[dead])


def test_coarse_divergences_are_never_above_the_whole():
    whole = {
        topk_reverse_kl_divergence: reverse_kl_divergence(TEACHER, STUDENT),
        topk_js_divergence: js_divergence(TEACHER, STUDENT),
        topk_kl_divergence: kl_divergence(TEACHER, STUDENT),
    }
    for function, full in whole.items():
        values = [np.asarray(function(*topk(TEACHER, k), STUDENT)) for k in (1, 5, 20, 49)]
        for less, more in zip(values, [*values[1:], np.asarray(full)], strict=True):
            assert (less <= more + 2e-5).all()
        np.testing.assert_allclose(values[-1], full, rtol=1e-4)


def test_renormalised_does_not_see_the_mass_elsewhere():
    best = topk(TEACHER, 3)
    moved = STUDENT + 20 * (1 - jnp.put_along_axis(jnp.zeros((6, 50)), best.ids, 1.0, axis=-1, inplace=False))
    found = renormalised_topk_kl_divergence(*best, moved)
    np.testing.assert_allclose(found, renormalised_topk_kl_divergence(*best, STUDENT), atol=1e-4)
    assert (np.asarray(topk_kl_divergence(*best, moved)) > 5).all()
