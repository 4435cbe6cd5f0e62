"""Checkpoints of a training run (orbax): written whole or not at all, so any moment is a safe one to die."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxsp.models.sharding import put
from jaxsp.training.state import TrainState
from jaxsp.typing import PyTree, UserError

KEPT = 2  # the newest, and the one before it in case the newest can't be read


class Checkpoints:
    """The checkpoints of one run, newest last."""

    def __init__(self, directory: Path) -> None:
        # orbax takes seconds to import, so only when a run writes checkpoints.
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=KEPT),
            item_handlers=ocp.StandardCheckpointHandler(),
        )

    @property
    def _sharding(self) -> Sharding:
        """One device; of several processes, a copy on each device: orbax then writes together."""
        if jax.process_count() == 1:
            return SingleDeviceSharding(jax.local_devices()[0])
        return NamedSharding(_every_device(), PartitionSpec())

    @property
    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint; ``None`` if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Writes the state, unless its step is there already; it is safe when this returns."""
        step = int(state.step)
        if step != self.latest_step:
            saved = vars(state)
            if jax.process_count() > 1:
                saved = put(saved, _every_device(), PartitionSpec())
            self._manager.save(step, args=self._ocp.args.StandardSave(saved))
            self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint.

        Args:
          like: a state of the same shapes and dtypes; its values are not used.

        Raises:
          UserError: there is none, or it is of another shape.
        """
        if self.latest_step is None:
            raise UserError("There is no checkpoint to resume from; start anew with --overwrite.")
        # Devices of this run: the one that wrote it may have had others.
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                jnp.shape(a), jnp.result_type(a), sharding=self._sharding
            ),
            vars(like),
        )
        step, here = self.latest_step, _shapes(like.sigma)
        try:
            there = _shapes(self._manager.item_metadata(step)["sigma"])
            restore = self._ocp.args.StandardRestore(shapes)
            saved = self._manager.restore(step, args=restore) if there == here else None
        except (ValueError, KeyError, OSError) as error:
            raise UserError(
                f"The checkpoint of step {step} can't be read ({error}); start anew with --overwrite."
            ) from error
        if saved is None:
            raise UserError(
                f"The checkpoint of step {step} is of another model or prompt length: its prompt has the"
                f" shape {there}, this run's {here}. Resume with the same, or start anew with --overwrite."
            )
        return TrainState(**jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), saved))

    def close(self) -> None:
        self._manager.close()


def _shapes(sigma: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: tuple(leaf.shape), sigma)


def _every_device() -> Mesh:
    return Mesh(np.array(jax.devices()), ("all",))
