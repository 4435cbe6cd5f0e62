"""The files of a folder as they are before each change of one: as a run that dies there would leave them."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PLACES = {
    "open": (), "os.mkdir": (2,), "os.remove": (1,), "os.rmdir": (1,), "os.truncate": (), "os.symlink": (),
    "os.rename": (2, 3), "os.link": (2, 3),
}  # fmt: skip
"""Events of Python that come before a change, and which of their arguments say what a path is relative to."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Photographs:
    """Copies of a folder, each made before a file in it is changed.

    A process that is killed leaves all that was done before. A machine that stops may lose of it what was not
    waited for (``fsync``): such photographs hold half of that, or nothing.

    Args:
      folder: what is photographed.
      album: where the copies go, in folders by their numbers.

    Attributes:
      events: each change that followed, in words.
    """

    def __init__(self, folder: Path, album: Path) -> None:
        self._folder, self._album = folder.absolute(), album
        self._lock, self._busy = threading.RLock(), threading.local()
        self._waited_for: dict[Path, int] = {}  # bytes of files that have more by now
        self.events: list[str] = []

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """While this is open, they are taken."""
        fsync = os.fsync

        def waiting(handle: Any) -> None:
            fsync(handle)
            number = handle if isinstance(handle, int) else handle.fileno()
            self._waited_for.pop(Path(os.readlink(f"/proc/self/fd/{number}")), None)

        _add_hook()
        os.fsync = waiting
        _AT_WORK.append(self)
        try:
            yield
        finally:
            _AT_WORK.remove(self)
            os.fsync = fsync

    def copy(self, number: int, to: Path, *, machine: bool = False) -> Path:
        """A photograph, to be changed.

        Args:
          number: its place in ``events``.
          to: a new folder.
          machine: the machine has stopped, not only the process.
        """
        place = self._album / str(number)
        shutil.copytree(place / "files", to)
        if machine:
            for line in (place / "waited_for").read_text().splitlines():
                size, _, name = line.partition(" ")
                file = to / name
                if file.is_file():
                    more = file.stat().st_size - int(size)
                    os.truncate(file, int(size) + (more // 2 if number % 2 else 0))
        return to

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Takes a photograph if a change is to come."""
        if event not in _PLACES or getattr(self._busy, "now", False):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
            return
        self._busy.now = True
        try:
            paths = [path for path in self._paths(event, arguments) if path.is_relative_to(self._folder)]
            if paths:
                with self._lock:
                    self._take(event, paths, arguments)
        finally:
            self._busy.now = False

    def _paths(self, event: str, arguments: tuple[Any, ...]) -> Iterator[Path]:
        count = 2 if event in ("os.rename", "os.link", "os.symlink") else 1
        handles = [arguments[i] for i in _PLACES[event]] or [-1] * count
        for path, handle in zip(arguments[:count], handles, strict=True):
            if isinstance(path, int):
                continue
            path = Path(os.fsdecode(path))
            yield Path(os.readlink(f"/proc/self/fd/{handle}"), path) if handle >= 0 else path.absolute()

    def _take(self, event: str, paths: list[Path], arguments: tuple[Any, ...]) -> None:
        place = self._album / str(len(self.events))
        if self._folder.is_dir():
            shutil.copytree(self._folder, place / "files")
        else:
            (place / "files").mkdir(parents=True)
        names = [path.relative_to(self._folder) for path in paths]
        waited_for = {file.relative_to(self._folder): size for file, size in self._waited_for.items()}
        (place / "waited_for").write_text("".join(f"{n} {file}\n" for file, n in waited_for.items()))
        self.events.append(f"{event} {' '.join(map(str, names))}")
        self._note(event, paths, arguments)

    def _note(self, event: str, paths: list[Path], arguments: tuple[Any, ...]) -> None:
        """Keeps in mind what of each file nobody has waited for."""
        old, new, sizes = paths[0], paths[-1], self._waited_for
        if event == "open":
            there = old.stat().st_size if old.exists() and not arguments[2] & os.O_TRUNC else 0
            sizes[old] = min(there, sizes.get(old, there))
        elif event in ("os.rename", "os.link") and old != new:
            moved = {new / file.relative_to(old): n for file, n in sizes.items() if _is_in(file, old)}
            gone = new if event == "os.link" else old
            self._waited_for = {
                f: n for f, n in sizes.items() if not _is_in(f, gone) and not _is_in(f, new)
            } | moved


def _is_in(file: Path, folder: Path) -> bool:
    return file == folder or folder in file.parents


_AT_WORK: list[Photographs] = []
_hooked = False


def _add_hook() -> None:
    """Once: Python has no way to take a hook away."""
    global _hooked
    if not _hooked:
        _hooked = True
        sys.addaudithook(lambda event, arguments: [each.hear(event, arguments) for each in _AT_WORK] and None)
