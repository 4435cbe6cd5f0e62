"""Files that users give: their bytes, what the first of these show them to be, and their text."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from jaxsp.errors import UserError
from jaxsp.files import as_path

_FOREIGN = {
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive (as .docx, .xlsx and .odt are)",
    b"{\\rtf": "RTF",
    b"\xd0\xcf\x11\xe0": "a document of an older Office",
    b"\x1f\x8b": "compressed (gzip)",
}
"""Kinds of files that are no plain text, by their first bytes: a PDF and RTF may be all in ASCII."""

# Each comment ends at its first -->, and for good: else many of them would be tried in all ways.
_HTML = re.compile(
    rb"(?is)\s*(<\?xml[^>]*>\s*)?(?:<!--(?:(?!-->).)*-->\s*)*+<(!doctype\s+html|html|head|body)\b"
)


def shown(path: str | Path) -> str:
    """The name of a file in a sentence; ``-`` is standard input."""
    return "standard input" if str(path) == "-" else str(path)


def suffix(path: str | Path) -> str:
    """The end of a file's name from its last full stop on, in lower case.

    Example:
      >>> suffix("Asked.JSONL"), suffix("-")
      ('.jsonl', '')
    """
    return Path(path).suffix.lower()


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file, or of standard input for ``-``.

    Raises:
      UserError: the file is missing or unreadable.
    """
    try:
        if str(path) != "-":
            return as_path(path, "The file").read_bytes()
        given = sys.stdin.buffer if hasattr(sys.stdin, "buffer") else sys.stdin  # a notebook has none
        data = given.read()
        return data.encode() if isinstance(data, str) else data
    except FileNotFoundError as error:
        raise UserError(f"There is no file {shown(path)}.") from error
    except OSError as error:
        raise UserError(f"{shown(path)} can't be read ({error.strerror}).") from error


def kind(data: bytes) -> str | None:
    """The kind of a file that is no plain text, in words; ``None`` for any other.

    Example:
      >>> kind(b"%PDF-1.7"), kind(b"A text.")
      ('a PDF', None)
    """
    start = data.removeprefix(b"\xef\xbb\xbf").lstrip()[:8]
    return next((name for first, name in _FOREIGN.items() if start.startswith(first)), None)


def is_html(data: bytes) -> bool:
    """Whether the first tags are those of a page.

    Example:
      >>> is_html(b"<!DOCTYPE html><p>A page."), is_html(b"<p>Markdown may begin so.")
      (True, False)
    """
    return bool(_HTML.match(data.removeprefix(b"\xef\xbb\xbf")[:4096]))


def as_text(data: bytes, path: str | Path) -> str:
    """The text that the bytes of a file are, in UTF-8.

    Raises:
      UserError: they are no text, empty, or not in UTF-8.
    """
    name = shown(path)
    if (known := kind(data)) is not None:
        raise UserError(f"{name} is {known}, no plain text; save it as text in UTF-8 first.")
    if b"\0" in data:
        raise UserError(f"{name} is a binary file; give plain text in UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start}); convert it first.") from error
    if not text.strip():
        raise UserError(f"{name} is empty.")
    return text
