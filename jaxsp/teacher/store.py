"""Things that took long to make and can be made again, kept on disk by the key of all that decides them.

An entry is a folder with a manifest: every file's size and SHA-256. It appears whole or not at all, is never
changed, and is checked when it is opened. One folder of entries is shared by all runs; a run has its own, so
that it goes on with what it was started with: the same files by hard links, copies where there can be none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from jaxsp import processes
from jaxsp.compile_cache import cache_folder
from jaxsp.files import checksum, flush, parse_json
from jaxsp.typing import UserError

T = TypeVar("T")

VERSION = 1
"""Version of an entry's files; part of every key."""

MAX_BYTES = 10 << 30
"""Most that the shared entries take on disk; those not used for longest go when one is added."""

MANIFEST = "manifest.json"

FIRST_WORDS = 60
"""Characters of a document that its entries are listed with."""

_PART, _BEGUN = ".part", ".begun"
_STALE = 86400.0  # seconds: whoever began to write it is gone
# Not any OSError: what can't be read just now may be whole.
_DAMAGE = FileNotFoundError, ValueError, KeyError, TypeError, IndexError


def _damage_of(entry: Path, error: Exception) -> str:
    """The damage of an entry, with its path once."""
    text = str(error).rstrip(".")
    return text if text.startswith(str(entry)) else f"{entry} is damaged: {text}"


def about(kind: str, model: str, document: str, queries: int, **more: int) -> dict[str, Any]:
    """The part of an entry's manifest that ``jaxsp cache list`` shows.

    Args:
      kind: of the entry.
      model: name of the model that made it.
      document: the text that it is about.
      queries: number of the queries in it.
      **more: ``tokens`` of the document, where they are known.
    """
    return {"kind": kind, "model": model, "document": document[:FIRST_WORDS], "queries": queries, **more}


def shared_folder() -> Path | None:
    """The folder of the entries that all runs share; ``None`` if ``JAXSP_TEACHER_CACHE`` is ``off``.

    Raises:
      RuntimeError: the user has no home folder.
    """
    if os.environ.get("JAXSP_TEACHER_CACHE", "").lower() == "off":
        return None
    return cache_folder() / "teachers"


