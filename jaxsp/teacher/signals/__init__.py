"""The teacher's signals: one file each, one line each in ``SIGNALS``, by the names in ``Objective.needs``.

A signal is what the teacher, reading rows after the context's prefix, says at their answer positions: an
array ``[B, A, ...]`` or a tuple of such. It becomes ``rows.targets[name]``. The answer's tokens are there
from the start.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np

from jaxsp.losses import Objective
from jaxsp.teacher.signals import hidden, top_k
from jaxsp.typing import Bool, Int


class Signal(Protocol):
    """A kind of what the teacher says."""

    def options(self, objective: Objective, tokens: int) -> dict[str, int]:
        """The options that an objective needs, over the ``tokens`` that teacher and student share."""
        ...

    @property
    def at_positions(self) -> Any:
        """A function ``(params, config, prefix, rows, **options) -> target`` of arrays."""
        ...


SIGNALS: dict[str, Signal] = {"hidden": hidden, "top_k": top_k}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The signals that are wanted: of queries to train on what the objective needs, of the others all.

    By the last hidden states of those held out every figure is exact.

    Attributes:
      train: signal of the rows to train on, a key of ``SIGNALS``.
      options: its options.
    """

    train: str = "hidden"
    options: tuple[tuple[str, int], ...] = ()

    @classmethod
    def by(cls, objective: Objective, tokens: int) -> Wanted:
        """The wishes of an objective, over the ``tokens`` that teacher and student share.

        The last hidden states give the others, too.
        """
        name = next((name for name in objective.needs if name in SIGNALS), "hidden")
        return cls(name, tuple(SIGNALS[name].options(objective, tokens).items()))

    @property
    def is_usual(self) -> bool:
        """Whether all rows have the last hidden states."""
        return self == USUAL

    def options_of(self, name: str) -> tuple[tuple[str, int], ...]:
        """The options of one of its signals."""
        return self.options if name == self.train else ()

    def rows(self, is_train: Bool[np.ndarray, " n"]) -> dict[str, Int[np.ndarray, " _"]]:
        """Numbers of the rows that have each signal, by its name.

        Args:
          is_train: True for those to train on.
        """
        if self.is_usual:
            return {self.train: np.arange(len(is_train))}
        each = {self.train: np.flatnonzero(is_train), "hidden": np.flatnonzero(~is_train)}
        return {name: index for name, index in each.items() if len(index)}


USUAL = Wanted()
"""The last hidden states everywhere."""
