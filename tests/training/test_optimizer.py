"""The optimizer: schedule, clipping, and what is refused."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsp.training.optimizer import OptimizerSettings, make_optimizer
from jaxsp.typing import UserError


def test_schedule_rises_and_falls():
    _, schedule = make_optimizer(OptimizerSettings(learning_rate=0.5, warmup=0.2), 100)
    values = [float(schedule(step)) for step in range(101)]
    assert values[0] == 0.0
    assert values[20] == pytest.approx(0.5)
    assert values[100] == pytest.approx(0.0, abs=1e-6)
    assert all(a < b for a, b in itertools.pairwise(values[:21]))
    assert all(a > b for a, b in itertools.pairwise(values[20:]))


def first_change(gradient, **settings):
    optimizer, _ = make_optimizer(OptimizerSettings(learning_rate=0.1, warmup=0, **settings), 10)
    start = jnp.full((2,), 3.0)
    change, _ = optimizer.update(gradient, optimizer.init(start), start)
    return optax.apply_updates(start, change) - start


def test_adam_moves_by_the_learning_rate_and_adamw_decays_as_well():
    gradient = jnp.array([2.0, -5.0])
    np.testing.assert_allclose(first_change(gradient), [-0.1, 0.1], rtol=1e-4)
    decayed = first_change(gradient, optimizer="adamw", weight_decay=0.5)
    np.testing.assert_allclose(decayed, [-0.1 - 0.15, 0.1 - 0.15], rtol=1e-4)


def test_clipping_bounds_the_gradient():
    settings = OptimizerSettings(learning_rate=0.1, warmup=0, clip=1.0)
    optimizer, _ = make_optimizer(settings, 10)
    start = jnp.zeros((2,))
    _, state = optimizer.update(jnp.array([30.0, 40.0]), optimizer.init(start), start)
    first_moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(first_moment, [0.06, 0.08], rtol=1e-5)  # a tenth of [0.6, 0.8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion"}, "Unknown optimizer 'lion'; choose one of adam, adamw"),
        ({"learning_rate": 0.0}, "learning rate must be positive, not 0.0"),
        ({"warmup": 1.0}, "warm-up must be a fraction"),
        ({"clip": -1.0}, "not be negative"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(OptimizerSettings(**settings), 10)
