"""Several sequences in one row: batches of one shape with little padding.

Each keeps its own positions, which all start at the prefix's end, and sees the prefix and itself alone
(``segment_ids``). So a packed batch gives what its sequences give in rows of their own.

Reference: Krell et al. 2021, Efficient Sequence Packing without Cross-contamination (arXiv:2107.02027).
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxsp.data.examples import Rows, batch_indices
from jaxsp.data.ragged import Ragged
from jaxsp.models.decoder import round_size
from jaxsp.typing import EMPTY, Int, ceil_div

Lengths = Int[np.ndarray, " n"]

ROW = 2, 4
"""A row has room for so many of the longest sequence: with less too little fits beside it; beyond,
attention between strangers costs more than the padding saved."""

SLACK = 1.04
"""Room in a batch over that of ``batch_size`` sequences of mean length, as the last one seldom fits."""


@dataclasses.dataclass(frozen=True)
class Packing:
    """The shape of every batch.

    Attributes:
      rows: rows of a batch.
      length: tokens of a row.
    """

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Room of a batch."""
        return self.rows * self.length

    @classmethod
    def of(cls, lengths: Lengths, batch_size: int) -> Packing:
        """The shape that holds about ``batch_size`` of these sequences.

        Args:
          lengths: lengths of the sequences.
          batch_size: number of them, about.

        Example:
          >>> Packing.of(np.array([30, 42, 60, 48]), 8)
          Packing(rows=2, length=188)
        """
        longest, tokens = int(lengths.max()), math.ceil(SLACK * batch_size * lengths.mean())
        most, fewest = (max(1, round(tokens / (size * longest))) for size in ROW)
        shapes = [
            cls(rows, max(longest, 4 * ceil_div(tokens, 4 * rows)))
            for rows in np.unique(np.linspace(fewest, most, 8).round().astype(int)).tolist()
        ]
        return min(shapes, key=lambda shape: shape._padding(lengths))

    @classmethod
    def for_all(cls, lengths: Lengths, most_rows: int = 8) -> Packing:
        """The shape to read all of these sequences once: one of few, so that others share its programs.

        Example:
          >>> Packing.for_all(np.array([30, 42, 60, 48]))
          Packing(rows=2, length=128)
        """
        length = round_size(2 * int(lengths.max()))
        rows = ceil_div(int(lengths.sum()), length)
        return cls(min(most_rows, 1 << (rows - 1).bit_length()), length)

    @classmethod
    def shared(cls, own: Sequence[Packing], batches: Sequence[Int[np.ndarray, " _"]]) -> Packing:
        """A shape as small as can be for several jobs, each with batches drawn by a shape of its own.

        Args:
          own: the jobs' own shapes.
          batches: lengths of the sequences of some of their batches.
        """
        if len(set(own)) == 1:
            return own[0]
        longest = max(int(lengths.max()) for lengths in batches)
        tokens = max(int(lengths.sum()) for lengths in batches)
        found = []
        for rows in range(min(p.rows for p in own), max(p.rows for p in own) + 1):
            length = max(longest, 4 * ceil_div(tokens, 4 * rows))
            while any(cls(rows, length).assign_rows(b.tolist()) is None for b in batches):
                length += 4
            found.append(cls(rows, length))
        return min(found, key=lambda shape: (shape.tokens, shape.rows))

    def grown(self, lengths: Lengths) -> Packing:
        """This shape with rows long enough for a batch of these sequences, and some to spare."""
        length = self.length
        while Packing(self.rows, length).assign_rows(lengths.tolist()) is None:
            length = round_size(length + 1)
        return Packing(self.rows, length)

    def over(self, parts: int, longest: int) -> Packing:
        """The shape, divisible into so many parts, that holds whatever this one holds.

        What a batch consists of does not depend on the devices, so that any number of them trains alike.
        """
        rows = ceil_div(self.rows, parts) * parts
        # A sequence goes to the emptiest row, which is no fuller than the mean.
        enough = 4 * ceil_div(self.tokens, 4 * rows) + longest
        return Packing(rows, min(self.length, enough))

    def _padding(self, lengths: np.ndarray) -> float:
        """The part of a batch that is padding, the mean of a few."""
        if (lengths == lengths[0]).all():  # counted: a plan asks for batches of millions
            return 1 - self.rows * (self.length // lengths[0]) * lengths[0] / self.tokens
        used, cursor = 0, 0
        for _ in range(5):
            drawn = self.draw(lengths, cursor, [0])
            used, cursor = used + lengths[drawn].sum(), cursor + len(drawn)
        return 1 - used / (5 * self.tokens)

    def assign_rows(self, lengths: Sequence[int]) -> list[int] | None:
        """A row for each sequence, longest first, each to the emptiest row; None if they don't all fit."""
        rows = [(0, row) for row in range(self.rows)]  # a heap of (tokens, row)
        assigned = [0] * len(lengths)
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            used, row = rows[0]
            if used + lengths[i] > self.length:
                return None
            heapq.heapreplace(rows, (used + lengths[i], row))
            assigned[i] = row
        return assigned

    def draw(self, lengths: Lengths, cursor: int, key: Sequence[int] | np.ndarray) -> np.ndarray:
        """The next batch: as many sequences from ``cursor`` on as fit, at least one.

        Args:
          lengths: lengths of all sequences, none longer than a row.
          cursor: number drawn of the endless shuffled stream before.
          key: random key of the stream, as in ``batch_indices``.

        Returns:
          Indices into ``lengths``.
        """
        most = max(1, int(self.tokens // lengths.mean()))
        stream = batch_indices(len(lengths), cursor, 2 * most, key)

        def fit(count: int) -> bool:
            return self.assign_rows(lengths[stream[:count]].tolist()) is not None

        # From the whole stream down to two sequences; one always fits.
        left_out = bisect.bisect_left(range(2 * most, 1, -1), True, key=fit)
        return stream[: 2 * most - left_out]

    def pack(self, rows: Rows, index: Int[np.ndarray, " n"]) -> Rows:
        """The sequences of these indices as one batch; of none, an empty one.

        Args:
          rows: one sequence each, with any targets.
          index: from ``draw``.

        Returns:
          Rows of ``length`` tokens and as many answer positions, the live ones first.
        """
        shape = (self.rows, self.length)
        offsets, segment_ids = (np.full(shape, EMPTY, np.int32) for _ in range(2))
        tokens, answer_index = (np.zeros(shape, np.int32) for _ in range(2))
        mask = np.zeros(shape, bool)
        given, tree = jax.tree.flatten(rows.targets)
        targets = [np.zeros((*shape, *leaf.shape[2:]), leaf.dtype) for leaf in given]
        for i, row, here, answer in self._layout(rows, index):
            live = rows.mask[i]
            segment_ids[row, here] = segment_ids[row].max() + 1
            tokens[row, here] = rows.tokens[i, : here.stop - here.start]
            offsets[row, here] = rows.offsets[i, : here.stop - here.start]
            answer_index[row, answer] = here.start + rows.answer_index[i, live]
            mask[row, answer] = True
            for packed, leaf in zip(targets, given, strict=True):
                packed[row, answer] = leaf[i, : answer.stop - answer.start]
        return Rows(tokens, offsets, answer_index, mask, jax.tree.unflatten(tree, targets), segment_ids)

    def in_order(self, rows: Rows) -> list[Int[np.ndarray, " n"]]:
        """All sequences once, in their order: the indices of as few batches as hold them, at least of one."""
        lengths, starts = rows.lengths.tolist(), [0]
        for i in range(1, len(rows)):
            if self.assign_rows(lengths[starts[-1] : i + 1]) is None:
                starts.append(i)
        return np.split(np.arange(len(rows)), starts[1:])

    def unpack(self, values: Sequence[np.ndarray], rows: Rows, batches: Sequence[np.ndarray]) -> np.ndarray:
        """The values at the packed answer positions, at those of ``rows``; 0 elsewhere.

        Args:
          values: ``[rows, length, ...]`` of each batch.
          rows: what was packed.
          batches: the indices that each batch was packed from.
        """
        out = np.zeros((*rows.mask.shape, *values[0].shape[2:]), values[0].dtype)
        for batch, index in zip(values, batches, strict=True):
            for i, value in zip(index, self.split(batch, rows, index).rows, strict=True):
                out[i, rows.mask[i]] = value
        return out

    def split(self, values: Any, rows: Rows, index: Int[np.ndarray, " n"]) -> Ragged:
        """The values ``[rows, length, ...]`` of one batch as a row for each of its sequences."""
        packed = np.asarray(values)
        answers = [packed[row, answer].copy() for _, row, _, answer in self._layout(rows, index)]
        return Ragged(answers, packed[0, :0])

    def _layout(self, rows: Rows, index: Int[np.ndarray, " n"]) -> Iterator[tuple[int, int, slice, slice]]:
        """Each sequence's index, its row, and where its tokens and its answer stand there."""
        lengths, answers = rows.lengths[index].tolist(), rows.mask[index].sum(axis=1).tolist()
        assigned = self.assign_rows(lengths)
        if assigned is None:
            raise ValueError(f"{len(index)} sequences of {sum(lengths)} tokens don't fit {self}.")
        read, answered = [0] * self.rows, [0] * self.rows
        for i, row, length, answer in zip(index, assigned, lengths, answers, strict=True):
            here = slice(read[row], read[row] + length)
            there = slice(answered[row], answered[row] + answer)
            read[row], answered[row] = here.stop, there.stop
            yield int(i), row, here, there
