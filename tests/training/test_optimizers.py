"""The optimizer: schedule, clipping, and what is refused."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsp.losses import Total
from jaxsp.prompts import PROMPT_KINDS, embedding, with_defaults
from jaxsp.settings import TrainingSettings, make_settings
from jaxsp.training.optimizers import (
    OPTIMIZERS,
    check_rates,
    constant,
    make_optimizer,
    make_rates,
    make_schedule,
    warmup_cosine,
)
from jaxsp.training.optimizers.muon import orthogonalise
from jaxsp.training.state import initial_state
from jaxsp.training.update import _descend
from jaxsp.typing import Array, UserError


def update(optimizer, gradient, state, sigma) -> tuple[Any, Any]:
    """``optimizer.update``, whose changes may be any tree to optax's types."""
    return optimizer.update(gradient, state, sigma)


def moved(sigma, change) -> Array:
    return cast("Array", optax.apply_updates(sigma, change))


@pytest.mark.parametrize(
    ("warmup", "steps"), [(0.2, 100), (0.0, 100), (0.05, 60), (0.9, 7), (0.5, 1), (0.2, 0)]
)
def test_the_rate_is_that_of_optax(warmup, steps):
    ours = warmup_cosine(0.5, steps, warmup)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else 0.5,
        peak_value=0.5,
        warmup_steps=round(warmup * steps),
        decay_steps=max(steps, 1),
    )
    for step in range(steps + 1):
        np.testing.assert_allclose(ours.rate(step), schedule(step), atol=1e-7)


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_embeddings_of_any_size_train_alike(optimizer):
    """A model whose embeddings are 50 times as large: the same prompts, 50 times as large."""
    random = np.random.RandomState(0)
    start, target = (jnp.asarray(random.standard_normal((3, 8)), jnp.float32) for _ in range(2))

    def trained(unit):
        sigma = unit * start
        settings = TrainingSettings(optimizer=optimizer, learning_rate=0.5, max_grad_norm=0.0, steps=20)
        transform, schedule = make_optimizer(settings), make_schedule(settings)
        (unit_step,) = jax.tree.leaves(embedding.rates({"embeddings": sigma}, {}))
        state = transform.init(sigma)
        for step in range(20):
            gradient = jax.grad(lambda x: jnp.sum((x / unit - target) ** 2))(sigma)
            change, state = update(transform, gradient, state, sigma)
            sigma = moved(sigma, schedule.rate(step) * unit_step * change)
        return sigma / unit

    np.testing.assert_allclose(trained(50.0), trained(1.0), rtol=1e-3, atol=1e-4)
    assert float(jnp.abs(trained(1.0) - target).mean()) < 0.6 * float(jnp.abs(start - target).mean())


def first_change(gradient, **settings):
    optimizer = make_optimizer(TrainingSettings(**settings))
    start = jnp.full((2,), 3.0)
    change, _ = update(optimizer, gradient, optimizer.init(start), start)
    return moved(start, 0.1 * change) - start


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
    optimizer = make_optimizer(TrainingSettings(optimizer="muon"))
    start = jnp.ones((4, 32))
    change, _ = update(optimizer, gradient, optimizer.init(start), start)
    assert float(jnp.sqrt(jnp.mean(change**2))) == pytest.approx(1.0, rel=1e-3)
    assert float(jnp.sum(change * gradient)) < 0


def test_clipping_bounds_the_gradient():
    optimizer = make_optimizer(TrainingSettings(optimizer="adam", max_grad_norm=1.0))
    start = jnp.zeros((2,))
    _, state = optimizer.update(jnp.array([30.0, 40.0]), optimizer.init(start), start)
    first_moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(first_moment, [0.06, 0.08], rtol=1e-5)  # a tenth of [0.6, 0.8]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(), (5,), (3, 8), (2, 3, 8), (2, 2, 3, 8)])
