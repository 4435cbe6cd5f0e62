"""Everything that changes while σ is trained: one pytree, and all that a checkpoint needs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxsp.training.optimizers import Pace
from jaxsp.typing import Array, Float, Int, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a training run.

    Attributes:
      sigma: the prompt's parameters, float32.
      optimizer_state: of the optax transformation.
      step: updates done.
      key: random key of the run, as raw key data; it orders the rows.
      cursor: training rows drawn so far; it fixes which come next.
      best_sigma: the σ with the lowest held-out KL so far.
      best_kl: that KL, in nats; infinite before the first evaluation.
      pace: the learning rate over the run; 1 at every step if ``None``.
    """

    sigma: PyTree
    optimizer_state: PyTree
    step: Int[Array, ""]
    key: Array
    cursor: Int[Array, ""]
    best_sigma: PyTree
    best_kl: Float[Array, ""]
    pace: Pace | None = None


def initial_state(
    sigma: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    key: Array,
    pace: Pace | None = None,
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        sigma=sigma,
        optimizer_state=optimizer.init(sigma),
        step=jnp.int32(0),
        key=jax.random.key_data(key),
        cursor=jnp.int32(0),
        best_sigma=sigma,
        best_kl=jnp.float32(jnp.inf),
        pace=pace,
    )