class Store:
    """The entries of a run: its own, and those shared with all others.

    A shared one that is damaged is made anew; one of the run's own is an error, unless ``mend``. A shared
    folder that can't be written to is left, which is said once. Of several processes the first alone looks
    and writes: the others read in the run's folder.

    Args:
      own: the run's folder for them; ``None`` if it has none.
      shared: the folder of all runs; ``None`` for none.
      say: shows a line.
      mend: whether entries of the run's own that are damaged are made anew, too.
    """

    def __init__(
        self,
        own: Path | None,
        shared: Path | None = None,
        say: Callable[[str], None] = lambda text: None,
        *,
        mend: bool = False,
    ) -> None:
        self.own, self._say, self._said, self._mend = own, say, set[str](), mend
        self.shared = None if own is None and processes.are_several() else shared

    @classmethod
    def of_run(cls, own: Path | None, say: Callable[[str], None], *, mend: bool = False) -> Store:
        """The store of a run, with the shared folder if there is one."""
        store = cls(own, None, say, mend=mend)
        try:
            return cls(own, shared_folder(), say, mend=mend)
        except RuntimeError as error:
            store._leave(error)
            return store

    @property
    def shared_alone(self) -> Store:
        """The same without the run's folder: for what is read once, and is not to be the run's own."""
        return self.with_own(None)

    def with_own(self, own: Path | None, *, mend: bool = False) -> Store:
        """The same with another folder of its own; arguments as those of the class."""
        store = Store(own, self.shared, self._say, mend=mend)
        store._said = self._said
        return store

    def begun(self, key: str) -> Store:
        """The store of the parts of an entry that is being made: who is interrupted goes on from them.

        It says nothing, and a part that is damaged is made anew. Among the shared entries one that nobody
        goes on with goes with ``prune``, once it is a day old.
        """
        if self.own is not None:
            return Store(self.own / f"{key}{_BEGUN}", mend=True)
        return Store(None, self.shared and self.shared / f"{key}{_BEGUN}{_PART}")

    def remove_begun(self, key: str) -> None:
        """Removes the parts of an entry that is there; another run that is making it goes on without."""
        begun = self.begun(key)
        if (folder := begun.own or begun.shared) is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def read(self, key: str, read: Callable[[Path], T], what: str) -> T | None:
        """The content that ``read`` makes of an entry's folder; ``None`` if there is no such entry.

        Args:
          key: the entry's.
          read: raises ``ValueError`` if the files don't fit.
          what: the entry's content in words, for the line that says that it was read.

        Raises:
          UserError: the run's own entry is damaged.
        """
        found = processes.on_first_process(lambda: self._found(key, read))
        if found is None:
            return None
        place, entry = found
        try:
            content = read(Path(entry))
        except FileNotFoundError:  # another run has just removed it
            return None
        self._tell(f"{what}: read from {place}")
        return content

    def _found(self, key: str, read: Callable[[Path], Any]) -> tuple[str, str] | None:
        """The folder that an entry is in, and where it is to be read, once it has been checked."""
        if self.own is not None and (entry := self.own / key).is_dir():
            try:
                check(entry)
                read(entry)
            except _DAMAGE as error:
                if not self._mend:
                    raise UserError(f"{_damage_of(entry, error)}. Start anew with --overwrite.") from error
                self._tell(f"{_damage_of(entry, error)}. It is made anew.")
                with _writing(self.own):
                    _remove(entry)
            else:
                return str(self.own), str(entry)
        if self.shared is None:
            return None
        place, entry = self.shared, self.shared / key
        try:
            if not entry.is_dir():
                return None
            check(entry)
            read(entry)
        except _DAMAGE as error:
            self._tell(f"{_damage_of(entry, error)}. It is made anew.")
            try:
                with contextlib.suppress(FileNotFoundError):  # another run has removed it
                    _remove(entry)
            except OSError as failure:
                self._leave(failure)
            return None
        except OSError as error:
            self._leave(error)
            return None
        with contextlib.suppress(OSError):
            os.utime(entry / MANIFEST)
        try:
            return str(place), str(self._own_copy(entry))
        except _Gone:
            return None

    def write(
        self, key: str, about: dict[str, Any], write: Callable[[Path], None], read: Callable[[Path], T]
    ) -> T | None:
        """The content that ``read`` makes of a new entry; ``None`` if it can be kept nowhere.

        Args:
          key: the entry's; if there is one already, that one is read.
          about: what ``jaxsp cache list`` shows.
          write: puts the files into a folder; called again if the shared folder has no room.
          read: as in ``read``.

        Raises:
          UserError: the run's folder can't be written to.
        """
        if (found := self._found(key, read)) is not None:
            return read(Path(found[1]))
        if self.shared is not None:
            try:
                entry = _record(self.shared, key, about, write)
                prune(self.shared, max_bytes=MAX_BYTES, keep=key)
            except OSError as error:
                self._leave(error)
            else:
                with contextlib.suppress(_Gone):
                    return read(self._own_copy(entry))
        if self.own is None:
            return None
        with _writing(self.own):
            return read(_record(self.own, key, about, write))

    def _own_copy(self, entry: Path) -> Path:
        """A shared entry as one of the run's own, if it has a folder."""
        if self.own is None:
            return entry

        def write(folder: Path) -> None:
            for file in entry.iterdir():
                try:
                    os.link(file, folder / file.name)
                except OSError:  # another disk, or one without links
                    shutil.copyfile(file, folder / file.name)
                    _settle(folder / file.name)

        with _writing(self.own):
            try:
                return _install(self.own, entry.name, write)
            except FileNotFoundError as error:
                raise _Gone(entry) from error

    def _leave(self, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or error
        self._tell(f"What the teacher says is not kept for the next run: {self.shared or ''} {reason}.")
        self.shared = None

    def _tell(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)


class _Gone(Exception):
    """Another run has removed a shared entry."""


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"The folder {folder} can't be written to ({error.strerror}).") from error


