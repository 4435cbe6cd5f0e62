"""Drivers: the same pure update run by ``jax.jit`` on one device, or by ``jax.pmap`` on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.data.rows import Rows
from jaxsp.training.state import TrainState
from jaxsp.training.update import Frozen, UpdateSettings, update
from jaxsp.typing import Array, UserError

_AXIS = "devices"


class Driver(Protocol):
    """Holds the frozen weights where they are needed; turns (state, batch) into (state, metrics)."""

    devices: int
    """The rows of a batch are a multiple of it."""

    def place(self, state: TrainState) -> TrainState:
        """The state as ``step`` takes it, on this driver's devices."""
        ...

    def step(self, state: TrainState, batch: Rows) -> tuple[TrainState, dict[str, Array]]: ...

    def fetch(self, state: TrainState) -> TrainState:
        """The state as one copy, independent of the driver."""
        ...


_jitted_update = jax.jit(update, static_argnames="settings")


class JitDriver:
    """The whole batch on one device."""

    devices = 1

    def __init__(self, frozen: Frozen, settings: UpdateSettings) -> None:
        self._frozen, self._settings = frozen, settings

    def place(self, state: TrainState) -> TrainState:
        return jax.tree.map(jnp.asarray, state)

    def step(self, state: TrainState, batch: Rows) -> tuple[TrainState, dict[str, Array]]:
        return _jitted_update(state, batch, frozen=self._frozen, settings=self._settings)

    def fetch(self, state: TrainState) -> TrainState:
        return state


class PmapDriver:
    """The batch's rows spread over all local devices; weights and state on each."""

    def __init__(self, frozen: Frozen, settings: UpdateSettings) -> None:
        self.devices = jax.local_device_count()
        self._frozen = self._replicate(frozen)
        self._update = jax.pmap(
            lambda frozen, state, batch: update(
                state, batch, frozen=frozen, settings=settings, axis_name=_AXIS
            ),
            axis_name=_AXIS,
        )

    def place(self, state: TrainState) -> TrainState:
        return self._replicate(state)

    def step(self, state: TrainState, batch: Rows) -> tuple[TrainState, dict[str, Array]]:
        n = self.devices
        if len(batch) % n:
            raise UserError(
                f"The batch size {len(batch)} can't be divided over {n} devices; choose a multiple"
                f" of {n}, or --parallel jit."
            )
        shards = jax.tree.map(lambda a: np.reshape(a, (n, -1, *a.shape[1:])), batch)
        state, metrics = self._update(self._frozen, state, shards)
        return state, jax.tree.map(lambda a: a[0], metrics)

    def fetch(self, state: TrainState) -> TrainState:
        return jax.tree.map(lambda a: jnp.asarray(np.asarray(a[0])), state)

    def _replicate(self, tree):
        # Once, by pmap itself: passed unmapped, the weights would travel to the devices every step.
        # The same axis name gives the copies the sharding that `step` returns: else it compiles twice.
        copy = jax.pmap(lambda _, tree: tree, axis_name=_AXIS, in_axes=(0, None))
        return copy(np.arange(self.devices), tree)


DRIVERS: dict[str, Callable[[Frozen, UpdateSettings], Driver]] = {
    "jit": JitDriver,
    "pmap": PmapDriver,
}
