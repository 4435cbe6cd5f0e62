"""Numbers that other libraries publish in their tests: inputs and results, each with its source."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsp import losses


def logs(values) -> jax.Array:
    return jnp.log(jnp.asarray(values, jnp.float32))


# optax, losses/_classification_test.py: SoftmaxCrossEntropyTest and SafeSoftmaxCrossEntropyTest.
@pytest.mark.parametrize(
    ("logits", "target", "expected"),
    [
        ([10.0, 1.0, -2.0], 1, 9.00013),
        ([1.0, 4.0, 0.2], 0, 3.0696733),
        ([-np.inf, 0.0, 0.0], 1, 0.693147),
        ([-np.inf, 0.0, -np.inf], 1, 0.0),
    ],
)
def test_optax_cross_entropy(logits, target, expected):
    found = losses.negative_log_likelihood(jnp.array(logits), jnp.array(target))
    assert float(found) == pytest.approx(expected, abs=1e-4)


# The same file, KLDivergenceTest and KLDivergenceWithLogTargetsTest.
LOG_PREDICTIONS = np.array([
    [-2.9957, -3.5066, -3.9120, -1.2040, -0.6931, -2.3026],
    [-1.6094, -1.6094, -1.6094, -2.3026, -1.8971, -1.8971],
], np.float32)  # fmt: skip
TARGETS = np.array([[0.2, 0.2, 0.2, 0.1, 0.15, 0.15], [0.05, 0.03, 0.02, 0.3, 0.5, 0.0]])


def test_optax_kl_divergence():
    # The second row of targets sums to s = 0.9, and optax does not normalise: it gives s KL + s log s.
    mass = TARGETS.sum(axis=-1)
    theirs = (np.array([0.8875577, 0.7592807]) - mass * np.log(mass)) / mass
    found = losses.kl_divergence(logs(TARGETS), LOG_PREDICTIONS)
    np.testing.assert_allclose(found, theirs, atol=1e-4)
    found = losses.kl_divergence(LOG_PREDICTIONS[::-1], LOG_PREDICTIONS)
    np.testing.assert_allclose(found, [0.8875625, 0.7187435584901326], atol=1e-4)
    found = losses.reverse_kl_divergence(LOG_PREDICTIONS, logs(TARGETS))
    np.testing.assert_allclose(found, theirs, atol=1e-4)


# The same file, PolyLossTest at epsilon 0: the cross-entropy from a distribution, its entropy more than KL.
@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        ([0.14, 1.456, 2.356, -0.124, -2.47], [0.1, 0.15, 0.2, 0.25, 0.3], 2.8990),
        ([4.0, 2.0, 1.0], [1.0, 0.0, 0.0], 0.1698),
        ([0.0, 5.0, 1.0], [0.0, 0.8, 0.2], 0.8247),
    ],
)
def test_optax_soft_cross_entropy(logits, labels, expected):
    teacher, student = logs(labels), jnp.array(logits)
    found = losses.kl_divergence(teacher, student) + losses.entropy(teacher)
    assert float(found) == pytest.approx(expected, abs=1e-4)


# torchtune, tests/torchtune/modules/loss/test_kd_losses.py: test_forward_kl_loss_expected, the cross-entropy
# from the teacher, mean over all positions, bfloat16.
STUDENT = [
    [[1.1250, -0.4102, -0.0879, -2.5000], [0.2676, 0.3535, 0.8711, -1.4688],
     [-0.1084, 1.6641, 0.0084, 0.1196], [0.5000, -0.6406, -0.2236, -1.5938]],
    [[-1.5312, -1.9219, 0.0000, -0.5039], [-1.5391, 1.5312, 0.5820, 0.2695],
     [-0.3887, 1.2188, 0.0000, 0.6055], [0.5000, 1.3828, 0.1309, -1.0312]],
]  # fmt: skip
TEACHER = [
    [[-0.0381, -1.2578, -1.2031, 0.0947], [-0.7852, 0.4492, 1.5547, 0.0972],
     [0.8203, 0.0012, 0.7656, 0.3477], [-1.5781, 0.4297, 0.5977, 0.3926]],
    [[1.5156, 0.1641, 2.0781, -0.7734], [-0.5898, 0.4453, -0.7969, 0.6328],
     [0.6289, -0.8359, 0.9258, 0.2109], [0.0006, 0.5195, 3.2344, -1.5781]],
]  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_torchtune_forward_kl(dtype):
    student, teacher = jnp.asarray(STUDENT, dtype), jnp.asarray(TEACHER, dtype)
    found = losses.kl_divergence(teacher, student) + losses.entropy(teacher)
    assert float(losses.masked_mean(found)) == pytest.approx(1.7209, abs=2e-4)  # theirs asks for 1e-2
    head = jnp.eye(4, dtype=dtype)  # their chunked form, of hidden states that are the logits
    values, measured = losses.fused_objective(
        "kl", student, head, teacher_hidden=teacher, metrics=("nll",), targets=jnp.zeros((2, 4), int),
        chunk_size=2,
    )  # fmt: skip
    np.testing.assert_allclose(values, losses.kl_divergence(teacher, student), atol=2e-6)
    assert measured["nll"].shape == (2, 4)


def test_trl_generalized_jsd_at_its_ends():
    """trl, tests/experimental/test_gkd_trainer.py: test_generalized_jsd_loss_edge_cases."""
    student, teacher = logs([[0.1, 0.9]]), logs([[0.9, 0.1]])
    for beta in (0, 1):  # KL(teacher ‖ student) and KL(student ‖ teacher), of a pair where they are equal
        found = losses.js_divergence(teacher, student, beta=beta)
        assert float(found[0]) == pytest.approx(1.757780, abs=1e-5)
    assert float(losses.js_divergence(teacher, teacher)[0]) == pytest.approx(0, abs=1e-6)


def test_distrax_tokens_of_no_probability():
    """distrax, categorical_test.py: test_with_two_distributions_extreme_cases, worked out by hand.

    It is infinite where the teacher has what the student bans; a token that neither has counts nothing.
    """
    teacher = logs([[0.1, 0.5, 0.4], [0.4, 0.0, 0.6], [0.4, 0.6, 0.0]])
    student = jnp.array([0.0, 0.1, -jnp.inf])
    found = losses.kl_divergence(teacher, jnp.broadcast_to(student, (3, 3)))
    last = 0.4 * np.log(0.4) + 0.6 * np.log(0.6) - 0.6 * 0.1 + np.log(1 + np.exp(0.1))
    np.testing.assert_allclose(found, [np.inf, np.inf, last], atol=1e-6)


def test_what_underflows_has_no_probability():
    """Its logarithm is a number, but the student's is not: 0, as in distrax, not infinite."""
    teacher, student = jnp.array([[0.0, 1.0, -200.0]]), jnp.array([[1.0, -2.0, -jnp.inf]])
    expected = losses.kl_divergence(teacher[:, :2], student[:, :2])
    np.testing.assert_allclose(losses.kl_divergence(teacher, student), expected, rtol=1e-6)
    slope = jax.grad(lambda x: losses.kl_divergence(teacher, x).sum())(student)
    assert np.isfinite(slope).all()


