"""The teacher's targets: computed in packed batches, written as they come, read as they are used."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.data.examples import Rows
from jaxsp.data.packing import Packing
from jaxsp.data.ragged import Ragged
from jaxsp.files import read_json
from jaxsp.models.config import DecoderConfig
from jaxsp.models.language_model import LanguageModel
from jaxsp.teacher.signals import SIGNALS
from jaxsp.typing import Int, KeyValues, Params, PyTree

SHARD_BYTES = 256 << 20
"""Size of a file at most, but for a longer row."""

Said = tuple[str, Int[np.ndarray, " _"], PyTree]
"""A signal's name, some rows, and what the teacher said there: ``Ragged``, or a tuple of such."""

_ANSWERS, _LAYOUT = "answers.json", "signals.json"


@functools.partial(jax.jit, static_argnames=("config", "name"))
def _signal(params: Params, config: DecoderConfig, prefix: KeyValues, rows: Rows, name: str) -> PyTree:
    return SIGNALS[name](params, config, prefix, rows)


def in_batches(
    model: LanguageModel, prefix: KeyValues, rows: Rows, packing: Packing, name: str
) -> Iterator[Said]:
    """One signal at every answer position of ``rows``, batch by batch; one of none if there are no rows.

    Args:
      model: the teacher.
      prefix: prefix of the context.
      rows: one sequence each.
      packing: shape of the batches they are read in.
      name: a key of ``SIGNALS``.
    """

    def given(index: np.ndarray, values: PyTree) -> Said:
        return name, index, jax.tree.map(lambda leaf: packing.split(leaf, rows, index), values)

    before = None
    for index in packing.in_order(rows):
        values = _signal(model.params, model.config, prefix, packing.pack(rows, index), name)
        if before is not None:  # taken while the device works on the next ones
            yield given(*before)
        before = index, values
    assert before is not None
    yield given(*before)


def in_order(said: Iterable[Said]) -> dict[str, PyTree]:
    """The signals in memory, by name; the rows by their numbers."""
    found: dict[str, list[Said]] = {}
    for one in said:
        found.setdefault(one[0], []).append(one)

    def joined(parts: list[Said]) -> PyTree:
        order = np.argsort(np.concatenate([index for _, index, _ in parts]))
        return jax.tree.map(lambda *leaves: Ragged.joined(leaves)[order], *(values for *_, values in parts))

    return {name: joined(parts) for name, parts in found.items()}


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One array of a signal on disk: its rows one after the other, in files of whole rows.

    Attributes:
      name: the files' names begin with it.
      dtype: its name.
      shape: axes of a position.
      starts: first row of each file.
    """

    name: str
    dtype: str
    shape: list[int]
    starts: list[int]

    @classmethod
    def of(cls, name: str, like: Ragged, lengths: Int[np.ndarray, " n"]) -> _Leaf:
        shape = list(like.shape[2:])
        sizes = lengths * math.prod(shape) * like.dtype.itemsize
        starts, room = [0], SHARD_BYTES
        for row, size in enumerate(sizes.tolist()):
            if size > room and row > starts[-1]:
                starts.append(row)
                room = SHARD_BYTES
            room -= size
        return cls(name, like.dtype.name, shape, starts)

    def file(self, shard: int) -> str:
        return f"{self.name}-{shard:05d}.bin"

    def put(
        self, folder: Path, rows: Int[np.ndarray, " r"], values: Ragged, lengths: Int[np.ndarray, " n"]
    ) -> None:
        """Writes some rows into their places."""
        first = np.cumsum(lengths) - lengths  # position of each row
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        for shard in np.unique(shards).tolist():
            file = folder / self.file(shard)
            file.touch()
            with file.open("r+b") as stream:
                for i in np.flatnonzero(shards == shard):
                    value = values.rows[i]
                    position = int(first[rows[i]] - first[self.starts[shard]])
                    stream.seek(position * math.prod(self.shape) * value.dtype.itemsize)
                    stream.write(np.ascontiguousarray(value).view(np.uint8).data)

    def read(self, folder: Path, lengths: Int[np.ndarray, " n"]) -> Ragged:
        """The rows, mapped into memory: a file is read where it is used."""
        dtype, found = jnp.dtype(self.dtype), list[np.ndarray]()
        for shard, own in enumerate(np.split(lengths, self.starts[1:])):
            file, shape = folder / self.file(shard), (int(own.sum()), *self.shape)
            if file.stat().st_size != (size := math.prod(shape) * dtype.itemsize):
                raise ValueError(f"{file.name} has {file.stat().st_size} bytes, not {size}, as {shape} takes")
            mapped = np.asarray(np.memmap(file, dtype, "r", shape=shape))
            found += np.split(mapped, np.cumsum(own)[:-1])
        return Ragged(found)


def compute(model: LanguageModel, prefix: KeyValues, rows: Rows, packing: Packing, name: str) -> PyTree:
    """The same of all rows, ``[N, A, ...]`` in memory; 0 where there is no answer."""
    said = in_order(in_batches(model, prefix, rows, packing, name))[name]
    return jax.tree.map(lambda leaf: leaf.padded(rows.mask.shape[1]), said)


def write(folder: Path, rows: Rows, answers: Sequence[Sequence[int]], said: Iterable[Said]) -> None:
    """Writes the teacher's own answers, and what it said at the positions of the rows, into a folder."""
    lengths, leaves = rows.mask.sum(axis=1), dict[str, list[_Leaf]]()
    (folder / _ANSWERS).write_text(json.dumps(answers))
    for name, index, values in said:
        arrays = jax.tree.leaves(values)
        if name not in leaves:
            leaves[name] = [_Leaf.of(f"{name}-{i}", array, lengths) for i, array in enumerate(arrays)]
        for leaf, array in zip(leaves[name], arrays, strict=True):
            leaf.put(folder, index, array, lengths)
    layout = {name: [vars(leaf) for leaf in some] for name, some in leaves.items()}
    (folder / _LAYOUT).write_text(json.dumps(layout))


def read(folder: Path, rows_of: Callable[[list[list[int]]], Rows]) -> tuple[Rows, list[list[int]]]:
    """The rows with their targets, and the answers, that ``write`` put into a folder.

    Args:
      folder: where they are.
      rows_of: the rows of the teacher's answers.

    Raises:
      ValueError: they don't fit.
    """
    answers = read_json(folder / _ANSWERS, list)
    layout: dict[str, list[dict[str, Any]]] = read_json(folder / _LAYOUT)
    if set(layout) != set(SIGNALS):
        raise ValueError(f"it has the signals {', '.join(layout)}, not {', '.join(SIGNALS)}")
    rows = rows_of(answers)
    lengths = rows.mask.sum(axis=1)
    for name, some in layout.items():
        leaves = [_Leaf(**leaf).read(folder, lengths) for leaf in some]
        rows = rows.with_targets(**{name: tuple(leaves) if leaves[1:] else leaves[0]})
    return rows, answers
