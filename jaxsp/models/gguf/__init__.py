"""GGUF files, each converted once into an ordinary model directory that is kept in a cache.

A conversion's mark has the sizes and checksums of its files. What is missing, or not as it was written, is
made anew. Where the cache can't be written to, the conversion lasts as long as the process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import shutil
import tempfile
import time
from pathlib import Path

from jaxsp.compile_cache import cache_folder
from jaxsp.files import read_json
from jaxsp.models.weights import fingerprint, weight_files
from jaxsp.terminal import say_once
from jaxsp.typing import UserError

__all__ = ["check_weights", "converted", "discard_if_damaged", "is_converted"]

_MARK, _WEIGHTS = "converted_by_jaxsp", "model.safetensors"
CONVERSION = 5  # raise when what is written changes: older conversions are then not reused

_SCRATCH = re.compile(r".+-[0-9a-f]{16}\.\w{8}")  # tempfile's name for a conversion that is being written
_ABANDONED = 600.0  # seconds without a byte: whoever wrote it is gone


def converted(path: Path) -> Path:
    """The model directory made from a GGUF file; made now if the cache does not have it whole.

    Args:
      path: the ``.gguf`` file.

    Returns:
      A folder with ``config.json``, ``model.safetensors`` and the tokenizer's files.

    Raises:
      UserError: the file is damaged, of an architecture, tokenizer or rope type not supported, or the
        disk is full.
    """
    stat = path.stat()
    identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {CONVERSION}"
    name = f"{path.stem:.100}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    try:
        folder = cache_folder()
        if folder.is_dir():
            _clear(folder)
        if _is_whole(folder / name):
            return folder / name
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=folder))
    except (OSError, RuntimeError) as error:
        say_once(f"Models converted from GGUF are not kept for the next run: {error}.")
        return _without_cache(path, name)
    return _convert(path, scratch, folder / name)


def _without_cache(path: Path, name: str) -> Path:
    try:
        target = Path(_temporary().name, name)
        if target.is_dir():
            return target
        return _convert(path, Path(tempfile.mkdtemp(dir=target.parent)), target)
    except OSError as error:
        raise UserError(
            f"{path} can't be converted: there is no folder to write to ({error}); set JAXSP_CACHE to one."
        ) from error


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="jaxsp-")  # removed when the process ends


def _convert(path: Path, scratch: Path, target: Path) -> Path:
    from jaxsp.models.gguf.convert import convert

    try:
        convert(path, scratch)
        (scratch / _MARK).write_text(json.dumps(_sums(scratch)), "utf-8")
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same result
                raise
    except (UserError, OSError) as error:
        raise UserError(f"{path} can't be converted: {str(error).rstrip('.')}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _sums(directory: Path) -> dict[str, list]:
    """Size and checksum of every file; of the weights the fingerprint, which loading them gives."""
    files = sorted(file for file in directory.iterdir() if file.name != _MARK)
    return {file.name: [file.stat().st_size, _sum(file)] for file in files}


def _sum(file: Path) -> str:
    if file.name == _WEIGHTS:
        return fingerprint(weight_files(file.parent))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _written(directory: Path) -> dict[str, list]:
    """The sums in a conversion's mark; none if it can't be read, or was written by an older version."""
    try:
        sums = read_json(directory / _MARK)
        return {name: [int(size), str(checksum)] for name, (size, checksum) in sums.items()}
    except (OSError, UserError, ValueError, TypeError):
        return {}


def _damaged(directory: Path, *, weights: bool) -> str | None:
    """The first file of a conversion that is not as it was written; ``weights``: whether these are read."""
    for name, (size, checksum) in _written(directory).items():
        try:
            file = directory / name
            if file.stat().st_size != size or ((weights or name != _WEIGHTS) and _sum(file) != checksum):
                return name
        except (OSError, UserError):
            return name
    return None


def _is_whole(directory: Path) -> bool:
    """Whether a conversion is there, and whole but for the content of its weights; else it is removed.

    Raises:
      OSError: it can't be.
    """
    if not directory.is_dir():
        return False
    damaged = _damaged(directory, weights=False) if _written(directory) else _MARK
    if damaged is not None:
        _discard(directory, damaged)
    return damaged is None


def _discard(directory: Path, damaged: str) -> None:
    say_once(f"{directory / damaged} is not as it was written: the model is converted anew.")
    shutil.rmtree(directory)


def _clear(folder: Path) -> None:
    """Removes what conversions that were killed have left."""
    for scratch in folder.iterdir():
        if _SCRATCH.fullmatch(scratch.name):
            with contextlib.suppress(OSError):  # another process is at it, or another user
                newest = max(file.stat().st_mtime for file in (scratch, *scratch.iterdir()))
                if time.time() - newest > _ABANDONED:
                    shutil.rmtree(scratch, ignore_errors=True)


def is_converted(directory: Path) -> bool:
    """Whether a model directory is one of those that ``converted`` has made.

    Its config.json lacks no default, and its ``tokenizer.json`` is all of the tokenizer.
    """
    return (directory / _MARK).is_file()


def check_weights(directory: Path, fingerprint: str) -> None:
    """Checks that a conversion's weights, as they were loaded, are those that were written.

    Raises:
      UserError: they are not.
    """
    _, written = _written(directory).get(_WEIGHTS, (0, fingerprint))
    if written != fingerprint:
        raise UserError(f"{directory / _WEIGHTS} is not as it was written; remove the folder.")


def discard_if_damaged(directory: Path) -> bool:
    """Removes a conversion that is not as it was written, after reading all of it; says whether it was.

    Raises:
      UserError: it can't be removed.
    """
    if (damaged := _damaged(directory, weights=True)) is None:
        return False
    try:
        _discard(directory, damaged)
    except OSError as error:
        raise UserError(f"{directory} is damaged and can't be removed ({error.strerror}).") from error
    return True
