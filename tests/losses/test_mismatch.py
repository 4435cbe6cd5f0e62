"""Ties, ranks and whole answers; confidence and entropy at their ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsp import losses
from tests.losses import oracle
from tests.losses.problem import INPUTS, MASK, make_inputs

TEACHER, STUDENT = jnp.asarray(INPUTS["teacher_logits"]), jnp.asarray(INPUTS["student_logits"])


def test_zero_one_ties_go_to_the_lowest_id():
    tied = jnp.array([[1.0, 1.0, 0.0]])
    assert losses.zero_one(tied, jnp.array([[5.0, 0.0, 0.0]])) == 0
    assert losses.zero_one(tied, jnp.array([[0.0, 5.0, 0.0]])) == 1


@pytest.mark.parametrize("k", [1, 2, 3, 7, 9])
def test_topk_mismatch(k):
    expected = oracle.topk_mismatch(INPUTS, k=k)
    np.testing.assert_array_equal(losses.topk_mismatch(TEACHER, STUDENT, k=k), expected)
    if k == 1:
        np.testing.assert_array_equal(losses.zero_one(TEACHER, STUDENT), expected)
    assert k < 7 or (expected == 0).all()


def test_topk_mismatch_ties_go_to_the_lowest_id():
    tied = jnp.zeros((1, 4))
    for first, k, missed in ((0, 1, 0), (1, 1, 1), (1, 2, 0), (3, 3, 1), (3, 4, 0)):
        teacher = jax.nn.one_hot(jnp.array([first]), 4)
        assert losses.topk_mismatch(teacher, tied, k=k) == missed


def test_sequence_mismatch_needs_one_position_only():
    first = np.argmax(INPUTS["teacher_logits"], -1) != np.argmax(INPUTS["student_logits"], -1)
    out = losses.sequence_mismatch(TEACHER, STUDENT, jnp.asarray(MASK))
    np.testing.assert_array_equal(out, (first & MASK).any(axis=-1))
    assert out.shape == (3,)
    agree = jnp.where(jnp.asarray(first)[..., None], TEACHER, STUDENT)
    assert (np.asarray(losses.sequence_mismatch(TEACHER, agree)) == 0).all()
    one = agree.at[1, 2].set(-TEACHER[1, 2])
    np.testing.assert_array_equal(losses.sequence_mismatch(TEACHER, one), [0, 1, 0])
    empty = losses.sequence_mismatch(TEACHER[:, :0], STUDENT[:, :0])
    np.testing.assert_array_equal(empty, [0, 0, 0])


@pytest.mark.parametrize("n", [1, 2, 4, 7, 20])
def test_rank_agreement(n):
    expected = oracle.rank_agreement(INPUTS, n=n)
    out = losses.rank_agreement(TEACHER, STUDENT, n=n)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_allclose(losses.rank_agreement(TEACHER, 3 * TEACHER - 1, n=n), 1.0)
    np.testing.assert_allclose(losses.rank_agreement(TEACHER, -TEACHER, n=n), 1 if n == 1 else -1)


def test_rank_agreement_reads_only_the_teachers_best():
    """The student's other tokens change nothing."""
    worst = jnp.argsort(TEACHER, axis=-1)[..., :3]
    moved = jnp.put_along_axis(STUDENT, worst, 99.0, axis=-1, inplace=False)
    same = losses.rank_agreement(TEACHER, STUDENT, n=4)
    np.testing.assert_array_equal(losses.rank_agreement(TEACHER, moved, n=4), same)


def test_rank_agreement_with_ties():
    teacher = jnp.array([[2.0, 1.0, 1.0, 0.0]])
    assert losses.rank_agreement(teacher, jnp.array([[3.0, 1.0, 2.0, 0.0]])) == 1
    assert losses.rank_agreement(teacher, jnp.zeros((1, 4))) == 0
    assert losses.rank_agreement(jnp.zeros((1, 4)), teacher) == 1


def test_entropy_and_confidence_at_their_ends():
    assert losses.entropy(jnp.array([[0.0, -jnp.inf]])) == 0
    np.testing.assert_allclose(losses.entropy(jnp.zeros((1, 8))), np.log(8), rtol=1e-6)
    teacher = make_inputs()["teacher_logits"]
    np.testing.assert_allclose(
        losses.entropy(jnp.asarray(teacher), jnp.asarray(MASK)),
        oracle.entropy(INPUTS, side="teacher_logits") * MASK,
        atol=1e-6,
    )
    sure, unsure = jnp.array([[99.0, 0.0]]), jnp.zeros((1, 2))
    assert losses.confidence_shift(unsure, sure) == 0.5
    assert losses.confidence_shift(sure, unsure) == -0.5


def test_a_zero_vector_has_similarity_zero_and_no_gradient():
    zero, some = jnp.zeros((1, 3)), jnp.array([[1.0, 2.0, 3.0]])
    assert losses.cosine_similarity(some, zero) == 0
    assert (jax.grad(lambda x: losses.cosine_similarity(some, x).sum())(zero) == 0).all()
    for scale in (1e-30, 1e30):  # whose squares are no float32 numbers
        np.testing.assert_allclose(losses.cosine_similarity(some, scale * some), 1.0, rtol=1e-6)


@pytest.mark.parametrize("function", ["topk_mismatch", "rank_agreement"])
def test_counts_must_be_positive(function):
    option = {"topk_mismatch": "k", "rank_agreement": "n"}[function]
    with pytest.raises(ValueError, match=f"{option} must be a whole number of at least 1, not 0"):
        getattr(losses, function)(TEACHER, STUDENT, **{option: 0})
