"""The optimizer of σ: Adam, AdamW or Muon, warm-up and cosine decay, gradient clipping (optax)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxsp.typing import Array, Float, PyTree, UserError

# Decays of the moments. A prompt is trained for hundreds of steps: a second moment of 0.999 would
# average over all of them.
_B1, _B2 = 0.9, 0.99
_MUON_B1 = 0.8  # momentum shorter than Adam's, chosen on training loss


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """How the prompt is updated."""

    optimizer: str = "muon"
    """muon, adam or adamw."""
    learning_rate: float = 0.5
    """Peak, times the root mean square of the prompt's entries at its start (families' embeddings differ a
    hundredfold); with muon that is the root mean square of one update."""
    warmup: float = 0.05
    """Fraction of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """Of adamw."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0 leaves it alone."""


def orthogonalise(y: Float[Array, "k d"]) -> Float[Array, "k d"]:
    """``y`` with all its singular values made equal, and entries of root mean square 1.

    Directions that ``y`` does not have (singular value 0) stay out of it.

    Example:
      >>> import jax.numpy as jnp
      >>> orthogonalise(jnp.array([[3.0, 0.0], [0.0, 0.1]])).round(2)
      Array([[1.41, 0.  ],
             [0.  , 1.41]], dtype=float32)

    Reference:
      Muon: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), here by an exact decomposition:
      a prompt is a small matrix.
    """
    u, s, vt = jnp.linalg.svd(y, full_matrices=False)
    present = s > jnp.finfo(y.dtype).eps * max(y.shape) * s[0]
    return max(y.shape) ** 0.5 * (u * present) @ vt


def muon(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adam's direction (with Nesterov momentum), orthogonalised.

    Adam scales each entry of σ alone; this also moves every direction of its K vectors alike, so that
    a few strong ones don't use up the step.
    """
    return optax.chain(
        optax.scale_by_adam(b1=_MUON_B1, b2=_B2, nesterov=True),
        optax.stateless(lambda updates, params: jax.tree.map(orthogonalise, updates)),
        optax.scale_by_learning_rate(schedule),
    )


def root_mean_square(sigma: PyTree) -> float:
    """Of all entries of a prompt; 1 if they are all 0.

    Example:
      >>> root_mean_square({"embeddings": jnp.array([[3.0, 4.0]])})
      3.535533905029297
    """
    leaves = jax.tree.leaves(sigma)
    square = sum(jnp.sum(jnp.square(leaf)) for leaf in leaves) / sum(leaf.size for leaf in leaves)
    return float(jnp.sqrt(square)) or 1.0


def make_optimizer(
    settings: OptimizerSettings, steps: int, scale: float = 1.0
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The gradient transformation and its learning-rate schedule over ``steps`` steps.

    Args:
      settings: which, and how fast.
      steps: length of the schedule.
      scale: what the learning rate is a multiple of (see ``root_mean_square``).

    Raises:
      UserError: an unknown optimizer, or a number out of its range.
    """
    if not settings.learning_rate > 0:
        raise UserError(f"The learning rate must be positive, not {settings.learning_rate}.")
    if not 0 <= settings.warmup < 1:
        raise UserError(f"The warm-up must be a fraction from 0 to below 1, not {settings.warmup}.")
    if settings.weight_decay < 0 or settings.clip < 0:
        raise UserError("The weight decay and the clipping norm must not be negative.")
    peak = scale * settings.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if settings.warmup else peak,
        peak_value=peak,
        warmup_steps=round(settings.warmup * steps),
        decay_steps=max(steps, 1),
    )
    optimizers = {
        "muon": lambda: muon(schedule),
        "adam": lambda: optax.adam(schedule, b1=_B1, b2=_B2),
        "adamw": lambda: optax.adamw(schedule, b1=_B1, b2=_B2, weight_decay=settings.weight_decay),
    }
    if settings.optimizer not in optimizers:
        choices = ", ".join(optimizers)
        raise UserError(f"Unknown optimizer {settings.optimizer!r}; choose one of {choices}.")
    clip = [optax.clip_by_global_norm(settings.clip)] if settings.clip else []
    return optax.chain(*clip, optimizers[settings.optimizer]()), schedule
