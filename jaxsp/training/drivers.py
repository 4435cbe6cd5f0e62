"""Drivers: the same pure update on one device (``jax.jit``), on all (``jax.pmap``), or on a mesh.

Several devices share either the prompts, whole ones each, or the rows of every prompt's batch.
"""

from __future__ import annotations

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from jaxsp import device
from jaxsp.data.examples import Rows
from jaxsp.models import sharding
from jaxsp.models.sharding import along, row_axes, row_parts
from jaxsp.settings import Settings
from jaxsp.training.state import TrainState
from jaxsp.training.update import Frozen, Metrics, UpdateSettings, update
from jaxsp.typing import PyTree, UserError

_AXIS = "devices"
_PROMPTS, _ROWS = 0, 1  # axes of a batch [M, B, ...]


class Driver(Protocol):
    """Holds the frozen weights where they are needed; turns (states, batches) into (states, metrics)."""

    multiple: int
    """A batch's rows must be a multiple of it: the devices that share them, times the parts that each
    computes its share in."""

    def place(self, states: TrainState) -> TrainState:
        """The stacked states as ``step`` takes them, on this driver's devices."""
        ...

    def step(self, states: TrainState, batches: Rows) -> tuple[TrainState, Metrics]:
        """``update`` of batches ``[M, B, ...]`` on the host."""
        ...

    def fetch(self, states: TrainState) -> TrainState:
        """The stacked states as one copy, independent of the driver."""
        ...


class MakeDriver(Protocol):
    """A driver's constructor: ``slots`` is M; ``mesh`` is for the one that needs it."""

    def __call__(
        self, frozen: Frozen, settings: UpdateSettings, *, slots: int = 1, mesh: Mesh | None = None
    ) -> Driver: ...


@functools.partial(jax.jit, static_argnames=("settings", "mesh", "cut"))
def sharded_update(
    states: TrainState,
    batches: Rows,
    *,
    frozen: Frozen,
    settings: UpdateSettings,
    mesh: Mesh | None = None,
    cut: int = _PROMPTS,
) -> tuple[TrainState, Metrics]:
    """``update`` as one program: on the default device, or with that axis of the batches cut over a mesh.

    Each part of the rows reads σ itself, so that of the gradient only σ's own, summed once, is exchanged.
    """

    def part(frozen: Frozen, states: TrainState, batches: Rows) -> tuple[TrainState, Metrics]:
        axis = row_axes(mesh) if mesh is not None and cut == _ROWS else None
        return update(states, batches, frozen=frozen, settings=settings, axis_name=axis)

    own = _PROMPTS if cut == _PROMPTS else None
    return sharding.over_data(part, mesh, (None, own, cut), out=own)(frozen, states, batches)


def cut_axis(slots: int, parts: int) -> int:
    """The axis of the batches that so many devices share: prompts if they divide evenly, else rows."""
    return _ROWS if slots % parts else _PROMPTS


class JitDriver:
    """All prompts on one device."""

    def __init__(
        self, frozen: Frozen, settings: UpdateSettings, *, slots: int = 1, mesh: Mesh | None = None
    ) -> None:
        del slots, mesh
        self.multiple = settings.grad_accumulation
        self._step = functools.partial(sharded_update, frozen=frozen, settings=settings)

    def place(self, states: TrainState) -> TrainState:
        return jax.tree.map(jnp.asarray, states)

    def step(self, states: TrainState, batches: Rows) -> tuple[TrainState, Metrics]:
        return self._step(states, batches)

    def fetch(self, states: TrainState) -> TrainState:
        return states


