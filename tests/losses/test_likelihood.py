"""Likelihood of tokens, of whole answers, and of candidates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsp import losses
from tests.losses import oracle
from tests.losses.problem import INPUTS, MASK, make_inputs

LOGITS, TARGETS = jnp.asarray(INPUTS["student_logits"]), jnp.asarray(INPUTS["targets"])


def smoothed(x):
    return losses.negative_log_likelihood(x, TARGETS, label_smoothing=0.2)


def test_label_smoothing():
    expected = oracle.nll(INPUTS, label_smoothing=0.2)
    np.testing.assert_allclose(smoothed(LOGITS), expected, rtol=2e-6)
    gradient = oracle.gradient("nll", INPUTS, "student_logits", label_smoothing=0.2)
    out = jax.grad(lambda x: smoothed(x).sum())(LOGITS)
    np.testing.assert_allclose(out, gradient, atol=2e-6)
    banned = LOGITS.at[..., 2].set(-jnp.inf)
    targets = jnp.where(TARGETS == 2, 3, TARGETS)
    value = losses.negative_log_likelihood(banned, targets, label_smoothing=0.2)
    all_spread = losses.negative_log_likelihood(banned, TARGETS, label_smoothing=1.0)
    assert np.isfinite(all_spread).all()
    assert np.isfinite(value).all()  # the share goes to the tokens that are not banned
    with pytest.raises(ValueError, match="label_smoothing must lie between 0 and 1, not 2"):
        losses.negative_log_likelihood(LOGITS, TARGETS, label_smoothing=2)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [-1, -100, 7])
def test_an_id_out_of_range_reads_nan_where_it_cannot_be_checked(wrong):
    """A negative one must not count from the end of the vocabulary."""
    for dtype in (jnp.int32, jnp.int8):
        ids = TARGETS.at[1, 2].set(wrong).astype(dtype)
        value = jax.jit(losses.negative_log_likelihood)(LOGITS, ids)
        assert np.isnan(value[1, 2])
        assert np.isnan(value).sum() == 1
    candidates = jnp.array([[0], [wrong], [1]])
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.2, 0.8])), (3, 1, 2))
    assert jax.jit(losses.predict)(logits, candidates) == 2
    with pytest.raises(ValueError, match="candidates must lie in"):
        losses.predict(logits, candidates)
    with pytest.raises(ValueError, match=r"logits must have shape \[\*b, n, t, v\]"):
        losses.predict(logits[0], candidates[0])


def test_sequence_log_likelihood_is_the_product_of_its_tokens():
    expected = -(oracle.nll(INPUTS) * MASK).sum(axis=-1)
    out = losses.sequence_log_likelihood(LOGITS, TARGETS, jnp.asarray(MASK))
    np.testing.assert_allclose(out, expected, rtol=2e-6)
    assert out.shape == (3,)
    none = losses.sequence_log_likelihood(LOGITS, TARGETS, jnp.zeros((3, 4), bool))
    assert (np.asarray(none) == 0).all()


def test_likelihoods_of_all_answers_sum_to_one():
    """Over all 7² answers of two tokens, when the second's logits don't depend on the first."""
    logits = LOGITS[0, :2]
    answers = jnp.stack(jnp.meshgrid(jnp.arange(7), jnp.arange(7)), axis=-1).reshape(49, 2)
    scores = losses.candidate_scores(jnp.broadcast_to(logits, (49, 2, 7)), answers)
    np.testing.assert_allclose(jnp.exp(scores).sum(), 1.0, rtol=1e-5)
    best = losses.predict(jnp.broadcast_to(logits, (49, 2, 7)), answers)
    np.testing.assert_array_equal(answers[best], jnp.argmax(logits, axis=-1))


def test_candidates_of_uneven_length():
    """A long candidate loses by its length alone, unless scored per token."""
    p = jnp.log(jnp.array([0.6, 0.4]))
    logits = jnp.broadcast_to(p, (2, 3, 2))
    candidates = jnp.array([[1, 0, 0], [0, 0, 0]])
    mask = jnp.array([[True, False, False], [True, True, True]])
    scores = losses.candidate_scores(logits, candidates, mask)
    np.testing.assert_allclose(jnp.exp(scores), [0.4, 0.6**3], rtol=1e-6)
    assert losses.predict(logits, candidates, mask) == 0
    per_token = losses.candidate_scores(logits, candidates, mask, per_token=True)
    np.testing.assert_allclose(jnp.exp(per_token), [0.4, 0.6], rtol=1e-6)
    assert losses.predict(logits, candidates, mask, per_token=True) == 1


def test_padding_candidates_never_win_and_ties_go_to_the_first():
    inputs = make_inputs(0, (2, 5, 4), 7)
    logits, candidates = inputs["student_logits"], inputs["targets"]
    mask = np.ones((2, 5, 4), bool)
    mask[:, 3:] = False
    scores = losses.candidate_scores(logits, candidates, jnp.asarray(mask))
    assert scores.shape == (2, 5)
    assert (np.asarray(scores[:, 3:]) == -np.inf).all()
    assert (np.asarray(losses.predict(logits, candidates, jnp.asarray(mask))) < 3).all()
    same = jnp.broadcast_to(logits[:, :1], logits.shape)
    tied = losses.predict(same, jnp.broadcast_to(candidates[:, :1], candidates.shape))
    np.testing.assert_array_equal(tied, [0, 0])
    assert tied.dtype == jnp.int32
