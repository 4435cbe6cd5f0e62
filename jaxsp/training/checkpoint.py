"""Checkpoints of prompts in training (orbax): written whole or not at all, so a run may die at any moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxsp.models.sharding import put
from jaxsp.training.state import TrainState
from jaxsp.typing import PyTree, UserError

KEPT = 2  # the newest, and the one before it in case the newest can't be read


class Checkpoints:
    """The checkpoints of the prompts that train side by side, newest last."""

    def __init__(self, directory: Path) -> None:
        # orbax takes seconds to import, so only when a run writes checkpoints.
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=KEPT),
            item_handlers={"states": ocp.StandardCheckpointHandler(), "block": ocp.JsonCheckpointHandler()},
        )

    @property
    def _sharding(self) -> Sharding:
        """One device; of several processes, a copy on each: orbax then writes together."""
        if jax.process_count() == 1:
            return SingleDeviceSharding(jax.local_devices()[0])
        return NamedSharding(_every_device(), PartitionSpec())

    @property
    def latest(self) -> int | None:
        """The number of the newest whole checkpoint; ``None`` if there is none."""
        return self._manager.latest_step()

    def save(self, number: int, states: TrainState, block: dict[str, Any]) -> None:
        """Writes the stacked states and what belongs to them; it is safe when this returns.

        Args:
          number: above that of any before; an equal one is there already, and left alone.
          states: of all prompts.
          block: what else is needed to go on, as JSON carries it.
        """
        if number == self.latest:
            return
        saved = vars(states)
        if jax.process_count() > 1:
            saved = put(saved, _every_device(), PartitionSpec())
        args = self._ocp.args
        self._manager.save(
            number, args=args.Composite(states=args.StandardSave(saved), block=args.JsonSave(block))
        )
        self._manager.wait_until_finished()

    def block(self) -> dict[str, Any]:
        """What was saved beside the states of the newest checkpoint."""
        args = self._ocp.args
        return self._restored(args.Composite(block=args.JsonRestore()))["block"]

    def restore(self, like: TrainState) -> TrainState:
        """The states of the newest checkpoint.

        Args:
          like: states of the same shapes and dtypes; their values are not used.

        Raises:
          UserError: it can't be read, or is of another shape.
        """
        args = self._ocp.args
        # Devices of this run: the one that wrote it may have had others.
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a), sharding=self._sharding),
            vars(like),
        )
        here, there = _shapes(like.sigma), self._saved_shapes()
        if there != here:
            raise UserError(
                f"The checkpoint in {self._directory} is of another model or prompt length: its prompts"
                f" have the shape {there}, this run's {here}. Resume with the same, or start anew with"
                " --overwrite."
            )
        saved = self._restored(args.Composite(states=args.StandardRestore(shapes)))["states"]
        return TrainState(**jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), saved))

    def close(self) -> None:
        """Ends orbax's own threads."""
        self._manager.close()

    def _saved_shapes(self) -> PyTree:
        try:
            return _shapes(self._manager.item_metadata(self.latest or 0)["states"]["sigma"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise self._unreadable(error) from error

    def _restored(self, items: Any) -> Any:
        try:
            return self._manager.restore(self.latest, args=items)
        except (ValueError, KeyError, OSError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(
            f"The checkpoint in {self._directory} can't be read ({error}); start anew with --overwrite."
        )


def _shapes(sigma: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: tuple(leaf.shape), sigma)


def _every_device() -> Mesh:
    return Mesh(np.array(jax.devices()), ("all",))
