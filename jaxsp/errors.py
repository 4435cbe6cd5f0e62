"""Errors that a user can mend. Importing them loads nothing else."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

RENAMED = {
    "length": "prompt_length",
    "warmup": "warmup_fraction",
    "clip": "max_grad_norm",
    "accumulate": "grad_accumulation",
    "weights": "quantization",
}
"""Options by their names in version 0.1."""


class UserError(ValueError):
    """A mistake the user can mend: the message says what is wrong, with what value, and what to do.

    The command line prints the message alone, as one sentence, and exits with status 2. A notebook shows
    it without a traceback.
    """

    def _render_traceback_(self) -> list[str]:
        """The lines that IPython shows of it."""
        return [f"{type(self).__name__}: {self}"]


class Damaged(UserError):
    """A file is missing, or is not what it should be.

    Attributes:
      what: the message without advice and full stop.
    """

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(f"{what}; {advice}." if advice else f"{what}.")
        self.what = what


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


def in_a_line(error: object, most: int = 1000) -> str:
    """The words of an error of some library, without ends of lines, to be a part of a sentence.

    Args:
      error: the error.
      most: characters that are kept.

    Example:
      >>> in_a_line(ValueError("no\\n  field: a."))
      'no field: a'
    """
    return " ".join(str(error).split())[:most].rstrip(".")


def check_text(value: Any, what: str) -> None:
    """Raises ``UserError`` if a value is no text, empty, or none that a file could hold.

    Args:
      value: given by a user.
      what: its name in the error.

    Example:
      >>> check_text(None, "The question")
      Traceback (most recent call last):
      jaxsp.errors.UserError: The question must be a text that is not empty, not None.
    """
    if not (isinstance(value, str) and value.strip()):
        raise UserError(f"{what} must be a text that is not empty, not {value!r:.60}.")
    check_unicode(value, what)


def check_unicode(text: str, what: str) -> None:
    """Raises ``UserError`` if UTF-8 can't carry a text: a half of a character, or bytes that were no text.

    Example:
      >>> check_unicode("a\\ud83d", "The question")
      Traceback (most recent call last):
      jaxsp.errors.UserError: The question is no text in Unicode ('\\ud83d' at 1); write it in UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        odd = ascii(text[error.start])
        raise UserError(
            f"{what} is no text in Unicode ({odd} at {error.start}); write it in UTF-8."
        ) from None


def suggestion(name: str, known: Iterable[str]) -> str:
    """The known name that an unknown one stands for, as the end of a clause; empty if there is none.

    Example:
      >>> suggestion("clip", ["seed", "max_grad_norm"]), suggestion("sed", ["seed", "max_grad_norm"])
      ('; it is called max_grad_norm now', '; did you mean seed?')
    """
    known = list(known)
    written_out = {option.lstrip("-").replace("-", "_"): option for option in known}
    new = written_out.get(RENAMED.get(name.lstrip("-").replace("-", "_"), ""))
    if new is not None:
        return f"; it is called {new} now"
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
