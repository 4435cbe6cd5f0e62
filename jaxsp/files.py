"""Files written whole or not at all; JSON, whose every damage is one sentence; sizes for people."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from jaxsp.errors import Damaged, UserError

T = TypeVar("T")

_NAMES = {dict: "an object", list: "a list"}

_SIGNED = "<!-- written by jaxsp, and written anew as long as nobody else changes it: {} -->\n"


def parse_json(text: bytes | str, where: object, kind: type[T] = dict, *, finite: bool = True) -> T:
    """The content of a JSON text.

    Args:
      text: bytes are UTF-8.
      where: the place it comes from, as the error begins.
      kind: the type that the whole must have; ``object`` for any.
      finite: whether NaN, Infinity and numbers that are too large for a float are errors, too.

    Raises:
      Damaged: it is none, and why.

    Example:
      >>> parse_json('{"a": 1}', "x.json")
      {'a': 1}
      >>> parse_json('{"a": NaN}', "x.json")
      Traceback (most recent call last):
      jaxsp.errors.Damaged: x.json: not valid JSON (NaN is no number that it may hold).
    """

    def number(digits: str) -> float:
        if math.isfinite(value := float(digits)):
            return value
        raise ValueError(f"{digits:.40} is no number that it may hold")

    check = number if finite else None
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        content: Any = json.loads(text, parse_float=check, parse_constant=check)
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}"
    except ValueError as error:
        reason = str(error)
    except RecursionError:
        reason = "nested too deeply"
    else:
        if isinstance(content, kind):
            return content
        found = _NAMES.get(type(content)) or f"{content!r:.60}"
        reason = f"expected {_NAMES.get(kind, kind.__name__)}, found {found}"
    raise Damaged(f"{where}: not valid JSON ({reason})")


def read_json(
    file: Path, kind: type[T] = dict, *, advice: str = "", finite: bool = True, sha256: str | None = None
) -> T:
    """The content of a JSON file.

    Args:
      file: the file.
      kind: as in ``parse_json``.
      advice: what to do, as the error ends.
      finite: as in ``parse_json``.
      sha256: checksum that its bytes must have; ``None``: any.

    Raises:
      Damaged: it is missing or no such JSON.
      OSError: it can't be read.

    Example:
      >>> import tempfile
      >>> read_json(Path(tempfile.mkdtemp(), "x.json"), advice="write it anew")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      jaxsp.errors.Damaged: .../x.json is missing; write it anew.
    """
    data = read_whole(file, sha256, advice=advice)
    try:
        return parse_json(data, "", kind, finite=finite)
    except Damaged as error:
        raise Damaged(f"{file} is damaged{error.what}", advice) from None


def read_json_lines(file: Path, *, sha256: str | None = None) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; arguments and errors as in ``read_json``."""
    lines = read_whole(file, sha256).splitlines()
    return [parse_json(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1)]


