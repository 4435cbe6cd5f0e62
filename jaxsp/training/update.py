"""One update of σ: a pure function, the same on one device and on many."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from jaxsp import distributions
from jaxsp.data.examples import Rows
from jaxsp.losses import Objective, Total, fused_objective, masked_sum
from jaxsp.models import decoder
from jaxsp.models.config import DecoderConfig
from jaxsp.training.state import TrainState
from jaxsp.typing import Array, Float, KeyValues, Params, PyTree

Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What an update reads and never changes: the weights, and the prefix before σ."""

    params: Params
    before: KeyValues


@dataclasses.dataclass(frozen=True)
class UpdateSettings:
    """What is fixed when an update is compiled; raises ``UserError`` if the objective has no gradient.

    Attributes:
      config: of the model.
      kind: of the prompt, a key of ``jaxsp.prompts.PROMPT_KINDS``.
      objective: what is trained on.
      optimizer: of the prompt.
      accumulate: parts that a batch's rows are computed in, one after the other; never more than rows.
    """

    config: DecoderConfig
    kind: str
    objective: Objective
    optimizer: optax.GradientTransformation
    accumulate: int = 1

    def __post_init__(self) -> None:
        self.objective.check_differentiable()


def loss_total(sigma: PyTree, frozen: Frozen, batch: Rows, settings: UpdateSettings) -> Total:
    """The objective's cost summed over a batch's answer positions, and how many there are."""
    costs = _costs(_student(sigma, frozen, batch, settings), frozen, batch, settings)
    return masked_sum(costs, jnp.asarray(batch.mask))


def _student(sigma: PyTree, frozen: Frozen, batch: Rows, settings: UpdateSettings) -> Array:
    return distributions.prompt_hidden(
        frozen.params, settings.config, sigma, frozen.before, batch, settings.kind
    )


def _costs(states: Array, frozen: Frozen, batch: Rows, settings: UpdateSettings) -> Array:
    values, _ = fused_objective(
        settings.objective,
        states,
        decoder.unembedding(frozen.params, settings.config),
        jnp.asarray(batch.mask),
        teacher_hidden=jnp.asarray(batch.teacher_hidden),
        targets=jnp.asarray(batch.targets),
        softcap=settings.config.logit_softcap,
    )
    return settings.objective.cost(values)


