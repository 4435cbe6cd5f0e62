"""Training σ: the pure update of M prompts, its drivers, checkpoints and the loop.

The parts for a training loop of one's own, each documented where it stands.
"""

from __future__ import annotations

from jaxsp.training.drivers import (
    DRIVERS as DRIVERS,
    JitDriver as JitDriver,
    MeshDriver as MeshDriver,
    PmapDriver as PmapDriver,
)
from jaxsp.training.state import (
    TrainState as TrainState,
    initial_state as initial_state,
    stack as stack,
    unstack as unstack,
)
from jaxsp.training.update import Frozen as Frozen, UpdateSettings as UpdateSettings, update as update
