"""One update of σ: a pure function of M prompts, the same on one device and on many."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp
import optax

from jaxsp import distributions, prompts
from jaxsp.data.examples import Rows
from jaxsp.losses import Objective, Total, as_objective, masked_sum
from jaxsp.models.config import DecoderConfig
from jaxsp.models.output_head import OutputHead
from jaxsp.prompts import with_defaults
from jaxsp.settings import Settings
from jaxsp.training.evolution import Evolution
from jaxsp.training.optimizers import make_optimizer
from jaxsp.training.state import TrainState
from jaxsp.typing import AnyArray, Array, Float, KeyValues, Params, PyTree, ceil_div

Metrics = Mapping[str, Float[AnyArray, " m"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """The arrays that an update reads and never changes.

    Attributes:
      params: the model's weights.
      preamble: the prefix before σ.
      teacher_head: head of the teacher, if it is another model.
    """

    params: Params
    preamble: KeyValues
    teacher_head: OutputHead | None = None


@dataclasses.dataclass(frozen=True)
class UpdateSettings:
    """Choices that an update is compiled for: a static argument; one object for one choice compiles once.

    Attributes:
      config: configuration of the model.
      kind: kind of the prompt, a key of ``jaxsp.prompts.PROMPT_KINDS``.
      objective: what is trained on.
      optimizer: optimizer of the prompt; with ``Evolution`` any objective can be trained on.
      grad_accumulation: parts that a batch's rows are computed in, one after the other; never more than rows.

    Raises:
      UserError: the objective has no gradient.
    """

    config: DecoderConfig
    kind: str
    objective: Objective
    optimizer: optax.GradientTransformation | Evolution
    grad_accumulation: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, Evolution):
            self.objective.check_differentiable()

    @classmethod
    def of(cls, config: DecoderConfig, settings: Settings) -> UpdateSettings:
        """The part of the settings that is compiled into the update of a model."""
        settings = with_defaults(settings)
        objective = as_objective(settings.training.objective, by_gradient=False)  # checked as one is made
        optimizer = make_optimizer(settings.training)
        return cls(config, settings.prompt.kind, objective, optimizer, settings.devices.grad_accumulation)


def loss_totals(sigmas: PyTree, frozen: Frozen, batches: Rows, settings: UpdateSettings) -> Total:
    """The objective's cost summed over each prompt's answer positions, and how many there are: ``[M]`` each.

    The model reads all prompts side by side, and the head's loss sees their positions as one batch.
    """
    config = settings.config
    read = functools.partial(distributions.prompt_hidden, frozen.params, config, kind=settings.kind)
    states = jax.vmap(lambda sigma, rows: read(sigma, frozen.preamble, rows))(sigmas, batches)
    head = OutputHead.of(frozen.params, config)
    values, _ = distributions.compare(settings.objective, states, head, batches, frozen.teacher_head)
    return jax.vmap(masked_sum)(settings.objective.cost(values), jnp.asarray(batches.mask))


def update(
    states: TrainState,
    batches: Rows,
    *,
    frozen: Frozen,
    settings: UpdateSettings,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[TrainState, Metrics]:
    """One step of descent on the σ of M prompts, each on its own batch: by the gradient, or by ``Evolution``.

    Totals, counts and gradients are summed over the parts that ``settings.grad_accumulation`` asks for and
    over ``axis_name``, and divided once: the result is that of the whole batch, however its rows are spread.
    A prompt that has done all the steps of its schedule stays as it is.

    Args:
      states: before the step: every array has a leading axis M; the same on all devices of ``axis_name``.
      batches: likewise ``[M, B, ...]``, with the teacher's targets; this device's rows. A prompt's rows may
        be empty.
      frozen: weights and preamble, which stay as they are; an argument, so that nothing of them is folded
        into the program.
      settings: static.
      axis_name: name of the mapped device axis over which each batch's rows are spread, or names, if any.

    Returns:
      The states after the step, and ``loss`` (the objective's cost per answer token; with ``Evolution`` the
      mean of the prompts tried), ``gradient_norm``, ``answer_tokens`` and ``learning_rate``, float32 ``[M]``
      each.
    """
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(states.key), states.step)

    def read(sigmas: PyTree) -> PyTree:
        return jax.vmap(functools.partial(prompts.drawn, settings.kind))(sigmas, keys)

    sums_of, gradients_of = _by_gradient, _of_sums
    if isinstance(evolution := settings.optimizer, Evolution):
        sums_of, gradients_of = _by_trial(evolution, states, keys)

    def sums(rows: Rows) -> PyTree:
        return sums_of(lambda sigmas: loss_totals(read(sigmas), frozen, rows, settings), states.sigma)

    found = _in_parts(sums, batches, settings.grad_accumulation)
    drawn = jax.vmap(lambda rows: rows.sequences)(batches)
    if axis_name is not None:
        # As one float32 message: a batch's sequences are few enough to be exact.
        found, exact = jax.lax.psum((found, drawn.astype(jnp.float32)), axis_name)
        drawn = exact.astype(drawn.dtype)
    gradients, losses = gradients_of(found)
    return jax.vmap(functools.partial(_descend, settings))(states, gradients, losses, drawn)


Totals = Callable[[PyTree], Total]
"""The totals of M prompts, by their parameters."""


def _by_gradient(totals: Totals, sigmas: PyTree) -> tuple[PyTree, Total]:
    """Gradients of summed losses, and these."""

    def summed(sigmas: PyTree) -> tuple[Array, Total]:
        each = totals(sigmas)
        return jnp.sum(each.total), each  # no σ has a part in another's total

    return jax.grad(summed, has_aux=True)(sigmas)


def _of_sums(found: tuple[PyTree, Total]) -> tuple[PyTree, Total]:
    """Gradients of mean losses, from those of summed ones."""

    def of_mean(gradient: PyTree, loss: Total) -> PyTree:
        return jax.tree.map(lambda g: g / jnp.maximum(loss.count, 1.0), gradient)

    return jax.vmap(of_mean)(*found), found[1]


def _by_trial(
    evolution: Evolution, states: TrainState, keys: Array
) -> tuple[Callable[[Totals, PyTree], Total], Callable[[Total], tuple[PyTree, Total]]]:
    """The same two functions for N prompts tried around each: ``[M, N]`` totals, and estimates by them."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
    directions = jax.vmap(evolution.directions)(states.sigma, keys)
    around = jax.vmap(evolution.around)(states.sigma, states.rates, directions)

    def totals_of(totals: Totals, sigmas: PyTree) -> Total:
        del sigmas
        return jax.vmap(totals, in_axes=1, out_axes=1)(around)

    def estimates(found: Total) -> tuple[PyTree, Total]:
        mean = jax.tree.map(lambda each: jnp.mean(each, axis=1), found)
        return jax.vmap(evolution.estimate)(directions, found.total), mean

    return totals_of, estimates


