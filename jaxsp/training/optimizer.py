"""The optimizer of σ: Adam or AdamW, warm-up and cosine decay, gradient clipping (optax)."""

from __future__ import annotations

import dataclasses

import optax

from jaxsp.typing import UserError

OPTIMIZERS = ("adam", "adamw")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """How σ is updated.

    Attributes:
      optimizer: ``"adam"`` or ``"adamw"``.
      learning_rate: at its peak.
      warmup: fraction of the steps in which the learning rate rises from 0.
      weight_decay: of ``adamw``.
      clip: largest global gradient norm; 0 leaves the gradient alone.
    """

    optimizer: str = "adam"
    learning_rate: float = 2e-2
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0


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
        adam = optax.adam(schedule)
    else:
        adam = optax.adamw(schedule, weight_decay=settings.weight_decay)
    clip = [optax.clip_by_global_norm(settings.clip)] if settings.clip else []
    return optax.chain(*clip, adam), schedule
