"""The folder of a run: what is where, and whether a run may start or go on there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from jaxsp.artifact import ARRAYS, CONTEXT, MANIFEST
from jaxsp.typing import UserError

_OURS = ("report.json", "report.md", "plots", "metrics.jsonl", "run", ARRAYS, MANIFEST, CONTEXT)


class RunFolder:
    """Paths of a run; made by ``open_run``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.metrics = directory / "metrics.jsonl"
        self.settings = directory / "run" / "settings.json"
        self.teacher = directory / "run" / "teacher.safetensors"
        self.checkpoints = directory / "run" / "checkpoints"


def check_folder(directory: str | Path, *, resume: bool, overwrite: bool) -> None:
    """Raises ``UserError`` if a run can't start (or go on) there; touches nothing.

    Called before any work, so that a mistake costs no time.
    """
    if resume and overwrite:
        raise UserError("Give either --resume or --overwrite, not both.")
    folder = RunFolder(Path(directory))
    path = folder.directory
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; give a folder.")
    if resume and not folder.settings.is_file():
        raise UserError(f"There is no run to resume in {path}; leave --resume away to start one.")
    if not resume and not overwrite and path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"The folder {path} is not empty; go on with --resume, replace what is there with"
            " --overwrite, or choose another with --out."
        )
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        raise UserError(f"The folder {path} can't be written to; choose another with --out.")


def open_run(
    directory: str | Path, settings: dict[str, Any], *, resume: bool, overwrite: bool
) -> RunFolder:
    """The folder, ready for a run with these settings.

    Args:
      directory: where.
      settings: everything that decides the result.
      resume: go on with the run that is there; its settings must be the same.
      overwrite: remove an earlier run's files first; others are left alone.

    Raises:
      UserError: as ``check_folder``, or the settings differ from those of the run to resume.
    """
    check_folder(directory, resume=resume, overwrite=overwrite)
    folder = RunFolder(Path(directory))
    if resume:
        _check_same(folder.settings, settings)
        return folder
    try:
        for name in _OURS:
            old = folder.directory / name
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)
        folder.settings.parent.mkdir(parents=True, exist_ok=True)
        scratch = folder.settings.with_suffix(".part")
        scratch.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
        scratch.replace(folder.settings)
    except OSError as error:
        raise UserError(
            f"The folder {directory} can't be written to ({error.strerror}); choose another with"
            " --out."
        ) from error
    return folder


def _check_same(file: Path, settings: dict[str, Any]) -> None:
    try:
        before = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); start anew with --overwrite.") from error
    settings = json.loads(json.dumps(settings))  # as they were written: tuples are lists
    changed = [
        f"{name} was {before.get(name)!r} and is now {settings.get(name)!r}"
        for name in sorted({*before, *settings})
        if before.get(name) != settings.get(name)
    ]
    if changed:
        raise UserError(
            f"The run in {file.parent.parent} can't be resumed with other settings:"
            f" {'; '.join(changed)}. Give the same, or start anew with --overwrite."
        )