class PmapDriver:
    """The prompts, or the rows of their batches, spread over all local devices; weights on each.

    Example:
      >>> import jax, jaxsp, numpy as np, optax
      >>> from jaxsp.training import Frozen, PmapDriver, UpdateSettings, initial_state, stack
      >>> model = jaxsp.load_model("smollm2-135m-instruct")
      >>> preamble = jaxsp.distributions.context_prefix(
      ...     model.params, model.config, model.preamble_ids[None])
      >>> optimizer = optax.adam(0.01)
      >>> settings = UpdateSettings(
      ...     model.config, "embedding", jaxsp.losses.OBJECTIVES["nll"], optimizer)
      >>> driver = PmapDriver(Frozen(model.params, preamble), settings)
      >>> rows = jaxsp.make_rows([model.encode_query("How long?")], [[42, 2]])
      >>> batch = rows.take(range(driver.multiple))  # as many as devices: empty ones fill it up
      >>> sigma = {"embeddings": model.embed(np.arange(4)).astype("float32")}
      >>> states = driver.place(stack([initial_state(sigma, optimizer, key=jax.random.key(0))]))
      >>> states, metrics = driver.step(states, jax.tree.map(lambda leaf: leaf[None], batch))
      >>> int(driver.fetch(states).step[0]), float(metrics["answer_tokens"][0])
      (1, 2.0)
    """

    def __init__(
        self, frozen: Frozen, settings: UpdateSettings, *, slots: int = 1, mesh: Mesh | None = None
    ) -> None:
        del mesh
        self._count = jax.local_device_count()
        self._cut = cut_axis(slots, self._count)
        axis = _AXIS if self._cut == _ROWS else None
        self.multiple = (self._count if axis else 1) * settings.grad_accumulation
        self._frozen = self._replicate(frozen)

        def share(frozen: Frozen, states: TrainState, batches: Rows) -> tuple[TrainState, Metrics]:
            return update(states, batches, frozen=frozen, settings=settings, axis_name=axis)

        self._update = jax.pmap(share, axis_name=_AXIS)

    def place(self, states: TrainState) -> TrainState:
        return self._replicate(states) if self._cut == _ROWS else self._divided(states)

    def step(self, states: TrainState, batches: Rows) -> tuple[TrainState, Metrics]:
        _check_divides(batches.tokens.shape[self._cut], self._count)
        states, metrics = self._update(self._frozen, states, self._divided(batches))
        return states, self._joined(metrics)

    def fetch(self, states: TrainState) -> TrainState:
        return jax.tree.map(jnp.asarray, self._joined(states))

    def _divided(self, tree: PyTree) -> PyTree:
        def share(leaf: np.ndarray) -> np.ndarray:
            axis = self._cut
            leaf = np.asarray(leaf)
            parts = leaf.reshape(*leaf.shape[:axis], self._count, -1, *leaf.shape[axis + 1 :])
            return np.moveaxis(parts, axis, 0)

        return jax.tree.map(share, tree)

    def _joined(self, tree: PyTree) -> PyTree:
        if self._cut == _ROWS:
            return jax.tree.map(lambda leaf: np.asarray(leaf[0]), tree)
        return jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), tree)

    def _replicate(self, tree: PyTree) -> PyTree:
        # Once, by pmap itself: passed unmapped, the weights would travel to the devices every step.
        # The same axis name gives the copies the sharding that `step` returns: else it compiles twice.
        copy = jax.pmap(lambda _, tree: tree, axis_name=_AXIS, in_axes=(0, None))
        return copy(np.arange(self._count), tree)


class MeshDriver:
    """Prompts or rows over the mesh's axes ``data`` and ``fsdp``; weights as ``models/sharding.py`` says."""

    def __init__(
        self, frozen: Frozen, settings: UpdateSettings, *, slots: int = 1, mesh: Mesh | None = None
    ) -> None:
        mesh = sharding.as_mesh("") if mesh is None else mesh
        self._parts = row_parts(mesh)
        self._cut = cut_axis(slots, self._parts)
        self.multiple = (self._parts if self._cut == _ROWS else 1) * settings.grad_accumulation
        self._mesh = mesh
        own = sharding.local(mesh)
        params = sharding.place(frozen.params, settings.config, own)
        preamble = jax.device_put(frozen.preamble, NamedSharding(own, P()))
        teacher_head = jax.device_put(frozen.teacher_head, sharding.head_layout(frozen.teacher_head, own))
        frozen = sharding.joined(Frozen(params, preamble, teacher_head), mesh)
        options = {"frozen": frozen, "settings": settings, "mesh": mesh, "cut": self._cut}
        self._step = functools.partial(sharded_update, **options)

    def place(self, states: TrainState) -> TrainState:
        own = _PROMPTS if self._cut == _PROMPTS else None
        return sharding.put(states, self._mesh, along(row_axes(self._mesh), own))

    def step(self, states: TrainState, batches: Rows) -> tuple[TrainState, Metrics]:
        _check_divides(batches.tokens.shape[self._cut], self._parts)
        return self._step(states, sharding.put(batches, self._mesh, along(row_axes(self._mesh), self._cut)))

    def fetch(self, states: TrainState) -> TrainState:
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), states)


def mesh_of(settings: Settings) -> Mesh | None:
    """The mesh that the settings ask for.

    Raises:
      UserError: these devices can't be laid out so, or several processes have no mesh.
    """
    if settings.devices.parallel == "mesh":
        return sharding.as_mesh(settings.devices.mesh)
    if device.processes() > 1:
        raise UserError(f"Several processes need --parallel mesh, not {settings.devices.parallel}.")
    return None


def _check_divides(count: int, parts: int) -> None:
    if count % parts:
        raise UserError(
            f"The batch size {count} can't be divided over {parts} devices; choose a multiple"
            f" of {parts}, or --parallel jit."
        )


DRIVERS: dict[str, MakeDriver] = {"jit": JitDriver, "pmap": PmapDriver, "mesh": MeshDriver}
