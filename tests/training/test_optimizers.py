"""The optimizer: schedule, clipping, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsp.training.optimizers import (
    OptimizerSettings,
    make_optimizer,
    make_pace,
    orthogonalise,
    root_mean_square,
)
from jaxsp.typing import UserError


@pytest.mark.parametrize(
    ("warmup", "steps"), [(0.2, 100), (0.0, 100), (0.05, 60), (0.9, 7), (0.5, 1), (0.2, 0)]
)
def test_the_rate_is_that_of_optax(warmup, steps):
    pace = make_pace(OptimizerSettings(learning_rate=0.25, warmup=warmup), steps, scale=2.0)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else 0.5,
        peak_value=0.5,
        warmup_steps=round(warmup * steps),
        decay_steps=max(steps, 1),
    )
    for step in range(steps + 1):
        np.testing.assert_allclose(pace.rate(step), schedule(step), atol=1e-7)


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_embeddings_of_any_size_train_alike(optimizer):
    """A model whose embeddings are 50 times as large: the same prompts, 50 times as large."""
    random = np.random.RandomState(0)
    start, target = (jnp.asarray(random.standard_normal((3, 8)), jnp.float32) for _ in range(2))

    def trained(unit):
        sigma = unit * start
        settings = OptimizerSettings(optimizer=optimizer, clip=0.0)
        transform, pace = make_optimizer(settings), make_pace(settings, 20, root_mean_square(sigma))
        state = transform.init(sigma)
        for step in range(20):
            gradient = jax.grad(lambda x: jnp.sum((x / unit - target) ** 2))(sigma)
            change, state = transform.update(gradient, state, sigma)
            sigma = optax.apply_updates(sigma, pace.rate(step) * change)
        return sigma / unit

    np.testing.assert_allclose(trained(50.0), trained(1.0), rtol=1e-3, atol=1e-4)
    assert float(jnp.abs(trained(1.0) - target).mean()) < 0.6 * float(
        jnp.abs(start - target).mean()
    )


def first_change(gradient, **settings):
    optimizer = make_optimizer(OptimizerSettings(**settings))
    start = jnp.full((2,), 3.0)
    change, _ = optimizer.update(gradient, optimizer.init(start), start)
    return optax.apply_updates(start, 0.1 * change) - start


def test_adam_moves_by_the_learning_rate_and_adamw_decays_as_well():
    gradient = jnp.array([2.0, -5.0])
    adam = first_change(gradient, optimizer="adam")
    np.testing.assert_allclose(adam, [-0.1, 0.1], rtol=1e-4)
    decayed = first_change(gradient, optimizer="adamw", weight_decay=0.5)
    np.testing.assert_allclose(decayed, [-0.1 - 0.15, 0.1 - 0.15], rtol=1e-4)


def test_orthogonalise_makes_singular_values_equal():
    y = np.random.RandomState(0).randn(3, 8) @ np.diag([9, 1, 1, 1, 1, 1, 1, 0.01])
    u, _, vt = np.linalg.svd(y, full_matrices=False)
    out = orthogonalise(jnp.asarray(y, jnp.float32))
    np.testing.assert_allclose(out, np.sqrt(8) * u @ vt, atol=1e-5)
    assert float(jnp.sqrt(jnp.mean(out**2))) == pytest.approx(1.0, rel=1e-5)


def test_orthogonalise_invents_no_direction():
    only_first = jnp.zeros((3, 8)).at[0].set(jnp.arange(8.0))
    np.testing.assert_allclose(orthogonalise(only_first)[1:], 0.0, atol=1e-5)
    np.testing.assert_array_equal(orthogonalise(jnp.zeros((3, 8))), 0.0)


def test_muon_moves_entries_by_the_learning_rate():
    gradient = jnp.asarray(np.random.RandomState(0).randn(4, 32), jnp.float32)
    optimizer = make_optimizer(OptimizerSettings())
    start = jnp.ones((4, 32))
    change, _ = optimizer.update(gradient, optimizer.init(start), start)
    assert float(jnp.sqrt(jnp.mean(change**2))) == pytest.approx(1.0, rel=1e-3)
    assert float(jnp.sum(change * gradient)) < 0


def test_clipping_bounds_the_gradient():
    optimizer = make_optimizer(OptimizerSettings(optimizer="adam", clip=1.0))
    start = jnp.zeros((2,))
    _, state = optimizer.update(jnp.array([30.0, 40.0]), optimizer.init(start), start)
    first_moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(first_moment, [0.06, 0.08], rtol=1e-5)  # a tenth of [0.6, 0.8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion"}, "Unknown optimizer 'lion'; choose one of muon, adam, adamw"),
        ({"learning_rate": 0.0}, "learning rate must be positive, not 0.0"),
        ({"warmup": 1.0}, "warm-up must be a fraction"),
        ({"clip": -1.0}, "not be negative"),
    ],
)
def test_refusals(settings, message):
    chosen = OptimizerSettings(**settings)
    with pytest.raises(UserError, match=message):
        _ = make_optimizer(chosen), make_pace(chosen, 10)
