"""Queries with their answers as rows of arrays, and the endless stream of training batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.data.ragged import Ragged
from jaxsp.typing import EMPTY, Array, Bool, Int, PyTree

# The arguments of ``fused_objective`` that each target gives, in the order of its leaves.
TARGET_INPUTS: dict[str, tuple[str, ...]] = {
    "tokens": ("targets",),
    "hidden": ("teacher_hidden",),
    "top_k": ("teacher_log_probs", "teacher_ids", "teacher_tail"),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """(z, ŷ) sequences, right-padded: what stands after the prefix, and where it predicts ŷ.

    A row is one sequence, or several of them packed (see ``packing.py``).

    Attributes:
      tokens: ``[B, T]`` token ids.
      offsets: ``[B, T]`` positions counted from the prefix's end; ``EMPTY`` for padding.
      answer_index: ``[B, A]`` the row index whose hidden state predicts each answer token.
      mask: ``[B, A]`` True where there is one.
      targets: what the teacher said there, by the names in ``Objective.needs``, each ``[B, A, ...]``:
        ``tokens`` (the answer ŷ, always there), and what ``teacher.targets`` adds, such as ``hidden``; an
        array, or a ``Ragged`` that is read as it is used, or a tuple of such.
      segment_ids: ``[B, T]`` which of its row's sequences a token belongs to, counted from 0, ``EMPTY`` for
        padding; ``None`` if every row is one sequence.
    """

    tokens: Int[np.ndarray, "b t"]
    offsets: Int[np.ndarray, "b t"]
    answer_index: Int[np.ndarray, "b a"]
    mask: Bool[np.ndarray, "b a"]
    targets: dict[str, PyTree]
    segment_ids: Int[np.ndarray, "b t"] | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, " b"]:
        """Tokens of each row."""
        return (self.offsets != EMPTY).sum(axis=-1)

    @property
    def sequences(self) -> Int[Array, ""]:
        """The number of sequences."""
        if self.segment_ids is None:
            return jnp.sum(jnp.max(self.offsets, axis=-1) != EMPTY, dtype=jnp.int32)
        return jnp.sum(jnp.max(self.segment_ids, axis=-1) + 1, dtype=jnp.int32)

    def with_targets(self, **targets: PyTree) -> Rows:
        """The same rows with more of what the teacher said."""
        return dataclasses.replace(self, targets={**self.targets, **targets})

    @property
    def teacher_inputs(self) -> dict[str, Any]:
        """The targets as the keyword arguments of ``fused_objective``."""
        found: dict[str, Array] = {}
        for name, target in self.targets.items():
            found |= zip(TARGET_INPUTS[name], map(jnp.asarray, jax.tree.leaves(target)), strict=True)
        return found

    def take(self, index: Sequence[int] | np.ndarray) -> Rows:
        """The rows of these indices, in their order; one beyond the last gives an empty row."""
        index = np.asarray(index, int)
        blank = index >= len(self)
        rows = jax.tree.map(lambda leaf: leaf[np.where(blank, 0, index)], self)
        rows.offsets[blank] = EMPTY
        rows.mask[blank] = False
        if rows.segment_ids is not None:
            rows.segment_ids[blank] = EMPTY
        return rows


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several, one after the other; ``T`` and ``A`` fit the longest.

    Example:
      >>> short, long = make_rows([[5]], [[8, 2]]), make_rows([[5, 6, 7]], [[8]])
      >>> joined([short, long]).tokens.tolist()
      [[5, 8, 0], [5, 6, 7]]
    """

    def stacked(*leaves: Any, fill: int = 0) -> Any:
        if isinstance(leaves[0], Ragged):
            return Ragged.joined(leaves)
        most = max(leaf.shape[1] for leaf in leaves)
        others = [(0, 0)] * (leaves[0].ndim - 2)
        widths = [[(0, 0), (0, most - leaf.shape[1]), *others] for leaf in leaves]
        padded = [np.pad(leaf, w, constant_values=fill) for leaf, w in zip(leaves, widths, strict=True)]
        return np.concatenate(padded)

    rows = jax.tree.map(stacked, *parts)
    return dataclasses.replace(rows, offsets=stacked(*(part.offsets for part in parts), fill=EMPTY))


def make_rows(queries: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Rows:
    """Rows of query and answer ids; ``T`` and ``A`` fit the longest.

    Args:
      queries: ids from after the context up to where the answer starts, per row, never empty.
      answers: answer ids per row, the end-of-turn token included, never empty.

    Example:
      >>> rows = make_rows([[5, 6, 7]], [[8, 2]])
      >>> rows.tokens.tolist(), rows.answer_index.tolist(), rows.targets["tokens"].tolist()
      ([[5, 6, 7, 8]], [[2, 3]], [[8, 2]])
    """
    # The last answer token is predicted, never read.
    read = [[*query, *answer[:-1]] for query, answer in zip(queries, answers, strict=True)]
    predicting = [range(len(ids) - len(answer), len(ids)) for ids, answer in zip(read, answers, strict=True)]
    return Rows(
        tokens=_padded(read),
        offsets=_padded([range(len(ids)) for ids in read], EMPTY),
        answer_index=_padded(predicting),
        mask=_padded([[True] * len(answer) for answer in answers]).astype(bool),
        targets={"tokens": _padded(answers)},
    )


def _padded(rows: Sequence[Sequence[int]], fill: int = 0) -> Int[np.ndarray, "b n"]:
    """The rows side by side, as long as the longest."""
    padded = np.full((len(rows), max(map(len, rows))), fill, np.int32)
    for to, row in zip(padded, rows, strict=True):
        to[: len(row)] = row
    return padded


def batch_indices(count: int, cursor: int, batch_size: int, key: Sequence[int] | np.ndarray) -> np.ndarray:
    """Which rows stand at ``cursor`` in the endless shuffled stream.

    Each epoch is a fresh permutation of all rows, drawn from (key, epoch) alone: the stream can be
    entered anywhere, so a resumed run goes on exactly where it stopped.

    Args:
      count: number of rows.
      cursor: number of rows drawn before.
      batch_size: number to draw; a batch may span two epochs.
      key: random key of the stream: the data of a jax random key, or any integers.

    Returns:
      ``[batch_size]`` indices into the rows.
    """
    places = np.arange(cursor, cursor + batch_size)
    epochs = {
        e: np.random.default_rng([*map(int, key), int(e)]).permutation(count) for e in set(places // count)
    }
    return np.array([epochs[place // count][place % count] for place in places])