def _in_parts(compute: Callable[[Rows], PyTree], batches: Rows, parts: int) -> PyTree:
    """Adds up what ``compute`` gives for parts of the batches' rows; its memory is that of one part."""
    rows = batches.tokens.shape[1]
    size = ceil_div(rows, parts)
    parts = ceil_div(rows, size)
    if parts == 1:
        return compute(batches)

    def cut(leaf: Array) -> Array:
        padding = [(0, 0), (0, parts * size - rows)] + [(0, 0)] * (leaf.ndim - 2)
        leaf = jnp.pad(leaf, padding)  # with zeros: the mask is False there
        leaf = leaf.reshape(leaf.shape[0], parts, size, *leaf.shape[2:])
        return jnp.moveaxis(leaf, 1, 0)

    stacked = jax.tree.map(cut, batches)
    like = jax.eval_shape(compute, jax.tree.map(lambda leaf: leaf[0], stacked))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

    def add(sums: PyTree, part: Rows) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, sums, compute(part)), None

    return jax.lax.scan(add, zeros, stacked)[0]


def _descend(
    settings: UpdateSettings, state: TrainState, gradient: PyTree, loss: Total, drawn: Array
) -> tuple[TrainState, dict[str, Array]]:
    """One prompt's state after a step along the gradient of its mean loss."""
    change, optimizer_state = settings.optimizer.update(gradient, state.optimizer_state, state.sigma)
    rate = state.schedule.rate(state.step)
    sigma = optax.apply_updates(state.sigma, jax.tree.map(lambda own, c: rate * own * c, state.rates, change))
    chex.assert_trees_all_equal_shapes_and_dtypes(sigma, state.sigma)  # or the next step recompiles
    after = dataclasses.replace(
        state, sigma=sigma, optimizer_state=optimizer_state, step=state.step + 1, cursor=state.cursor + drawn
    )
    done = state.step >= state.schedule.steps
    after = jax.tree.map(lambda old, new: jnp.where(done, old, new), state, after)
    metrics = {
        "loss": loss.total / jnp.maximum(loss.count, 1.0),
        "gradient_norm": optax.tree.norm(gradient),
        "answer_tokens": loss.count,
        "learning_rate": rate,
    }
    return after, metrics
