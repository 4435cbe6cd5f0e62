"""The teacher's targets: computed in packed batches, written as they come, read as they are used."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp import processes
from jaxsp.data.examples import Rows
from jaxsp.data.packing import Packing
from jaxsp.data.ragged import Ragged
from jaxsp.files import read_json
from jaxsp.models.config import DecoderConfig
from jaxsp.models.language_model import LanguageModel
from jaxsp.teacher.signals import SIGNALS, Wanted
from jaxsp.typing import Int, KeyValues, Params, PyTree

Options = tuple[tuple[str, int], ...]
"""Options of a signal: pairs of a name and a number."""

Places = Mapping[str, Int[np.ndarray, " _"]]
"""Numbers of the rows that have each signal, by its name; ascending."""

SHARD_BYTES = 256 << 20
"""Size of a file at most, but for a longer row."""

Said = tuple[str, Int[np.ndarray, " _"], PyTree]
"""A signal's name, some rows, and what the teacher said there: ``Ragged``, or a tuple of such."""

_ANSWERS, _LAYOUT = "answers.json", "signals.json"


@functools.partial(jax.jit, static_argnames=("config", "name", "options"))
def _signal(
    params: Params, config: DecoderConfig, prefix: KeyValues, rows: Rows, name: str, options: Options
) -> PyTree:
    return SIGNALS[name].at_positions(params, config, prefix, rows, **dict(options))


def in_batches(
    model: LanguageModel, prefix: KeyValues, rows: Rows, packing: Packing, name: str, options: Options = ()
) -> Iterator[Said]:
    """One signal at every answer position of ``rows``, batch by batch; one of none if there are no rows.

    Args:
      model: the teacher.
      prefix: prefix of the context.
      rows: one sequence each.
      packing: shape of the batches they are read in.
      name: a key of ``SIGNALS``.
      options: options of the signal.
    """

    def given(index: np.ndarray, values: PyTree) -> Said:
        return name, index, jax.tree.map(lambda leaf: packing.split(leaf, rows, index), values)

    before = None
    for index in packing.in_order(rows):
        values = _signal(model.params, model.config, prefix, packing.pack(rows, index), name, options)
        if before is not None:  # taken while the device works on the next ones
            yield given(*before)
        before = index, values
    assert before is not None
    yield given(*before)


def in_order(said: Iterable[Said]) -> dict[str, PyTree]:
    """The signals in memory, by name; the rows that have one by their numbers."""
    found: dict[str, list[Said]] = {}
    for one in said:
        found.setdefault(one[0], []).append(one)

    def joined(parts: list[Said]) -> PyTree:
        order = np.argsort(np.concatenate([index for _, index, _ in parts]))
        return jax.tree.map(lambda *leaves: Ragged.joined(leaves)[order], *(values for *_, values in parts))

    return {name: joined(parts) for name, parts in found.items()}


def by_part(
    model: LanguageModel,
    prefix: Callable[[int], KeyValues],
    parts: int,
    part_of: Int[np.ndarray, " n"],
    rows: Rows,
    wanted: Wanted,
    places: Places,
) -> Iterator[Said]:
    """All that is wanted of the teacher, part by part of the context; of several processes each says a share.

    Args:
      model: the teacher.
      prefix: gives the prefix that a part of the context is.
      parts: number of parts.
      part_of: part that each row is taught by.
      rows: all rows.
      wanted: the signals.
      places: the rows that have each.
    """
    own = {name: index[processes.strided_shard(len(index))] for name, index in places.items()}
    for part, (name, mine) in itertools.product(range(parts), own.items()):
        some = mine[part_of[mine] == part]
        if not len(some) and (len(mine) or part > 0):
            continue  # a process without queries joins in what all do
        taken, packing = rows.take(some), Packing.for_all(rows.lengths)
        if parts > 1 and len(some):
            packing = Packing(Packing.for_all(taken.lengths).rows, packing.length)
        options = wanted.options_of(name)
        for _, index, values in in_batches(model, prefix(part), taken, packing, name, options):
            yield name, some[index], values


