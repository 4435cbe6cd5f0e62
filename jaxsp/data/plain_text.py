"""Documents that are no plain text, as text: pages (HTML), notebooks and PDFs. Layout becomes Markdown."""

from __future__ import annotations

import html.parser
import importlib
import io
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxsp.data import formats
from jaxsp.errors import UserError
from jaxsp.files import parse_json

_UNSEEN = ("script", "style", "template", "noscript", "svg")
_BLOCKS = frozenset(
    re.findall(
        r"\w+",
        "address article aside blockquote body dd details div dl dt fieldset figcaption figure footer form"
        " head header hr html main nav p section summary title",
    )
)
_DEEPEST = 9
"""Lists within lists that are set in, at most."""
_HEADINGS = {f"h{level}": level for level in range(1, 7)}


class _Page(html.parser.HTMLParser):
    """Gathers the text of a page: blocks apart, headings, lists and tables with the marks of Markdown."""

    def __init__(self) -> None:
        super().__init__()
        self._text: list[str] = []
        self._lines_apart = 0
        """Ends of lines before what comes next."""
        self._line: list[str] = []
        self._mark = ""
        """The beginning of the next line."""
        self._unseen: str | None = None
        self._as_it_is = False
        self._lists: list[int | None] = []
        """Those around this place: the number of the last item, ``None`` where they have no numbers."""
        self._cells: list[str] | None = None
        """The cells of a row that are complete."""
        self._rows = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        del attrs
        if self._unseen is not None:
            return
        if tag in _UNSEEN:
            self._unseen = tag
        elif tag in ("td", "th"):
            self._end_cell()
        elif tag == "br" and self._cells is None:
            self._end_line(1)
        elif tag in ("tr", "table"):
            self._end_row()
            self._cells = [] if tag == "tr" else None
            self._rows = 0 if tag == "table" else self._rows
        elif self._cells is None and (tag in _BLOCKS or tag in _HEADINGS or tag in ("pre", "ul", "ol", "li")):
            self._begin_block(tag)
        elif tag in _BLOCKS or tag in ("br", "li"):
            self._line.append(" ")

    def _begin_block(self, tag: str) -> None:
        self._end_line(1 if tag == "li" or (self._lists and tag in ("ul", "ol")) else 2)
        if tag in _HEADINGS:
            self._mark = "#" * _HEADINGS[tag] + " "
        elif tag == "pre":
            self._as_it_is = True
        elif tag in ("ul", "ol"):
            self._lists.append(0 if tag == "ol" else None)
        elif tag == "li":
            number = self._lists[-1] if self._lists else None
            if number is not None:
                self._lists[-1] = number + 1
            sign = "- " if number is None else f"{number + 1}. "
            self._mark = "   " * min(len(self._lists) - 1, _DEEPEST) + sign

    def handle_endtag(self, tag: str) -> None:
        if self._unseen is not None:
            self._unseen = None if tag == self._unseen else self._unseen
        elif tag in ("tr", "table"):
            self._end_row()
            if tag == "table":
                self._rows = 0
                self._end_line(2)
        elif self._cells is not None:
            self._line.append(" " if tag in _BLOCKS or tag == "li" else "")
        elif tag == "pre":
            self._end_pre()
        elif tag == "li":
            self._end_line(1)
        elif tag in ("ul", "ol") and self._lists:
            self._lists.pop()
            self._end_line(1 if self._lists else 2)
        elif tag in _BLOCKS or tag in _HEADINGS:
            self._end_line(2)

    def handle_data(self, data: str) -> None:
        if self._unseen is None:
            self._line.append(data)

    def _taken(self) -> str:
        """The line so far, which begins anew."""
        line, self._line = "".join(self._line), []
        return line

    def _write(self, text: str) -> None:
        self._text += ["\n" * self._lines_apart if self._text else "", text]
        self._lines_apart = 0

    def _end_line(self, apart: int) -> None:
        if self._as_it_is:
            self._line.append("\n")
            return
        if words := " ".join(self._taken().split()):
            self._write(f"{self._mark}{words}")
            self._mark = ""
        self._lines_apart = max(self._lines_apart, apart)

    def _end_pre(self) -> None:
        if self._as_it_is:
            self._write(f"```\n{self._taken().strip(chr(10))}\n```")
            self._lines_apart, self._as_it_is = 2, False

    def _end_cell(self) -> None:
        if self._cells is not None:
            self._cells.append(" ".join(self._taken().split()).replace("|", r"\|"))

    def _end_row(self) -> None:
        """A row of a table; of a single cell, which mostly is mere layout, its text."""
        if self._cells is None:
            if (self._line and "".join(self._line).strip()) or not self._rows:
                self._end_line(2)
            return
        self._end_cell()
        before, *cells = self._cells
        cells, self._cells = [before, *cells] if before else cells, None
        if len(cells) == 1:
            self._line = [cells[0].replace(r"\|", "|")]
            self._end_line(2)
        elif any(cells):
            self._write(f"| {' | '.join(cells)} |")
            self._rows += 1
            if self._rows == 1:
                self._write("\n" + "|---" * len(cells) + "|")
            self._lines_apart = 1

    def whole(self) -> str:
        """The text, when all is read."""
        self.close()
        self._end_row()
        self._end_pre()  # it was never closed
        return "".join(self._text)


