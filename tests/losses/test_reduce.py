"""Reduction: one division, last."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsp import losses

VALUES = jnp.arange(6.0).reshape(2, 3)
MASK = jnp.array([[True, False, False], [True, True, True]])


def test_reduction_is_that_of_the_whole_not_of_the_parts():
    parts = [losses.masked_sum(v, m) for v, m in zip(VALUES, MASK, strict=True)]
    assert losses.masked_mean(losses.merge(*parts)) == losses.masked_mean(VALUES, MASK) == 3.0
    assert losses.masked_mean(VALUES, jnp.zeros((2, 3), bool)) == 0.0
    assert np.mean([losses.masked_mean(p) for p in parts]) == 2.0  # what a mean of means would give


def test_weights_of_positions_and_of_sequences():
    weights = jnp.array([[1.0, 9.0, 9.0], [2.0, 0.0, 0.5]])
    assert losses.masked_mean(VALUES, MASK, weights=weights) == (0 + 6 + 2.5) / 3.5
    by_sequence = losses.masked_sum(VALUES, MASK, weights=jnp.array([3.0, 1.0]))
    assert tuple(map(float, by_sequence)) == (12.0, 6.0)
    whole = losses.masked_sum(VALUES, MASK, weights=jnp.ones((2, 3)))
    assert whole == losses.masked_sum(VALUES, MASK)
    small = jnp.array([[1e-3, 0, 0], [1e-3, 1e-3, 1e-3]])
    np.testing.assert_allclose(losses.masked_mean(VALUES, MASK, weights=small), 3.0, rtol=1e-6)
    square = jnp.arange(9.0).reshape(3, 3)  # [b] is of sequences even where b = t
    total = losses.masked_sum(square, weights=jnp.array([1.0, 0.0, 0.0])).total
    assert total == square[0].sum()


def test_nothing_leaks_from_where_nothing_counts():
    values = jnp.array([1.0, jnp.nan, jnp.inf])
    mask, weights = jnp.array([True, False, True]), jnp.array([1.0, 1.0, 0.0])
    assert losses.masked_mean(values, mask, weights=weights) == 1.0
    gradient = jax.grad(lambda v: losses.masked_mean(v, mask, weights=weights))(values)
    np.testing.assert_array_equal(gradient, [1.0, 0.0, 0.0])


def test_devices_divide_once():
    """psum of totals and counts equals the mean over all, however uneven the parts."""
    values = jnp.arange(24.0).reshape(8, 3)
    mask = jnp.arange(24).reshape(8, 3) % 5 > 1
    mean = jax.pmap(
        lambda v, m: losses.masked_mean(losses.Total(*jax.lax.psum(losses.masked_sum(v, m), "i"))),
        axis_name="i",
    )(values, mask)
    np.testing.assert_allclose(mean, np.asarray(values)[np.asarray(mask)].mean(), rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"weights must have shape \[2, 3\] .* or \[2\]"):
        losses.masked_sum(VALUES, MASK, weights=jnp.ones(3))
    with pytest.raises(ValueError, match="mask must have shape"):
        losses.masked_mean(VALUES, MASK[0])
    with pytest.raises(ValueError, match=r"weights must not be negative; the least is -1"):
        losses.masked_sum(VALUES, MASK, weights=jnp.array([1.0, -1.0]))
    with pytest.raises(ValueError, match="already reduced"):
        losses.masked_mean(losses.masked_sum(VALUES), MASK)
