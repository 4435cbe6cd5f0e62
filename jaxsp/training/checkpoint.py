"""Checkpoints of prompts in training (orbax): written whole or not at all, so a run may die at any moment."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from jaxsp import processes
from jaxsp.errors import Damaged
from jaxsp.files import atomic_write, parse_json, read_whole
from jaxsp.prompts.storage import named_arrays
from jaxsp.training.state import TrainState
from jaxsp.typing import UserError

KEPT = 2  # the newest, and the one before it in case the newest can't be read
_FILE, _CHECKSUM = "states.safetensors", "states.sha256"
_DAMAGE = (
    FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError,
    SafetensorError,
)  # fmt: skip
"""Errors that orbax, too, may raise at files that are not as they were written; what can't be read just now
may be whole."""


class Checkpoints:
    """The checkpoints of the prompts that train side by side, newest last.

    Processes that train together write them together, and one that works ``alone`` its own. Where the newest
    can't be read, the one before it is the newest from then on.

    Args:
      directory: where they are; it is made.
      say: hears of one that can't be read.
    """

    def __init__(self, directory: Path, say: Callable[[str], None] = lambda text: None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._say = directory, say
        # In the caller's thread: it waits until all is safe anyway.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, create=False, enable_async_checkpointing=False
        )
        if not processes.are_several():
            me = jax.process_index()
            options.multiprocessing_options = ocp.options.MultiprocessingOptions(
                primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"alone-{me}"
            )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options, item_handlers=_Handler())

    @property
    def latest(self) -> int | None:
        """The number of the newest whole checkpoint; ``None`` if there is none."""
        return self._manager.latest_step()

    def save(self, number: int, states: TrainState, block: dict[str, Any]) -> None:
        """Writes the stacked states and what belongs to them; it is safe when this returns.

        Args:
          number: above that of any before; an equal one is there already, and left alone.
          states: states of all prompts.
          block: what else is needed to go on, as JSON carries it.
        """
        if number == self.latest:
            return
        self._manager.save(number, args=_Content(jax.tree.map(np.asarray, states), block))
        self._manager.wait_until_finished()

    def block(self) -> dict[str, Any] | None:
        """The ``block`` that was saved with the newest checkpoint; ``None`` if there is none.

        Raises:
          Damaged: there are some, and none can be read.
        """
        return None if self.latest is None else self._read()[1]

    def restore(self, like: TrainState) -> TrainState:
        """The states of the newest checkpoint.

        Args:
          like: states of the same shapes and dtypes; their values are not used.

        Raises:
          Damaged: none can be read.
          UserError: it is of another shape.
        """
        arrays, _ = self._read()
        here = {name: array.shape for name, array in named_arrays(like).items()}
        there = {name: array.shape for name, array in arrays.items()}
        if there != here:
            other = min(dict(here.items() ^ there.items()))
            raise UserError(
                f"The checkpoint in {self._directory} is of another model, optimizer or prompt length: its"
                f" {other} has the shape {there.get(other)}, this run's {here.get(other)}. Resume with the"
                " same, or start anew with --overwrite."
            )
        leaves = [jnp.asarray(arrays[name]) for name in here]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def clear(self) -> None:
        """Removes all: what they hold is begun anew."""
        for number in self._manager.all_steps():
            self._manager.delete(number)

    def close(self) -> None:
        """Ends orbax's own threads."""
        self._manager.close()

    def _read(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        # Found by one process for all: each removal is waited for by the others.
        number, unreadable = processes.on_first_process(self._newest_readable)
        if number is None:
            reason = unreadable[0][1] if unreadable else "there is none"
            raise Damaged(
                f"The checkpoint in {self._directory} can't be read ({reason})", "start anew with --overwrite"
            )
        for newer, reason in unreadable:
            self._say(
                f"The checkpoint of step {newer} in {self._directory} can't be read"
                f" ({reason}); going on from the one before it, of step {number}."
            )
            self._manager.delete(newer)
        return self._content(number)

    def _newest_readable(self) -> tuple[int | None, list[tuple[int, str]]]:
        """The number of the newest that can be read, and those newer with what is wrong with them."""
        unreadable = []
        for number in sorted(self._manager.all_steps(), reverse=True):
            try:
                self._content(number)
            except _DAMAGE as error:
                unreadable.append((number, str(error).rstrip(".")))
            else:
                return number, unreadable
        return None, unreadable

    def _content(self, number: int) -> Any:
        # Not by orbax, which may wait for other processes.
        folder = self._directory / str(number)
        return _Handler().restore(next(folder.rglob(_FILE), folder / _FILE).parent)


class _Handler(ocp.CheckpointHandler):
    """One file of arrays: orbax's own formats can't be written by one process of several alone."""

    def save(self, directory: Any, args: _Content) -> None:
        if processes.is_first():
            data = save(named_arrays(args.states), {"block": json.dumps(args.block)})
            atomic_write(Path(directory) / _FILE, data)
            atomic_write(Path(directory) / _CHECKSUM, hashlib.sha256(data).hexdigest())

    def restore(
        self, directory: Any, args: _Content | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        del args
        file, checksum = Path(directory) / _FILE, Path(directory) / _CHECKSUM
        read_whole(file, checksum.read_text() if checksum.exists() else None)  # older ones have none
        with safe_open(file, "numpy") as opened:  # safetensors reads bfloat16 from files alone
            return load_file(file), parse_json(opened.metadata()["block"], file)


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Content(ocp.args.CheckpointArgs):
    states: TrainState | None = None
    block: dict[str, Any] | None = None
