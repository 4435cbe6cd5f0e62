"""GGUF files, each converted once into an ordinary model directory that is kept in a cache."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from jaxsp.compile_cache import cache_folder
from jaxsp.typing import UserError

__all__ = ["converted", "is_converted"]

_MARK = "converted_by_jaxsp"
CONVERSION = 4  # raise when what is written changes: older conversions are then not reused


def converted(path: Path) -> Path:
    """The model directory made from a GGUF file; made now if the cache does not have it.

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
    target = cache_folder() / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if target.is_dir():
        return target
    from jaxsp.models.gguf.convert import convert

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f"{target.name}.", dir=target.parent, ignore_cleanup_errors=True
    ) as scratch:
        try:
            convert(path, Path(scratch))
            (Path(scratch) / _MARK).touch()
        except (UserError, OSError) as error:
            raise UserError(f"{path} can't be converted: {error}.") from error
        try:
            Path(scratch).rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same result
                raise
    return target


def is_converted(directory: Path) -> bool:
    """Whether a model directory is one of those that ``converted`` has made.

    Its config.json lacks no default, and its ``tokenizer.json`` is all of the tokenizer.
    """
    return (directory / _MARK).is_file()