def test_optimizers_take_arrays_of_any_rank(name, shape):
    """The contract over the table: it goes downhill, alone as beside others; many matrices as one by one."""
    optimizer = make_optimizer(TrainingSettings(optimizer=name, max_grad_norm=0.0, weight_decay=0.0))
    random = np.random.RandomState(0)
    start = {"a": {"b": jnp.asarray(random.standard_normal(shape), jnp.float32)}}
    gradient = {"a": {"b": jnp.asarray(random.standard_normal(shape), jnp.float32)}}
    change, state = update(optimizer, gradient, optimizer.init(start), start)
    found = change["a"]["b"]
    assert (found.shape, found.dtype) == (shape, jnp.float32)
    assert float(jnp.vdot(found, gradient["a"]["b"])) < 0
    assert float(jnp.sqrt(jnp.mean(found**2))) == pytest.approx(1.0, rel=1e-3)
    if len(shape) > 2:
        one = optimizer.init(start["a"]["b"][0])
        alone, _ = update(optimizer, gradient["a"]["b"][0], one, start["a"]["b"][0])
        np.testing.assert_allclose(found[0], alone, rtol=1e-5, atol=1e-6)
    nothing, _ = update(optimizer, jax.tree.map(jnp.zeros_like, gradient), state, start)
    assert np.isfinite(nothing["a"]["b"]).all()


def test_an_optimizer_of_ones_own_is_used_as_it_is():
    own = optax.adamw(0.25)
    given = {"optimizer": own, "learning_rate": 7.0, "max_grad_norm": 0.1, "steps": 3}
    settings = make_settings(given).training
    assert make_optimizer(settings) is own
    schedule = make_schedule(settings)
    assert [float(schedule.rate(step)) for step in (0, 1, 2)] == [1.0, 1.0, 1.0]
    assert int(schedule.steps) == 3
    assert float(constant(rate=0.5).rate(10**6)) == 0.5


def test_an_unknown_optimizer():
    with pytest.raises(UserError, match="Unknown optimizer 'lion'; choose one of muon, adam, adamw"):
        make_optimizer(TrainingSettings(optimizer="lion"))


def test_the_same_choice_is_the_same_object():
    """Whatever else the settings say: equal updates then compile once."""
    first, second = (
        make_optimizer(TrainingSettings(optimizer="muon", seed=seed, steps=seed)) for seed in (1, 2)
    )
    assert first is second
    assert first is not make_optimizer(TrainingSettings(optimizer="muon", max_grad_norm=2.0))


@pytest.mark.parametrize("name", [*OPTIMIZERS, "one's own"])
def test_parts_that_are_to_stay_do_to_the_bit(name):
    """The keys and the first slot, whatever the gradient, the weight decay or the optimizer."""
    random = np.random.RandomState(0)
    shapes = {"keys": (2, 3, 1, 4), "values": (2, 3, 1, 4), "bias": (2, 3, 1), "context_length": ()}
    sigma = {part: jnp.asarray(random.standard_normal(shape), jnp.float32) for part, shape in shapes.items()}
    optimizer = optax.adam(0.1) if name == "one's own" else name
    given = {"kind": "key_value", "optimizer": optimizer, "rates": "keys=0,first=0,bias=3", "steps": 9}
    settings = with_defaults(make_settings(given))
    chosen: Any = SimpleNamespace(optimizer=make_optimizer(settings.training))
    state = initial_state(
        sigma, chosen.optimizer, key=jax.random.key(0), schedule=make_schedule(settings.training),
        rates=make_rates(settings, sigma),
    )  # fmt: skip
    step = jax.jit(functools.partial(_descend, chosen))
    for _ in range(3):
        gradient = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape)), sigma)
        state, _ = step(state, gradient, Total(jnp.float32(5.0), jnp.float32(2.0)), jnp.int32(1))
    for part, before in sigma.items():
        stays = np.ones(before.shape, bool)
        if part in ("values", "bias"):
            stays[:, 1:] = False
        np.testing.assert_array_equal(np.asarray(state.sigma[part] == before), stays, part)


def test_parts_that_a_kind_does_not_have():
    for kind, rates, said in (
        ("per_head", "frob=1", "no part 'frob'; its parts are keys, values, bias, and first"),
        ("embedding", "keys=1", "no part 'keys'; its parts are embeddings, and first"),
        ("low_rank", "first=0.5", "share their rows; leave out first"),
    ):
        with pytest.raises(UserError, match=said):
            check_rates(make_settings({"kind": kind, "rates": rates}))
    for kind in PROMPT_KINDS:
        own = "embeddings" if kind == "embedding" else "values"
        check_rates(make_settings({"kind": kind, "rates": f"{own}=0.5"}))
