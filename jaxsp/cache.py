"""The command `jaxsp cache`: studies, and what teachers said, as they are kept for all runs."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from jaxsp.errors import UserError
from jaxsp.settings import check_limits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """List, check or remove what is kept for later runs: teachers' answers and signals, and studies."""

    examples: ClassVar[str] = """
      jaxsp cache list
      jaxsp cache verify
      jaxsp cache prune --older-than 30
      jaxsp cache prune --max-size 2.5
    """
    action: tyro.conf.Positional[Annotated[Literal["list", "verify", "prune"], tyro.conf.arg(name="ACTION")]]
    """list shows the entries, the one used last first; verify reads all of them; prune removes some."""
    older_than: float | None = None
    """With prune: remove what was not used for so many days."""
    max_size: float | None = None
    """With prune: remove what was not used for longest until this many GiB are left."""
    all: bool = False
    """With prune: remove everything."""

    def run(self) -> None:
        from jaxsp import console
        from jaxsp.teacher import store

        limits = {"older_than": self.older_than, "max_size": self.max_size}
        for name, value in limits.items():
            if value is not None:
                check_limits(name, value, at_least=0)
        if (self.action == "prune") != (self.all or any(value is not None for value in limits.values())):
            raise UserError("cache prune needs --older-than, --max-size or --all; list and verify take none.")
        try:
            folder = store.shared_folder()
        except RuntimeError as error:
            raise UserError(f"There is no cache: {error}.") from error
        if folder is None:
            raise UserError("There is no cache: JAXSP_TEACHER_CACHE is off.")
        if self.action == "prune":
            self._prune(folder)
        elif self.action == "list":
            console.print_entries(store.entries(folder), folder, time.time())
        else:
            _verify(folder)

    def _prune(self, folder: Path) -> None:
        from jaxsp.files import size
        from jaxsp.teacher import store

        days, gib = self.older_than, 0.0 if self.all else self.max_size
        try:
            removed = store.prune(
                folder,
                older_than=None if days is None else days * 86400,
                max_bytes=None if gib is None else gib * 2**30,
            )
        except OSError as error:
            raise UserError(f"{folder} can't be written to ({error.strerror}).") from error
        freed = size(sum(entry.size for entry in removed))
        print(f"{len(removed)} entries, {freed}, removed from {folder}; the folders of runs keep their own.")


def _verify(folder: Path) -> None:
    """Reads all entries; says which are damaged, and ends with exit code 1 if any is."""
    from jaxsp.teacher import store

    found, damaged = store.entries(folder), 0
    for entry in found:
        try:
            store.check(entry.path)
        except (OSError, ValueError) as error:
            damaged += 1
            print(f"{entry.path.name} is damaged: {error}.")
    print(f"{len(found) - damaged} of {len(found)} entries in {folder} are whole.")
    if damaged:
        raise SystemExit(1)