# distrax 0.1.7, categorical_test.py: test_kl_grad and test_entropy_grad, whose gradients are finite. The
# values are worked out by hand, the gradients in float64 from their formulas.


def probabilities(logits):
    q = np.exp(np.array(logits, np.float64) - max(logits))
    return q / q.sum()


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        ([-np.inf, 2.0, -3.0, -np.inf, 5.0], [1.0, 7.0, -3.0, 2.0, 4.0], 2.72368),
        ([-np.inf, 2.0, -1000.0, -np.inf, 5.0], [-np.inf, 7.0, -np.inf, 2.0, 4.0], 2.72184),
        ([5.0, -2.0, 0.0, 1.0, 4.0], [1.0, 7.0, -3.0, 2.0, 4.0], 4.59054),
    ],
)
def test_distrax_kl_and_its_gradient(teacher, student, expected):
    """Where the teacher's probability underflows, the term is 0, also if the student bans the token."""
    both = jax.value_and_grad(lambda x, y: losses.kl_divergence(y, x))
    sides = jnp.array(student), jnp.array(teacher)
    value, slope = both(*sides)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(slope, probabilities(student) - probabilities(teacher), atol=1e-6)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([-np.inf, 2.0, -3.0, -np.inf, 5.0], 0.19370),
        ([-1e9] * 11, np.log(11)),
        ([1e9] * 11, np.log(11)),
        ([0.0] * 11, np.log(11)),
        ([1.0, 7.0, -3.0, 2.0, 4.0], 0.24469),
    ],
)
def test_distrax_entropy_and_its_gradient(logits, expected):
    both = jax.value_and_grad(losses.entropy)
    value, slope = both(jnp.array(logits))
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    q = probabilities(logits)
    logs = np.log(np.where(q > 0, q, 1))
    np.testing.assert_allclose(slope, -q * (logs - np.sum(q * logs)), atol=1e-6)
