"""Adam.

Reference: Kingma & Ba 2015 (arXiv:1412.6980).
"""

from __future__ import annotations

import optax

from jaxsp.settings import TrainingSettings

B1, B2 = 0.9, 0.99
"""Decays of the moments. A prompt is trained for hundreds of steps: a second moment of 0.999 would average
over all of them."""


def make(settings: TrainingSettings) -> optax.GradientTransformation:
    """Adam without weight decay."""
    del settings
    return optax.adam(1.0, b1=B1, b2=B2)