def read_whole(file: Path, sha256: str | None = None, *, advice: str = "") -> bytes:
    """The bytes of a file; arguments and errors as in ``read_json``."""
    try:
        data = file.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise Damaged(f"{file} is missing", advice) from None
    if sha256 not in (None, hashlib.sha256(data).hexdigest()):
        raise Damaged(f"{file} is damaged: its SHA-256 is not the one it was written with", advice)
    return data


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with a checksum of itself, for ``unsealed``.

    Example:
      >>> unsealed(sealed({"steps": 2}), "settings.json")
      {'steps': 2}
    """
    return {**content, "seal": checksum(content)}


def signed(text: str) -> str:
    """A Markdown text that is known for jaxsp's as long as nobody changes it: ``is_signed``.

    Example:
      >>> print(signed("# A title\\n"))  # doctest: +ELLIPSIS
      # A title
      <!-- written by jaxsp, and written anew as long as nobody else changes it: ... -->
      <BLANKLINE>
    """
    return text + _signature(text.encode()).decode()


def is_signed(file: Path) -> bool:
    """Whether a file is as ``signed`` made it; one that is missing, or no file, is not."""
    try:
        data = file.read_bytes()
    except OSError:
        return False
    content, start, _ = data.rpartition(_SIGNED.partition("{")[0].encode())
    return bool(start) and data == content + _signature(content)


def remove_signed(file: Path) -> None:
    """Removes a file that is as ``signed`` made it; any other stays."""
    if is_signed(file):
        file.unlink(missing_ok=True)


def _signature(content: bytes) -> bytes:
    return _SIGNED.format(hashlib.sha256(content).hexdigest()).encode()


def unsealed(content: dict[str, Any], where: object, *, advice: str = "") -> dict[str, Any]:
    """The content without its checksum; older files have none.

    Raises:
      Damaged: it is not as it was written.
    """
    rest = {name: value for name, value in content.items() if name != "seal"}
    try:
        same = "seal" not in content or content["seal"] == checksum(rest)
    except RecursionError:
        same = False
    if not same:
        raise Damaged(f"{where} is damaged: it is not as it was written", advice)
    return rest


def checksum(content: Any) -> str:
    """SHA-256 of what JSON carries, however it is written."""
    return hashlib.sha256(json.dumps(as_read(content), sort_keys=True).encode()).hexdigest()


def as_read(content: Any) -> Any:
    """The content as JSON gives it back: tuples are lists, and all names texts."""
    return json.loads(json.dumps(content))


def atomic_write(file: Path, content: bytes | str) -> None:
    """Writes a file by way of a ``.part`` beside it, so that nobody ever reads half of it.

    A file that is there is replaced, also if the power fails meanwhile by nothing but the whole. Several
    processes may write the same file at once: the last one wins.

    Args:
      file: where to; its folder must be there.
      content: bytes, or text, which is written as UTF-8.

    Raises:
      OSError: the folder is not there or not writable, or the disk is full; the file stays as it was.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp(), "note.txt")
      >>> atomic_write(file, "done")
      >>> [found.read_text() for found in file.parent.iterdir()]
      ['done']
    """
    # A random name: processes on several machines can share a folder, and even their process ids.
    scratch = file.with_name(f"{file.name}.{secrets.token_hex(4)}.part")
    try:
        with scratch.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            flush(stream)
        scratch.replace(file)
    except OSError as error:
        error.filename, error.filename2 = str(file), None  # a full disk names none, others the scratch
        raise
    finally:
        with contextlib.suppress(OSError):  # the folder may have vanished
            scratch.unlink(missing_ok=True)


def flush(stream: Any) -> None:
    """Waits until what was written to a file is on the disk.

    Before a rename: else a power cut may leave the new name on an empty file.
    """
    stream.flush()
    os.fsync(stream.fileno())


@contextlib.contextmanager
def os_errors_as_user_errors(
    where: object = "", advice: str = "", *, of_the_system_alone: bool = False
) -> Iterator[None]:
    """Turns what the operating system refuses into a ``UserError``: a full disk, a folder that vanished.

    Args:
      where: named where the error names no path.
      advice: what to do, as the error ends.
      of_the_system_alone: leave those that carry no number of the system, as the time-out of a callback.

    Example:
      >>> with os_errors_as_user_errors():
      ...     Path("/nowhere/x").read_text()
      Traceback (most recent call last):
      jaxsp.errors.UserError: /nowhere/x: No such file or directory.
    """
    try:
        yield
    except BrokenPipeError:  # whoever read the output has gone
        raise
    except OSError as error:
        if of_the_system_alone and error.errno is None:
            raise
        place, reason = error.filename or where, error.strerror or str(error) or type(error).__name__
        sentence = f"{place}: {reason}" if place else reason
        raise UserError(f"{sentence}; {advice}." if advice else f"{sentence}.") from error


def as_path(value: Any, what: str) -> Path:
    """A path, from what a user gives for one.

    Args:
      value: a text or a path.
      what: its name in the error.

    Raises:
      UserError: it is neither, or empty.

    Example:
      >>> as_path("", "The folder")
      Traceback (most recent call last):
      jaxsp.errors.UserError: The folder must be a path, not ''.
    """
    if isinstance(value, str | os.PathLike) and (text := os.fspath(value)) and "\0" not in str(text):
        return Path(value)
    raise UserError(f"{what} must be a path, not {value!r:.60}.")


def size(count: int) -> str:
    """A number of bytes for people.

    Example:
      >>> size(3 * 2**20), size(5 * 2**30)
      ('3.0 MiB', '5.00 GiB')
    """
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
