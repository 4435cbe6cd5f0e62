"""Compiled programs, kept on disk from one run to the next: the second run hardly compiles."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
import warnings
from pathlib import Path

import jax

from jaxsp import device

MAX_BYTES = 2 << 30
"""Most that the programs take on disk when a process starts; those not used for longest go first."""

MIN_SECONDS = 0.05
"""Shortest compile time of a program that is kept: others are compiled as fast as they are read."""


def cache_folder() -> Path:
    """The folder for what can be made again: ``$JAXSP_CACHE``, else ``jaxsp`` in the user's cache folder.

    Raises:
      RuntimeError: the user has no home folder.

    Example:
      >>> programs = cache_folder() / "programs"
    """
    if chosen := os.environ.get("JAXSP_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxsp"


def enable() -> None:
    """Makes jax keep compiled programs in ``cache_folder() / "programs"``; ``load_model`` calls it.

    Changes nothing if the environment variable ``JAXSP_COMPILE_CACHE`` is ``off``, if the user has chosen a
    cache (``JAX_COMPILATION_CACHE_DIR``), in a run of several processes, or where jax can't be trusted to
    read CPU programs back. A folder that can't be written is reported once, in one line.

    Source: https://docs.jax.dev/en/latest/persistent_compilation_cache.html

    Example:
      >>> enable()
      >>> enable()  # a second call changes nothing
    """
    config = jax.config
    if (
        os.environ.get("JAXSP_COMPILE_CACHE", "").lower() == "off"
        or config.jax_compilation_cache_dir is not None  # type: ignore[attr-defined]
        # Processes tune a GPU program together: one that finds it on its own disk leaves the others waiting.
        or jax.process_count() > 1
        or (device.platform() == "cpu" and not _readable(jax.__version_info__))
    ):
        return
    try:
        folder = cache_folder() / "programs"
        _prepare(folder)
    except (OSError, RuntimeError) as error:
        _report(f"Compiled programs are not kept for the next run: {error}.")
        return
    # A damaged file, a full disk: jax warns of each and compiles.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    config.update("jax_compilation_cache_dir", str(folder))


def _readable(version: tuple[int, ...]) -> bool:
    # From 0.8 on jax printed an error for each CPU program read back where the CPU has AVX-512
    # (github.com/jax-ml/jax/issues/38445); until 0.10 long ones crashed macOS.
    return version >= (0, 10, 2) or (version < (0, 8) and sys.platform != "darwin")


def _prepare(folder: Path) -> None:
    """Makes the folder; takes out the programs beyond ``MAX_BYTES``, and what was not written to its end.

    Once a process: jax's own limit looks at every file whenever it writes one, which takes longer than
    compiling when there are many; and it never replaces a file.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # whoever can write here can run code
    stamp, room = folder / ".checked", MAX_BYTES
    checked = stamp.stat().st_mtime if stamp.exists() else 0.0
    stamp.touch()
    with contextlib.suppress(FileNotFoundError):  # another process may be doing the same
        for program in sorted(folder.glob("*-cache"), key=lambda file: -file.stat().st_atime):
            stat = program.stat()
            room -= stat.st_size
            if room < 0 or (stat.st_mtime >= checked and not _is_whole(program.read_bytes())):
                program.unlink()


def _is_whole(program: bytes) -> bool:
    """Whether jax can decompress it: its process may have been killed, or the disk full, in the middle."""
    for name in ("zlib", "compression.zstd", "zstandard"):  # what jax takes, by what is installed
        with contextlib.suppress(Exception):
            importlib.import_module(name).decompress(program)
            return True
    return False


@functools.cache
def _report(message: str) -> None:
    logging.getLogger(__name__).warning(message)
