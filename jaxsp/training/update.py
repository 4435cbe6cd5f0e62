"""One update of σ: a pure function, the same on one device and on many."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import optax

from jaxsp import distributions
from jaxsp.data.rows import Rows
from jaxsp.losses import Objective, Total, fused_objective, masked_sum
from jaxsp.models import decoder
from jaxsp.models.config import DecoderConfig
from jaxsp.training.state import TrainState
from jaxsp.typing import Array, Float, KeyValues, Params, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What an update reads and never changes: the weights, and the prefix before σ."""

    params: Params
    before: KeyValues


@dataclasses.dataclass(frozen=True)
class UpdateSettings:
    """What is fixed when an update is compiled; raises ``UserError`` if the objective has no gradient."""

    config: DecoderConfig
    kind: str
    objective: Objective
    optimizer: optax.GradientTransformation

    def __post_init__(self) -> None:
        self.objective.check_differentiable()


def loss_total(sigma: PyTree, frozen: Frozen, batch: Rows, settings: UpdateSettings) -> Total:
    """The objective's cost summed over a batch's answer positions, and how many there are."""
    params, config = frozen.params, settings.config
    prefix = distributions.prompt_prefix(params, config, sigma, frozen.before, settings.kind)
    states = distributions.answer_hidden(params, config, prefix, batch)
    mask = jnp.asarray(batch.mask)
    values, _ = fused_objective(
        settings.objective,
        states,
        decoder.unembedding(params, config),
        mask,
        teacher_hidden=jnp.asarray(batch.teacher_hidden),
        targets=jnp.asarray(batch.targets),
        softcap=config.logit_softcap,
    )
    return masked_sum(settings.objective.cost(values), mask)


def update(
    state: TrainState,
    batch: Rows,
    *,
    frozen: Frozen,
    settings: UpdateSettings,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One step of gradient descent on σ.

    Totals, counts and gradients are summed over ``axis_name`` and divided once: the result is that
    of the whole batch, however its rows are spread over the devices.

    Args:
      state: before the step; replicated over the devices.
      batch: this device's rows, with the teacher's hidden states.
      frozen: weights and prefix, which stay as they are.
      settings: static.
      axis_name: of the mapped device axis, if there is one.

    Returns:
      The state after the step, and ``loss`` (the objective's cost per answer token), ``gradient_norm`` and
      ``answer_tokens`` as float32 scalars.
    """

    def total_and_count(sigma: PyTree) -> tuple[Array, Array]:
        return loss_total(sigma, frozen, batch, settings)

    (total, count), gradient = jax.value_and_grad(total_and_count, has_aux=True)(state.sigma)
    if axis_name is not None:
        total, count, gradient = jax.lax.psum((total, count, gradient), axis_name)
    gradient = jax.tree.map(lambda g: g / jnp.maximum(count, 1.0), gradient)
    change, optimizer_state = settings.optimizer.update(
        gradient, state.optimizer_state, state.sigma
    )
    drawn = batch.sequences
    sigma = optax.apply_updates(state.sigma, change)
    chex.assert_trees_all_equal_shapes_and_dtypes(sigma, state.sigma)  # or the next step recompiles
    state = dataclasses.replace(
        state,
        sigma=sigma,
        optimizer_state=optimizer_state,
        step=state.step + 1,
        cursor=state.cursor + (drawn if axis_name is None else jax.lax.psum(drawn, axis_name)),
    )
    metrics = {
        "loss": total / jnp.maximum(count, 1.0),
        "gradient_norm": optax.tree.norm(gradient),
        "answer_tokens": count,
    }
    return state, metrics
