"""The promises that only the divergences make."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsp import losses
from tests.losses import oracle
from tests.losses.problem import INPUTS

TEACHER, STUDENT = jnp.asarray(INPUTS["teacher_logits"]), jnp.asarray(INPUTS["student_logits"])


def test_reverse_kl_is_kl_with_the_sides_swapped():
    forward, backward = (losses.kl_divergence(STUDENT, TEACHER), losses.kl_divergence(TEACHER, STUDENT))
    np.testing.assert_allclose(losses.reverse_kl_divergence(TEACHER, STUDENT), forward, rtol=1e-6)
    assert not np.allclose(forward, backward, rtol=0.1)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_js_for_any_beta(beta):
    expected = oracle.js(INPUTS, beta=beta)
    out = losses.js_divergence(TEACHER, STUDENT, beta=beta)
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-6)


def test_js_limits_and_their_direction():
    """Towards beta 0 the forward KL, towards 1 the reverse; and these at 0 and 1 themselves."""
    t, s = TEACHER / 3, STUDENT / 3  # reached sooner where no probability is tiny
    for beta, limit in ((1e-3, losses.kl_divergence), (1 - 1e-3, losses.reverse_kl_divergence)):
        near = losses.js_divergence(t, s, beta=beta) / (beta * (1 - beta))
        np.testing.assert_allclose(near, limit(t, s), rtol=0.01)
        at = losses.js_divergence(t, s, beta=round(beta))
        np.testing.assert_array_equal(at, limit(t, s))
    assert not np.allclose(losses.kl_divergence(t, s), losses.reverse_kl_divergence(t, s), rtol=0.02)
    with pytest.raises(ValueError, match=r"beta must lie between 0 and 1, not 1\.5"):
        losses.js_divergence(t, s, beta=1.5)


def test_a_token_that_only_one_side_bans():
    teacher = jnp.log(jnp.array([[0.5, 0.5, 0.0]]))
    student = jnp.log(jnp.array([[0.5, 0.0, 0.5]]))
    assert losses.kl_divergence(teacher, student) == jnp.inf
    assert losses.reverse_kl_divergence(teacher, student) == jnp.inf
    np.testing.assert_allclose(losses.js_divergence(teacher, student), np.log(2) / 2, rtol=1e-6)
    assert losses.total_variation(teacher, student) == 0.5
    for beta in (1 - 1e-9, 1e-46, 1e-7, 0.3):
        assert not np.isnan(losses.js_divergence(teacher, student, beta=beta)).any()
    covers = jnp.log(jnp.array([[0.25, 0.25, 0.5]]))
    np.testing.assert_allclose(losses.kl_divergence(teacher, covers), np.log(2), rtol=1e-6)
