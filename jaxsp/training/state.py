"""Everything that changes while σ is trained: one pytree, and all that a checkpoint needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxsp.training.evolution import Evolution
from jaxsp.training.optimizers.schedule import Schedule, constant
from jaxsp.typing import Array, Float, Int, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The training state of one prompt; or of M, stacked: every array has a leading axis M.

    Attributes:
      sigma: the prompt's parameters, float32.
      optimizer_state: state of the optax transformation.
      step: updates done.
      key: random key of the run, as raw key data; it orders the rows.
      cursor: training rows drawn so far; it fixes which come next.
      best_sigma: the σ with the lowest held-out KL so far.
      best_kl: that KL, in nats; infinite before the first evaluation.
      schedule: the number of steps, and the learning rate of each.
      rates: sizes of a step of each entry at a learning rate of 1: arrays that broadcast to σ's.
    """

    sigma: PyTree
    optimizer_state: PyTree
    step: Int[Array, ""]
    key: Array
    cursor: Int[Array, ""]
    best_sigma: PyTree
    best_kl: Float[Array, ""]
    schedule: Schedule
    rates: PyTree


def initial_state(
    sigma: PyTree,
    optimizer: optax.GradientTransformation | Evolution,
    *,
    key: Array,
    schedule: Schedule | None = None,
    rates: PyTree = None,
) -> TrainState:
    """The state of one prompt before the first step.

    Args:
      sigma: float32 arrays.
      optimizer: as in ``UpdateSettings``.
      key: random key of the run.
      schedule: the learning rate; by default 1 at every step, for an optimizer that has its own.
      rates: as in ``TrainState``; by default 1, and 0 for leaves without axes, which are no parameters.
    """
    if rates is None:
        rates = jax.tree.map(lambda leaf: jnp.float32(jnp.ndim(leaf) > 0), sigma)
    return TrainState(
        sigma=sigma,
        optimizer_state=optimizer.init(sigma),
        step=jnp.int32(0),
        key=jax.random.key_data(key),
        cursor=jnp.int32(0),
        best_sigma=sigma,
        best_kl=jnp.float32(jnp.inf),
        schedule=constant() if schedule is None else schedule,
        rates=rates,
    )


def stack(states: Sequence[TrainState]) -> TrainState:
    """The states of M prompts side by side, as ``update`` takes them."""
    return _stacked(list(states))


@jax.jit
def _stacked(states: list[TrainState]) -> TrainState:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


@jax.jit
def put(states: TrainState, place: Int[Array, ""], state: TrainState) -> TrainState:
    """The states of several prompts with this one in its place."""
    return jax.tree.map(lambda all_M, leaf: all_M.at[place].set(leaf), states, state)


@jax.jit
def unstack(states: TrainState, place: Int[Array, ""] | int) -> TrainState:
    """The state of one of several prompts."""
    return jax.tree.map(lambda leaf: leaf[place], states)
