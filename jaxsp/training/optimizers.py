"""The optimizer of σ: Adam, AdamW or Muon, warm-up and cosine decay, gradient clipping (optax)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from jaxsp.typing import Array, Float, Int, PyTree, UserError

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


def muon() -> optax.GradientTransformation:
    """Adam's direction (with Nesterov momentum), orthogonalised.

    Adam scales each entry of σ alone; this also moves every direction of its K vectors alike, so that
    a few strong ones don't use up the step.
    """
    return optax.chain(
        optax.scale_by_adam(b1=_MUON_B1, b2=_B2, nesterov=True),
        optax.stateless(lambda updates, params: jax.tree.map(orthogonalise, updates)),
        optax.scale(-1.0),
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pace:
    """The learning rate of a run: it rises to its peak in a line, then falls to 0 along a cosine.

    Arrays and not settings, so that runs of other lengths and rates share a compiled update.

    Attributes:
      peak: the highest rate.
      steps: of the run.
      warmup: those of the rise.

    Reference:
      Loshchilov & Hutter 2017, SGDR (arXiv:1608.03983).
    """

    peak: Float[Array, ""]
    steps: Int[Array, ""]
    warmup: Int[Array, ""]

    def rate(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """The learning rate of a step, counted from 0.

        Example:
          >>> pace = make_pace(OptimizerSettings(learning_rate=1.0, warmup=0.5), 4)
          >>> [round(float(pace.rate(step)), 2) for step in range(5)]
          [0.0, 0.5, 1.0, 0.5, 0.0]
        """
        rise = step / jnp.maximum(self.warmup, 1)
        fall = (step - self.warmup) / jnp.maximum(self.steps - self.warmup, 1)
        fall = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(fall, 1.0)))
        return self.peak * jnp.where(step < self.warmup, rise, fall)


def make_pace(settings: OptimizerSettings, steps: int, scale: float = 1.0) -> Pace:
    """The learning rate over ``steps`` steps.

    Args:
      settings: its peak and its warm-up.
      steps: of the run.
      scale: what the peak is a multiple of (see ``root_mean_square``).

    Raises:
      UserError: a number out of its range.
    """
    if not settings.learning_rate > 0:
        raise UserError(f"The learning rate must be positive, not {settings.learning_rate}.")
    if not 0 <= settings.warmup < 1:
        raise UserError(f"The warm-up must be a fraction from 0 to below 1, not {settings.warmup}.")
    return Pace(
        peak=jnp.float32(scale * settings.learning_rate),
        steps=jnp.int32(steps),
        warmup=jnp.int32(round(settings.warmup * steps)),
    )


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """The change of σ at a learning rate of 1; ``update`` scales it by the step's own.

    Raises:
      UserError: an unknown optimizer, or a number out of its range.
    """
    if settings.weight_decay < 0 or settings.clip < 0:
        raise UserError("The weight decay and the clipping norm must not be negative.")
    return _optimizer(settings.optimizer, settings.weight_decay, settings.clip)


@functools.lru_cache  # one object for one choice: equal updates then compile once
def _optimizer(name: str, weight_decay: float, clip: float) -> optax.GradientTransformation:
    optimizers = {
        "muon": muon,
        "adam": lambda: optax.adam(1.0, b1=_B1, b2=_B2),
        "adamw": lambda: optax.adamw(1.0, b1=_B1, b2=_B2, weight_decay=weight_decay),
    }
    if name not in optimizers:
        choices = ", ".join(optimizers)
        raise UserError(f"Unknown optimizer {name!r}; choose one of {choices}.")
    clipping = [optax.clip_by_global_norm(clip)] if clip else []
    return optax.chain(*clipping, optimizers[name]())
