"""Errors that a user can mend. Importing them loads nothing else."""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """A mistake the user can mend: the message says what is wrong, with what value, and what to do.

    The command line prints the message alone, as one sentence, and exits with status 2.
    """


class NonFiniteLoss(UserError):
    """Training ended as the loss or its gradient became infinite or NaN.

    Attributes:
      result: the ``Result`` with the best prompt before that, and no measurements.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


class Interrupted(UserError):
    """The user stopped a run; the state of its last whole step is saved if it has a folder."""
