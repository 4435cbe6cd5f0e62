"""The optimizers of σ: one file each, one line each in ``OPTIMIZERS`` (optax).

An optimizer is a function from the training settings to an ``optax.GradientTransformation`` for arrays of any
rank. It gives the change of σ at a learning rate of 1; ``update`` scales it by the schedule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxsp.settings import TrainingSettings
from jaxsp.training.optimizers import adam, adamw, muon
from jaxsp.training.optimizers.schedule import Schedule, constant, warmup_cosine
from jaxsp.typing import PyTree, UserError

OPTIMIZERS: dict[str, Callable[[TrainingSettings], optax.GradientTransformation]] = {
    "muon": muon.make,
    "adam": adam.make,
    "adamw": adamw.make,
}


def make_optimizer(settings: TrainingSettings) -> optax.GradientTransformation:
    """The optimizer that the settings name, behind the gradient's clipping; one of the user's own as it is.

    Raises:
      UserError: there is none of that name.
    """
    if not isinstance(settings.optimizer, str):
        return settings.optimizer
    if settings.optimizer not in OPTIMIZERS:
        raise UserError(f"Unknown optimizer {settings.optimizer!r}; choose one of {', '.join(OPTIMIZERS)}.")
    # Of the settings, only what the optimizer reads: one object for one choice, so that equal updates
    # compile once.
    return _optimizer(
        TrainingSettings(
            optimizer=settings.optimizer,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
        )
    )


@functools.lru_cache
def _optimizer(settings: TrainingSettings) -> optax.GradientTransformation:
    clipping = [optax.clip_by_global_norm(settings.max_grad_norm)] if settings.max_grad_norm else []
    return optax.chain(*clipping, OPTIMIZERS[settings.optimizer](settings))


def make_schedule(settings: TrainingSettings, sigma: PyTree) -> Schedule:
    """The learning rate of every step: relative to the size of σ at its start, which differs from family to
    family; an optimizer of the user's own has its own.
    """
    if not isinstance(settings.optimizer, str):
        return constant(settings.steps)
    peak = root_mean_square(sigma) * settings.learning_rate
    return warmup_cosine(peak, settings.steps, settings.warmup_fraction)


def root_mean_square(sigma: PyTree) -> float:
    """The root mean square of all entries of a prompt; 1 if they are all 0.

    Example:
      >>> root_mean_square({"embeddings": jnp.array([[3.0, 4.0]])})
      3.535533905029297
    """
    leaves = jax.tree.leaves(sigma)
    square = sum(jnp.sum(jnp.square(leaf)) for leaf in leaves) / sum(leaf.size for leaf in leaves)
    return float(jnp.sqrt(square)) or 1.0
