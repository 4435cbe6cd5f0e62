"""jaxsp.training.evolution: estimates without a gradient, and prompts trained by them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsp
from jaxsp.losses import OBJECTIVES
from jaxsp.models.sharding import as_mesh
from jaxsp.training.drivers import JitDriver, MeshDriver
from jaxsp.training.evolution import Evolution
from jaxsp.training.state import initial_state, stack, unstack
from jaxsp.training.update import UpdateSettings
from jaxsp.typing import UserError
from tests.conftest import CONTEXT, QUERIES, assert_same_sigma
from tests.training.test_update import add_prompt_axis, problem_of

SIGMA = {"keys": jnp.ones((2, 6, 5)), "bias": jnp.full(4, 2.0), "start": jnp.float32(3)}
RATES = {"keys": jnp.float32(2), "bias": jnp.float32(1), "start": jnp.float32(0)}


def estimate(evolution, losses_of, key=0):
    directions = evolution.directions(SIGMA, jax.random.key(key))
    return evolution.estimate(directions, losses_of(evolution.around(SIGMA, RATES, directions)))


def cosine(ours, theirs):
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (ours, theirs))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("rank", [1, 3, None])
def test_the_estimate_points_along_the_gradient(rank):
    """In units of the rates: a part that may move twice as far counts twice."""
    slope = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), SIGMA)
    evolution = Evolution(optax.sgd(1.0), pairs=2000, scale=0.01, rank=rank)

    def losses(around):
        return sum(
            jnp.sum((x * g).reshape(len(x), -1), axis=1)
            for x, g in zip(jax.tree.leaves(around), jax.tree.leaves(slope), strict=True)
        )

    expected = jax.tree.map(lambda g, rate: g * rate, slope, RATES)
    found = {**estimate(evolution, losses), "start": jnp.float32(0)}  # it does not move
    assert cosine(found, expected) > 0.97


def test_prompts_that_are_equally_good_say_nothing():
    found = estimate(Evolution(optax.sgd(1.0)), lambda around: jnp.zeros(len(around["bias"])))
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(found))


def test_only_the_order_counts():
    evolution = Evolution(optax.sgd(1.0))

    def losses(around):
        return jnp.sum(around["keys"], axis=(1, 2, 3))

    once, shaped = estimate(evolution, losses), estimate(evolution, lambda x: losses(x) ** 3)
    jax.tree.map(np.testing.assert_array_equal, once, shaped)


@pytest.mark.parametrize("rank", [1, 2])
def test_directions_of_matrices_are_of_low_rank(rank):
    found = Evolution(optax.sgd(1.0), pairs=3, rank=rank).directions(SIGMA, jax.random.key(0))
    assert found["keys"].shape == (3, 2, 6, 5)
    assert np.all(np.linalg.matrix_rank(np.asarray(found["keys"]), tol=1e-4) == rank)
    many = Evolution(optax.sgd(1.0), pairs=500, rank=rank).directions(SIGMA, jax.random.key(0))
    assert float(jnp.mean(many["keys"] ** 2)) == pytest.approx(1, abs=0.2)


def test_the_prompts_tried_stand_on_either_side():
    evolution = Evolution(optax.sgd(1.0), pairs=3, scale=0.5)
    around = evolution.around(SIGMA, RATES, evolution.directions(SIGMA, jax.random.key(0)))
    for name, tried in around.items():
        np.testing.assert_allclose(
            tried[:3] + tried[3:], np.broadcast_to(2 * SIGMA[name], tried[:3].shape), rtol=1e-6
        )
    assert np.all(around["start"] == SIGMA["start"])


@pytest.fixture(scope="module")
def problem(calm_model):
    return problem_of(calm_model)


EVOLUTION = Evolution(optax.adam(0.05), pairs=8, scale=0.1)


def trained(problem, make, objective="kl", steps=1, parts=1):
    frozen, config, rows, sigma, _ = problem
    settings = UpdateSettings(config, "embedding", OBJECTIVES[objective], EVOLUTION, parts)
    rates = {"embeddings": jnp.sqrt(jnp.mean(sigma["embeddings"] ** 2))}
    driver, losses = make(frozen, settings), []
    states = driver.place(stack([initial_state(sigma, EVOLUTION, key=jax.random.key(0), rates=rates)]))
    for _ in range(steps):
        states, metrics = driver.step(states, add_prompt_axis(rows))
        losses.append(float(metrics["loss"][0]))
    return losses, unstack(driver.fetch(states), 0).sigma


@pytest.mark.parametrize("objective", ["kl", "zero_one"])
def test_a_prompt_is_trained_without_a_gradient(problem, objective):
    """Also on an objective that has none."""
    losses, _ = trained(problem, JitDriver, objective, steps=40)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_one_device_gives_what_parts_and_eight_devices_give(problem):
    """Losses are summed before they are ranked."""
    losses, sigma = trained(problem, JitDriver)
    for make, parts in ((JitDriver, 2), (lambda *of: MeshDriver(*of, mesh=as_mesh("data=8")), 1)):
        others = trained(problem, make, parts=parts)
        np.testing.assert_allclose(losses, others[0], rtol=1e-5)
        assert_same_sigma(sigma, others[1], within=1e-5)


def test_a_compression_by_evolution_goes_on_to_the_same_bits(calm_model, tmp_path):
    options: dict[str, Any] = {
        "kind": "embedding", "prompt_length": 2, "steps": 4, "max_answer_tokens": 4, "checkpoint_every": 1,
        "optimizer": "evolution", "learning_rate": 0.02, "objective": "zero_one", "progress": False,
    }  # fmt: skip

    def stop(step):
        if step.number == 2:
            raise KeyboardInterrupt

    whole = jaxsp.compress(calm_model, CONTEXT, QUERIES, **options)
    with pytest.raises(jaxsp.Interrupted):
        jaxsp.compress(calm_model, CONTEXT, QUERIES, out=tmp_path / "out", callbacks=[stop], **options)
    pieces = jaxsp.compress(calm_model, CONTEXT, QUERIES, out=tmp_path / "out", resume=True, **options)
    assert_same_sigma(pieces.prompt.sigma, whole.prompt.sigma)
    options["steps"] = 0
    start = jaxsp.compress(calm_model, CONTEXT, QUERIES, **options).prompt.sigma
    assert np.any(whole.prompt.sigma["embeddings"] != start["embeddings"])
    options["optimizer"] = "adam"
    with pytest.raises(UserError, match="can't train on zero_one"):
        jaxsp.compress(calm_model, CONTEXT, QUERIES, **options)


def test_an_evolution_of_ones_own_moves_as_the_settings_say(calm_model):
    """Not by rates of its own, as an optimizer of optax does."""
    options: dict[str, Any] = {
        "kind": "embedding", "prompt_length": 2, "steps": 1, "max_answer_tokens": 4, "progress": False,
        "learning_rate": 0.02, "warmup_fraction": 0.0,
    }  # fmt: skip
    named = jaxsp.compress(calm_model, CONTEXT, QUERIES, optimizer="evolution", **options)
    own = dataclasses.replace(Evolution(optax.adam(1.0, b1=0.9, b2=0.99)))
    same = jaxsp.compress(calm_model, CONTEXT, QUERIES, optimizer=own, **options)
    assert_same_sigma(named.prompt.sigma, same.prompt.sigma)