def _record(folder: Path, key: str, about: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Writes an entry."""

    def whole(entry: Path) -> None:
        write(entry)
        for file in entry.iterdir():
            _settle(file)
        files = {file.name: [file.stat().st_size, _sha256(file)] for file in sorted(entry.iterdir())}
        manifest = {"version": VERSION, "key": key, "files": files, **about}
        sealed = json.dumps({**manifest, "sha256": checksum(manifest)}, ensure_ascii=False)
        (entry / MANIFEST).write_text(sealed, "utf-8")
        _settle(entry / MANIFEST)

    return _install(folder, key, whole)


def _install(folder: Path, key: str, write: Callable[[Path], None]) -> Path:
    """Lets ``write`` fill a folder, which becomes the entry in one step; one that is there stays."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    entry, scratch = folder / key, folder / f"{key}.{secrets.token_hex(4)}{_PART}"
    try:
        scratch.mkdir()
        write(scratch)
        try:
            scratch.rename(entry)
        except OSError:
            if not entry.is_dir():  # else another run was first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return entry


def _settle(file: Path) -> None:
    """Waits until a file is on the disk: a run can't go on without its entries, if the power fails."""
    with file.open("r+b") as stream:
        flush(stream)


def _remove(entry: Path) -> None:
    """Takes an entry away in one step; who reads it in mapped memory goes on."""
    gone = entry.with_name(f"{entry.name}.{secrets.token_hex(4)}{_PART}")
    shutil.rmtree(entry.rename(gone))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _manifest(entry: Path) -> dict[str, Any]:
    """An entry's manifest; raises ``ValueError`` if it is not as it was written."""
    try:
        manifest = parse_json((entry / MANIFEST).read_bytes(), MANIFEST)
        seal = manifest.pop("sha256")
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ValueError(f"its {MANIFEST} can't be read ({str(error).rstrip('.')})") from error
    if seal != checksum(manifest):
        raise ValueError(f"its {MANIFEST} is not as it was written")
    for name, expected in (("version", VERSION), ("key", entry.name)):
        if manifest[name] != expected:
            raise ValueError(f"its {name} is {manifest[name]!r}, not {expected!r}")
    return manifest


def check(entry: Path) -> None:
    """Raises ``ValueError`` with the first file of an entry that is not as it was written; reads all."""
    for name, (size, sha256) in _manifest(entry)["files"].items():
        file = entry / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{name} has {file.stat().st_size} bytes, not {size}")
        if _sha256(file) != sha256:
            raise ValueError(f"{name} has another SHA-256 than it was written with")


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of a folder.

    Attributes:
      path: its folder.
      about: its manifest; empty if that is damaged.
      size: its size in bytes.
      used: when it was last used, in seconds as ``time.time`` counts them.
    """

    path: Path
    about: dict[str, Any]
    size: int
    used: float


def entries(folder: Path) -> list[Entry]:
    """The entries of a folder, the one used last first; those that another process removes are left out."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and path.suffix != _PART:
            with contextlib.suppress(FileNotFoundError):
                try:
                    about, used = _manifest(path), (path / MANIFEST).stat().st_mtime
                except ValueError:
                    about, used = {}, path.stat().st_mtime
                size = sum(file.stat().st_size for file in path.iterdir())
                found.append(Entry(path, about, size, used))
    return sorted(found, key=lambda entry: -entry.used)


def prune(
    folder: Path, *, max_bytes: float | None = None, older_than: float | None = None, keep: str | None = None
) -> list[Entry]:
    """Removes entries, those not used for longest first, and what was not written to its end.

    Args:
      folder: where they lie.
      max_bytes: bytes that may stay.
      older_than: those not used for so many seconds go, too.
      keep: key of one that stays.

    Returns:
      What was removed.

    Raises:
      OSError: one can't be removed.
    """
    now, kept, removed = time.time(), 0, []
    for entry in entries(folder):
        is_old = older_than is not None and now - entry.used > older_than
        is_beyond = max_bytes is not None and kept + entry.size > max_bytes
        if entry.path.name != keep and (is_old or is_beyond):
            with contextlib.suppress(FileNotFoundError):  # another process does the same
                _remove(entry.path)
                removed.append(entry)
        else:
            kept += entry.size
    for path in folder.glob(f"*{_PART}"):
        with contextlib.suppress(FileNotFoundError):
            if now - path.stat().st_mtime > _STALE:
                shutil.rmtree(path, ignore_errors=True)
    return removed
