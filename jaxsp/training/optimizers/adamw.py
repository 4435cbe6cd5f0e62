"""Adam with decoupled weight decay.

Reference: Loshchilov & Hutter 2019 (arXiv:1711.05101).
"""

from __future__ import annotations

import optax

from jaxsp.settings import TrainingSettings
from jaxsp.training.optimizers.adam import B1, B2


def make(settings: TrainingSettings) -> optax.GradientTransformation:
    """AdamW with ``settings.weight_decay``."""
    return optax.adamw(1.0, b1=B1, b2=B2, weight_decay=settings.weight_decay)
