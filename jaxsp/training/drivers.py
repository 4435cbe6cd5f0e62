"""Drivers: the same pure update on one device (``jax.jit``), on all (``jax.pmap``), or on a mesh."""

from __future__ import annotations

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsp.data.examples import Rows
from jaxsp.models import sharding
from jaxsp.models.sharding import DATA
from jaxsp.training.state import TrainState
from jaxsp.training.update import Frozen, Metrics, UpdateSettings, update
from jaxsp.typing import Array, UserError

_AXIS = "devices"


class Driver(Protocol):
    """Holds the frozen weights where they are needed; turns (state, batch) into (state, metrics)."""

    multiple: int
    """What a batch's rows are a multiple of: devices, times the parts that each computes its share in."""

    def place(self, state: TrainState) -> TrainState:
        """The state as ``step`` takes it, on this driver's devices."""
        ...

    def step(self, state: TrainState, batch: Rows) -> tuple[TrainState, dict[str, Array]]: ...

    def fetch(self, state: TrainState) -> TrainState:
        """The state as one copy, independent of the driver."""
        ...


def _check_divides(batch: Rows, parts: int) -> None:
    if len(batch) % parts:
        raise UserError(
            f"The batch size {len(batch)} can't be divided over {parts} devices; choose a multiple"
            f" of {parts}, or --parallel jit."
        )


_jitted_update = jax.jit(update, static_argnames="settings")


class JitDriver:
    """The whole batch on one device."""

    def __init__(self, frozen: Frozen, settings: UpdateSettings, mesh: Mesh | None = None) -> None:
        del mesh
        self.multiple = settings.accumulate
        self._frozen, self._settings = frozen, settings

    def place(self, state: TrainState) -> TrainState:
        return jax.tree.map(jnp.asarray, state)

    def step(self, state: TrainState, batch: Rows) -> tuple[TrainState, dict[str, Array]]:
        return _jitted_update(state, batch, frozen=self._frozen, settings=self._settings)

    def fetch(self, state: TrainState) -> TrainState:
        return state


class PmapDriver:
    """The batch's rows spread over all local devices; weights and state on each."""

    def __init__(self, frozen: Frozen, settings: UpdateSettings, mesh: Mesh | None = None) -> None:
        del mesh
        self._count = jax.local_device_count()
        self.multiple = self._count * settings.accumulate
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
        n = self._count
        _check_divides(batch, n)
        shards = jax.tree.map(lambda a: np.reshape(a, (n, -1, *a.shape[1:])), batch)
        state, metrics = self._update(self._frozen, state, shards)
        return state, jax.tree.map(lambda a: a[0], metrics)

    def fetch(self, state: TrainState) -> TrainState:
        return jax.tree.map(lambda a: jnp.asarray(np.asarray(a[0])), state)

    def _replicate(self, tree):
        # Once, by pmap itself: passed unmapped, the weights would travel to the devices every step.
        # The same axis name gives the copies the sharding that `step` returns: else it compiles twice.
        copy = jax.pmap(lambda _, tree: tree, axis_name=_AXIS, in_axes=(0, None))
        return copy(np.arange(self._count), tree)


@functools.partial(jax.jit, static_argnames=("settings", "mesh"))
def _mesh_update(
    frozen: Frozen, state: TrainState, batch: Rows, *, settings: UpdateSettings, mesh: Mesh
) -> tuple[TrainState, Metrics]:
    def part(frozen: Frozen, state: TrainState, batch: Rows) -> tuple[TrainState, Metrics]:
        return update(state, batch, frozen=frozen, settings=settings, axis_name=DATA)

    spread = sharding.over_data(part, mesh, (False, False, True), out=False)
    return spread(frozen, state, batch)


class MeshDriver:
    """The batch's rows over the mesh's axis ``data``, the weights over ``model`` (``models/sharding.py``).

    Each part of ``data`` reads σ itself, so that of the gradient only σ's own, summed once, is exchanged.
    """

    def __init__(self, frozen: Frozen, settings: UpdateSettings, mesh: Mesh | None = None) -> None:
        mesh = sharding.as_mesh("") if mesh is None else mesh
        self.multiple = mesh.shape[DATA] * settings.accumulate
        self._mesh = mesh
        own = sharding.local(mesh)
        params = sharding.place(frozen.params, settings.config, own)
        before = jax.device_put(frozen.before, NamedSharding(own, P()))
        self._frozen = sharding.joined(Frozen(params, before), mesh)
        self._update = functools.partial(_mesh_update, settings=settings, mesh=mesh)

    def place(self, state: TrainState) -> TrainState:
        return sharding.put(state, self._mesh, P())

    def step(self, state: TrainState, batch: Rows) -> tuple[TrainState, dict[str, Array]]:
        _check_divides(batch, self._mesh.shape[DATA])
        return self._update(self._frozen, state, sharding.put(batch, self._mesh, P(DATA)))

    def lower(self, state: TrainState, batch: Rows) -> jax.stages.Lowered:
        """``step`` before it is compiled."""
        return _mesh_update.lower(self._frozen, state, batch, **self._update.keywords)

    def fetch(self, state: TrainState) -> TrainState:
        return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), state)


class MakeDriver(Protocol):
    def __call__(
        self, frozen: Frozen, settings: UpdateSettings, mesh: Mesh | None = None
    ) -> Driver: ...


DRIVERS: dict[str, MakeDriver] = {
    "jit": JitDriver,
    "pmap": PmapDriver,
    "mesh": MeshDriver,
}
