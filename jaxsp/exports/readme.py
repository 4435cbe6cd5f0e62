"""The README of a saved prompt's folder: its model card."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsp.artifact import SoftPrompt
from jaxsp.exports import EXPORTS
from jaxsp.exports.card import CARD, prompt_card
from jaxsp.files import atomic_write
from jaxsp.terminal import say_once

HERE = "."
"""The folder that a README lies in, as its commands name it."""

_SEAL = "<!-- written by jaxsp, and written anew as long as nobody else changes it: {} -->\n"


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


def write(folder: Path, prompt: SoftPrompt, report: Mapping[str, Any] | None = None) -> None:
    """Writes the README into a saved prompt's folder, but not over one that somebody else wrote or changed.

    Args:
      folder: of the prompt.
      prompt: the soft prompt in it.
      report: the run's ``report.json``, if it is known.
    """
    file, content = folder / CARD, text(prompt, report)
    if file.exists() and not is_ours(file):
        say_once(f"{file} was not written by jaxsp, or was changed since: it stays as it is.")
        return
    atomic_write(file, content + _seal(content.encode()))


def is_ours(file: Path) -> bool:
    """Whether a README is as ``write`` wrote it.

    Args:
      file: the README.
    """
    try:
        content, start, _ = (data := file.read_bytes()).rpartition(_SEAL.partition("{")[0].encode())
    except OSError:  # it is not there, or no file
        return False
    return bool(start) and data == content + _seal(content).encode()


def remove(folder: Path) -> None:
    """Deletes the README of an earlier prompt, if nobody else changed it.

    Args:
      folder: that it may be in.
    """
    if is_ours(folder / CARD):
        (folder / CARD).unlink(missing_ok=True)


def _seal(content: bytes) -> str:
    return _SEAL.format(hashlib.sha256(content).hexdigest())
