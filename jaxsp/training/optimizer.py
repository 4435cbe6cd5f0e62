"""The optimizer of σ: Adam or AdamW, warm-up and cosine decay, gradient clipping (optax)."""

from __future__ import annotations

import dataclasses

import optax

from jaxsp.typing import UserError

OPTIMIZERS = ("adam", "adamw")

SECOND_MOMENT = (
    0.99  # decay; a prompt is trained for hundreds of steps, where 0.999 averages too long
)


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """How the prompt is updated."""

    optimizer: str = "adam"
    """adam or adamw."""
    learning_rate: float = 3e-2
    """Of the optimizer, at its peak."""
    warmup: float = 0.05
    """Fraction of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """Of adamw."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0 leaves it alone."""


def make_optimizer(
    settings: OptimizerSettings, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The gradient transformation and its learning-rate schedule over ``steps`` steps.

    Raises:
      UserError: an unknown optimizer, or a number out of its range.
    """
    if settings.optimizer not in OPTIMIZERS:
        choices = ", ".join(OPTIMIZERS)
        raise UserError(f"Unknown optimizer {settings.optimizer!r}; choose one of {choices}.")
    if not settings.learning_rate > 0:
        raise UserError(f"The learning rate must be positive, not {settings.learning_rate}.")
    if not 0 <= settings.warmup < 1:
        raise UserError(f"The warm-up must be a fraction from 0 to below 1, not {settings.warmup}.")
    if settings.weight_decay < 0 or settings.clip < 0:
        raise UserError("The weight decay and the clipping norm must not be negative.")
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if settings.warmup else settings.learning_rate,
        peak_value=settings.learning_rate,
        warmup_steps=round(settings.warmup * steps),
        decay_steps=max(steps, 1),
    )
    if settings.optimizer == "adam":
        adam = optax.adam(schedule, b2=SECOND_MOMENT)
    else:
        adam = optax.adamw(schedule, b2=SECOND_MOMENT, weight_decay=settings.weight_decay)
    clip = [optax.clip_by_global_norm(settings.clip)] if settings.clip else []
    return optax.chain(*clip, adam), schedule
