"""Properties that hold for all distributions (hypothesis)."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from jaxsp import losses

V = 6  # one size, so that each function compiles once
LOGITS = hnp.arrays(np.float32, (1, V), elements=st.floats(-12, 12, width=32))
quick = settings(max_examples=60, deadline=None)
ROUNDING = 2e-6


@quick
@given(LOGITS, LOGITS)
def test_kl_is_not_negative_and_zero_only_at_equality(t, s):
    kl = float(losses.kl_divergence(t, s)[0])
    p, q = (np.asarray(jnp.exp(x - jnp.log(jnp.sum(jnp.exp(x))))) for x in (t, s))
    assert kl >= -ROUNDING
    assert kl + ROUNDING >= 0.5 * np.abs(p - q).sum() ** 2  # zero, then, only where p = q
    assert abs(float(losses.kl_divergence(t, t)[0])) <= ROUNDING


@quick
@given(LOGITS, LOGITS)
def test_pinsker(t, s):
    bound = np.sqrt(max(float(losses.kl_divergence(t, s)[0]), 0) / 2)
    assert float(losses.total_variation(t, s)[0]) <= bound + 1e-3 * (bound < 1e-2) + ROUNDING


@quick
@given(LOGITS, LOGITS)
def test_js_is_symmetric_and_bounded(t, s):
    js = float(losses.js_divergence(t, s)[0])
    assert abs(js - float(losses.js_divergence(s, t)[0])) <= ROUNDING
    assert -ROUNDING <= js <= np.log(2) + ROUNDING


@jax.jit
def _at_every_k(t, s):
    """Top-k KL at each k, and last KL itself."""
    values = [losses.topk_kl_divergence(*losses.topk(t, k), s)[0] for k in range(1, V + 1)]
    return [*values, losses.kl_divergence(t, s)[0]]


@quick
@given(LOGITS, LOGITS)
def test_top_k_is_a_lower_bound_that_rises_with_k(t, s):
    *values, full = map(float, _at_every_k(t, s))
    for less, more in itertools.pairwise([0.0, *values]):
        assert more >= less - 2e-5
    assert values[-1] <= full + 1e-4 * max(full, 0.1)


@quick
@given(LOGITS, LOGITS, st.floats(-50, 50, width=32), st.floats(-50, 50, width=32))
def test_a_shift_of_the_logits_changes_nothing(t, s, a, b):
    for name, entry in losses.OBJECTIVES.items():
        if name in MISMATCHES or entry.inputs[0] == "teacher_hidden":
            continue  # rounding may make or break a tie
        np.testing.assert_allclose(_value(entry, t, s), _value(entry, t + a, s + b), atol=2e-4)


@quick
@given(LOGITS, LOGITS, st.permutations(range(V)))
def test_the_order_of_the_vocabulary_does_not_matter(t, s, order):
    order = np.array(order)
    target = np.array([1], np.int32)
    moved = np.argsort(order)[target].astype(np.int32)
    for name, entry in losses.OBJECTIVES.items():
        if name in MISMATCHES or entry.inputs[0] == "teacher_hidden":
            continue  # ties go by the id
        here = _value(entry, t, s, target)
        there = _value(entry, t[:, order], s[:, order], moved)
        np.testing.assert_allclose(here, there, atol=2e-5, rtol=1e-5)


@quick
@given(LOGITS, LOGITS)
def test_ranges(t, s):
    for name, (low, high) in {
        "total_variation": (0, 1),
        "distribution_cosine_similarity": (0, 1),
        "rank_agreement": (-1, 1),
        "confidence_shift": (-1, 1),
        "entropy": (0, np.log(V)),
    }.items():
        assert low - ROUNDING <= float(_value(losses.OBJECTIVES[name], t, s)[0]) <= high + ROUNDING


MISMATCHES = ("zero_one", "topk_mismatch", "rank_agreement")


@functools.cache
def _compiled(entry):
    return jax.jit(lambda t, s, target: entry(teacher_logits=t, student_logits=s, targets=target))


def _value(entry, t, s, target=np.array([0], np.int32)):  # noqa: B008
    return _compiled(entry)(t, s, target)
