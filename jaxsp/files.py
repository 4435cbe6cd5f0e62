"""Files written whole or not at all, and their sizes for people."""

from __future__ import annotations

import secrets
from pathlib import Path


def atomic_write(file: Path, content: bytes | str) -> None:
    """Writes a file by way of a ``.part`` beside it, so that nobody ever reads half of it.

    A file that is there is replaced. Several processes may write the same file at once: the last one wins.

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
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def size(count: int) -> str:
    """A number of bytes for people.

    Example:
      >>> size(3 * 2**20), size(5 * 2**30)
      ('3.0 MiB', '5.00 GiB')
    """
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
