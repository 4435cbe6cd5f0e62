"""The README of a saved prompt's folder: its model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsp.artifact import CARD, SoftPrompt
from jaxsp.exports import EXPORTS
from jaxsp.exports.card import prompt_card
from jaxsp.files import atomic_write, is_signed, signed
from jaxsp.terminal import say_once

HERE = "."
"""The folder that a README lies in, as its commands name it."""


def text(prompt: SoftPrompt, report: Mapping[str, Any] | None = None, here: str = HERE) -> str:
    """The README of a saved prompt, here or in a repository of the model hub.

    Args:
      prompt: the soft prompt.
      report: the run's ``report.json``, if it is known.
      here: the place as commands name it.

    Example:
      >>> import jaxsp
      >>> text(jaxsp.SoftPrompt.load(demo_folder)).splitlines()[5]
      '# A soft prompt for smollm2-135m-instruct'
    """
    return prompt_card(prompt, here, report, {name: each.LOADED_BY for name, each in EXPORTS.items()})


def write(folder: Path, prompt: SoftPrompt, report: Mapping[str, Any] | None = None) -> Path | None:
    """Writes the README into a saved prompt's folder, but not over one that somebody else wrote or changed.

    Args:
      folder: of the prompt.
      prompt: the soft prompt in it.
      report: the run's ``report.json``, if it is known.

    Returns:
      The README, if it was written.
    """
    file = folder / CARD
    if file.exists() and not is_signed(file):
        say_once(f"{file} was not written by jaxsp, or was changed since: it stays as it is.")
        return None
    atomic_write(file, signed(text(prompt, report)))
    return file