def _in_parts(compute: Callable[[Rows], PyTree], batch: Rows, parts: int, axis: int = 0) -> PyTree:
    """What ``compute`` gives for parts of a batch's rows, added up; its memory is that of one part."""
    rows = batch.tokens.shape[axis]
    size = -(-rows // parts)
    parts = -(-rows // size)
    if parts == 1:
        return compute(batch)

    def cut(leaf: Array) -> Array:
        padding = [(0, 0)] * leaf.ndim
        padding[axis] = 0, parts * size - rows  # with zeros: the mask is False there
        leaf = jnp.pad(leaf, padding)
        leaf = leaf.reshape(*leaf.shape[:axis], parts, size, *leaf.shape[axis + 1 :])
        return jnp.moveaxis(leaf, axis, 0)

    stacked = jax.tree.map(cut, batch)
    like = jax.eval_shape(compute, jax.tree.map(lambda leaf: leaf[0], stacked))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

    def add(sums: PyTree, part: Rows) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, sums, compute(part)), None

    return jax.lax.scan(add, zeros, stacked)[0]


def update(
    state: TrainState,
    batch: Rows,
    *,
    frozen: Frozen,
    settings: UpdateSettings,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One step of gradient descent on σ.

    Totals, counts and gradients are summed over the parts that ``settings.accumulate`` asks for and over
    ``axis_name``, and divided once: the result is that of the whole batch, however its rows are spread.

    Args:
      state: before the step; replicated over the devices.
      batch: this device's rows, with the teacher's hidden states.
      frozen: weights and prefix, which stay as they are.
      settings: static.
      axis_name: of the mapped device axis, if there is one.

    Returns:
      The state after the step, and ``loss`` (the objective's cost per answer token), ``gradient_norm``,
      ``answer_tokens`` and ``learning_rate`` as float32 scalars.
    """

    def loss_and_gradient(rows: Rows) -> tuple[Total, PyTree]:
        def total_and_count(sigma: PyTree) -> tuple[Array, Array]:
            return loss_total(sigma, frozen, rows, settings)

        found, gradient = jax.value_and_grad(total_and_count, has_aux=True)(state.sigma)
        return Total(*found), gradient

    loss, gradient = _in_parts(loss_and_gradient, batch, settings.accumulate)
    drawn = batch.sequences
    if axis_name is not None:
        # As one float32 message: a batch's sequences are few enough to be exact.
        summed = jax.lax.psum((loss, gradient, drawn.astype(jnp.float32)), axis_name)
        loss, gradient, drawn = *summed[:2], summed[2].astype(drawn.dtype)
    return _descend(settings, state, loss, gradient, drawn)


def update_many(
    states: TrainState, batches: Rows, *, frozen: Frozen, settings: UpdateSettings
) -> tuple[TrainState, Metrics]:
    """``update`` of M prompts at once, each on its own batch; those at their last step stay as they are.

    The model reads all of them side by side, and the head's loss sees their positions as one batch.

    Args:
      states: of all prompts, stacked: every array has a leading axis M.
      batches: likewise; a prompt's rows may be empty.
      frozen: shared.
      settings: shared.

    Returns:
      The states after the step, and the metrics of ``update``, ``[M]`` each.
    """

    def gradients_and_losses(rows: Rows) -> tuple[PyTree, Total]:
        def totals(sigmas: PyTree) -> tuple[Array, Total]:
            student = functools.partial(_student, frozen=frozen, settings=settings)
            hidden = jax.vmap(lambda sigma, batch: student(sigma, batch=batch))(sigmas, rows)
            costs = _costs(hidden, frozen, rows, settings)
            each = jax.vmap(masked_sum)(costs, jnp.asarray(rows.mask))
            return jnp.sum(each.total), each  # no σ has a part in another's total

        return jax.grad(totals, has_aux=True)(states.sigma)

    gradients, each = _in_parts(gradients_and_losses, batches, settings.accumulate, axis=1)
    drawn = jax.vmap(lambda batch: batch.sequences)(batches)
    after, metrics = jax.vmap(functools.partial(_descend, settings))(states, each, gradients, drawn)

    def unless_done(before: TrainState, after: TrainState) -> TrainState:
        if before.pace is None:
            return after
        done = before.step >= before.pace.steps
        return jax.tree.map(lambda old, new: jnp.where(done, old, new), before, after)

    return jax.vmap(unless_done)(states, after), metrics


def _descend(
    settings: UpdateSettings, state: TrainState, loss: Total, gradient: PyTree, drawn: Array
) -> tuple[TrainState, Metrics]:
    """The state after a step along the gradient of a summed loss."""
    gradient = jax.tree.map(lambda g: g / jnp.maximum(loss.count, 1.0), gradient)
    change, optimizer_state = settings.optimizer.update(
        gradient, state.optimizer_state, state.sigma
    )
    rate = jnp.float32(1.0) if state.pace is None else state.pace.rate(state.step)
    sigma = optax.apply_updates(state.sigma, jax.tree.map(lambda c: rate * c, change))
    chex.assert_trees_all_equal_shapes_and_dtypes(sigma, state.sigma)  # or the next step recompiles
    state = dataclasses.replace(
        state,
        sigma=sigma,
        optimizer_state=optimizer_state,
        step=state.step + 1,
        cursor=state.cursor + drawn,
    )
    metrics = {
        "loss": loss.total / jnp.maximum(loss.count, 1.0),
        "gradient_norm": optax.tree.norm(gradient),
        "answer_tokens": loss.count,
        "learning_rate": rate,
    }
    return state, metrics