def from_html(page: str) -> str:
    """The text of a page: what a reader sees, with the marks of Markdown for headings, lists and tables.

    Raises:
      UserError: it holds what no parser of HTML takes.

    Example:
      >>> from_html("<h1>Cups</h1><p>Small &amp; red.<ul><li>One<li>Two</ul><script>let x</script>")
      '# Cups\\n\\nSmall & red.\\n\\n- One\\n- Two'
    """
    parser = _Page()
    # Python's parser looks for the end of a comment or a tag that has none again and again.
    ends = {"-->": page.rfind("<!--"), ">": page.rfind("<")}
    end = next((end for end, start in ends.items() if start > page.rfind(end)), "")
    try:
        parser.feed(page + end)
        return parser.whole().removesuffix(end).rstrip()
    # So Python's parser says it; of a character whose number has thousands of digits.
    except (AssertionError, ValueError) as error:
        raise UserError(f"it is no HTML that can be read ({error!s:.80})") from error


def from_notebook(notebook: str) -> str:
    """The text of a Jupyter notebook: its Markdown, and its code without what that printed.

    Raises:
      UserError: it is no notebook of format 4.

    Example:
      >>> from_notebook('{"cells": [{"cell_type": "code", "source": ["a = 1\\\\n", "b = 2"]}]}')
      '```\\na = 1\\nb = 2\\n```'
    """
    try:
        found = parse_json(notebook, "its JSON", finite=False)
        sources = [(cell["cell_type"], "".join(cell["source"]).strip("\n")) for cell in found["cells"]]
    except (UserError, TypeError, KeyError) as error:
        raise UserError(f"it is no notebook of format 4 ({type(error).__name__}: {error!s:.80})") from error
    texts = []
    for kind, source in sources:
        if source.strip() and kind in ("markdown", "code"):
            fence = max(["```", *(run + "`" for run in re.findall("`{3,}", source))], key=len)
            texts.append(source if kind == "markdown" else f"{fence}\n{source}\n{fence}")
    return "\n\n".join(texts)


def from_pdf(data: bytes) -> str:
    """The text of a PDF, page by page, by ``pypdf``.

    Args:
      data: the bytes of the file.

    Raises:
      UserError: ``pypdf`` is not installed, or can't read it.
    """
    try:
        pypdf = importlib.import_module("pypdf")
    except ImportError:
        raise UserError("it is a PDF, which jaxsp[pdf] reads: pip install 'jaxsp[pdf]'") from None
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages]
    except Exception as error:  # damaged files fail in many ways
        raise UserError(f"it is a PDF that can't be read ({error!s:.80})") from error
    return "\n\n".join(text.strip() for text in pages if text.strip())


_BY_SUFFIX: Mapping[str, Callable[[str], str]] = {
    ".html": from_html,
    ".htm": from_html,
    ".xhtml": from_html,
    ".ipynb": from_notebook,
}


def of_document(data: bytes, path: str) -> str:
    """The text of a document of any kind that can be read.

    Args:
      data: the bytes of the file.
      path: its name, whose end says what it is where the bytes don't.

    Raises:
      UserError: it can't be read, or has no text.
    """
    name, convert = formats.shown(path), _BY_SUFFIX.get(formats.suffix(path))
    if convert is None and formats.is_html(data):
        convert = from_html
    try:
        if formats.kind(data) == "a PDF":
            text = from_pdf(data)
        else:
            text = formats.as_text(data, path)
            text = convert(text) if convert else text
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(name) else f"{name}: {message}.") from error
    if not text.strip():
        raise UserError(f"{name} holds no text; if its pages are pictures, recognise their text first (OCR).")
    return text
