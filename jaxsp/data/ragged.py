"""Arrays of many rows of uneven lengths, of which only those in use are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Ragged:
    """``[N, A, ...]`` without its padding: one array ``[length, ...]`` a row, in memory or in a mapped file.

    ``[i, :n]`` is the beginning of a row, ``[index]`` the rows of these indices; nothing is read or copied
    before it is used. ``np.asarray`` gives the whole, padded with zeros.

    Args:
      rows: the rows.
      blank: ``[0, ...]``, for the dtype and the other axes; needed if there is no row.

    Example:
      >>> signal = Ragged([np.array([1, 2]), np.array([3])])
      >>> signal.shape, signal[0, :1].tolist(), np.asarray(signal[[1, 0]]).tolist()
      ((2, 2), [1], [[3, 0], [1, 2]])
    """

    def __init__(self, rows: Sequence[np.ndarray], blank: np.ndarray | None = None) -> None:
        self.rows = list(rows)
        self.blank = self.rows[0][:0] if blank is None else blank

    @classmethod
    def joined(cls, several: Sequence[Ragged]) -> Ragged:
        """The rows of several, one after the other."""
        return cls([row for one in several for row in one.rows], several[0].blank)

    @property
    def dtype(self) -> np.dtype:
        return self.blank.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), max(map(len, self.rows), default=0), *self.blank.shape[1:])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple):
            row, *inside = index
            return self.rows[row][tuple(inside)]
        return Ragged([self.rows[i] for i in index], self.blank)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.padded(self.shape[1]).astype(dtype or self.dtype, copy=False)

    def padded(self, length: int) -> np.ndarray:
        """``[N, length, ...]`` in memory."""
        out = np.zeros((len(self.rows), length, *self.blank.shape[1:]), self.dtype)
        for to, row in zip(out, self.rows, strict=True):
            to[: len(row)] = row
        return out
