"""Exports of a saved prompt to what other programs read: one file a format, one line each in ``EXPORTS``.

No format is there yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from jaxsp.artifact import SoftPrompt
from jaxsp.models.language_model import LanguageModel


class Export(Protocol):
    """A function of a module in this folder."""

    def __call__(self, prompt: SoftPrompt, model: LanguageModel, out: Path) -> None:
        """Writes the prompt into ``out``, a file or folder of the format; changes nothing else.

        Raises:
          UserError: the format can't hold a prompt of this kind, or of this model.
        """
        ...


EXPORTS: dict[str, Export] = {}
