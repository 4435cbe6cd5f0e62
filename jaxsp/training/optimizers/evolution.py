"""Evolution strategies under Adam, for objectives that have no gradient.

References: as in ``jaxsp.training.evolution``.
"""

from __future__ import annotations

from jaxsp.settings import TrainingSettings
from jaxsp.training.evolution import Evolution
from jaxsp.training.optimizers import adam


def make(settings: TrainingSettings) -> Evolution:
    """Adam over estimates of 16 pairs."""
    return Evolution(adam.make(settings))