def gathered(found: Mapping[str, PyTree], rows: Rows, places: Places) -> dict[str, PyTree]:
    """The signals of all processes, in memory: of each those of all rows, some of which have none.

    Args:
      found: those of this process, ``in_order``.
      rows: all rows.
      places: the rows that have each signal.
    """
    lengths = rows.mask.sum(axis=1)

    def of_all(leaf: Ragged, index: np.ndarray) -> Ragged:
        own = leaf.rows
        if processes.are_several():
            padded = processes.gather_strided(leaf.padded(int(lengths[index].max())), len(index))
            own = [row[:length] for row, length in zip(padded, lengths[index], strict=True)]
        there = dict(zip(index.tolist(), own, strict=True))
        return Ragged([there.get(i, leaf.blank) for i in range(len(rows))], leaf.blank)

    return {
        name: jax.tree.map(lambda leaf, index=places[name]: of_all(leaf, index), values)
        for name, values in found.items()
    }


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
            if not shape[0]:  # rows that have another signal
                found += [np.zeros(shape, dtype)] * len(own)
                continue
            if file.stat().st_size != (size := math.prod(shape) * dtype.itemsize):
                raise ValueError(f"{file.name} has {file.stat().st_size} bytes, not {size}, as {shape} takes")
            mapped = np.asarray(np.memmap(file, dtype, "r", shape=shape))
            found += np.split(mapped, np.cumsum(own)[:-1])
        return Ragged(found)


def compute(model: LanguageModel, prefix: KeyValues, rows: Rows, packing: Packing, name: str) -> PyTree:
    """The same of all rows, ``[N, A, ...]`` in memory; 0 where there is no answer."""
    said = in_order(in_batches(model, prefix, rows, packing, name))[name]
    return jax.tree.map(lambda leaf: leaf.padded(rows.mask.shape[1]), said)


def write(
    folder: Path,
    rows: Rows,
    answers: Sequence[Sequence[int]],
    said: Iterable[Said],
    places: Places | None = None,
) -> None:
    """Writes the teacher's own answers, and what it said at the positions of the rows, into a folder.

    Args:
      folder: where they go.
      rows: all of them.
      answers: the teacher's own.
      said: its signals.
      places: the rows that have each; all if ``None``.
    """
    lengths_of, leaves = _lengths(rows, places), dict[str, list[_Leaf]]()
    (folder / _ANSWERS).write_text(json.dumps(answers))
    for name, index, values in said:
        arrays, lengths = jax.tree.leaves(values), lengths_of(name)
        if name not in leaves:
            leaves[name] = [_Leaf.of(f"{name}-{i}", array, lengths) for i, array in enumerate(arrays)]
        for leaf, array in zip(leaves[name], arrays, strict=True):
            leaf.put(folder, index, array, lengths)
    layout = {name: [vars(leaf) for leaf in some] for name, some in leaves.items()}
    (folder / _LAYOUT).write_text(json.dumps(layout))


def _lengths(rows: Rows, places: Places | None) -> Callable[[str], Int[np.ndarray, " n"]]:
    """The positions of each row that a signal has, by the signal's name."""
    lengths = rows.mask.sum(axis=1)

    def of(name: str) -> np.ndarray:
        return (
            lengths if places is None else np.where(np.isin(np.arange(len(rows)), places[name]), lengths, 0)
        )

    return of


def read(
    folder: Path, rows_of: Callable[[list[list[int]]], Rows], places: Places | None = None
) -> tuple[Rows, list[list[int]]]:
    """The rows with their targets, and the answers, that ``write`` put into a folder.

    Args:
      folder: where they are.
      rows_of: the rows of the teacher's answers.
      places: the rows that have each signal; ``None``: all have ``hidden``.

    Raises:
      ValueError: they don't fit.
    """
    answers = read_json(folder / _ANSWERS, list)
    layout: dict[str, list[dict[str, Any]]] = read_json(folder / _LAYOUT)
    if set(layout) != (wanted := {"hidden"} if places is None else set(places)):
        raise ValueError(f"it has the signals {', '.join(layout)}, not {', '.join(sorted(wanted))}")
    rows = rows_of(answers)
    lengths_of = _lengths(rows, places)
    for name, some in layout.items():
        leaves = [_Leaf(**leaf).read(folder, lengths_of(name)) for leaf in some]
        rows = rows.with_targets(**{name: tuple(leaves) if leaves[1:] else leaves[0]})
    return rows, answers
