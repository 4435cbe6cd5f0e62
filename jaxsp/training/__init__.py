"""Training σ: the pure update of M prompts, its drivers, checkpoints and the loop.

The parts for a training loop of one's own, each documented where it stands.
"""

from __future__ import annotations

from jaxsp.training.drivers import DRIVERS, JitDriver, MeshDriver, PmapDriver
from jaxsp.training.state import TrainState, initial_state, stack, unstack
from jaxsp.training.update import Frozen, UpdateSettings, update

__all__ = [
    "DRIVERS",
    "Frozen",
    "JitDriver",
    "MeshDriver",
    "PmapDriver",
    "TrainState",
    "UpdateSettings",
    "initial_state",
    "stack",
    "unstack",
    "update",
]
