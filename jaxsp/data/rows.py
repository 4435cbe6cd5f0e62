"""Rows of queries, as files have them: lines, JSON, tables and chats; and what their columns are."""

from __future__ import annotations

import csv
import difflib
import functools
import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsp.data import formats
from jaxsp.errors import Damaged, UserError, in_a_line
from jaxsp.files import parse_json

QUERY = ("query", "question", "prompt", "input", "instruction", "messages")
"""Names of the column that holds the query, or the chat that ends with it."""
ANSWER = ("answer", "answers", "completion", "output", "response")
"""Names of the column that holds the answer; the first of these that there is counts."""
LINES = ("", ".txt", ".text", ".md")
READ = (*LINES[1:], ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""Ends of the names of files that are read."""

_MISSPELT = 0.82
"""Likeness of a column's name to one that is missing, from which it is taken for it."""

Row = tuple[str, Any]
"""A row's place, and what is there: a text, or columns by our own names."""


def read(path: str | Path, column: str | None = None) -> list[Row]:
    """The rows of a file of queries.

    Args:
      path: lines, JSON lines, a JSON array or a table (``.csv``, ``.tsv``, ``.parquet``); ``-`` for standard
        input.
      column: the one that holds the query, where its name doesn't say so.

    Raises:
      UserError: it is no such file, or damaged; or it isn't known which column holds the query.
    """
    data, name, end = formats.read_bytes(path), formats.shown(path), formats.suffix(path)
    if data.startswith(b"PAR1") and (end == ".parquet" or data.endswith(b"PAR1")):
        return list(_parquet(data, name, column))
    if formats.is_html(data):
        raise UserError(f"{name} is a page (HTML), no list of queries; {_ADVICE}.")
    if end not in (*LINES, *READ):
        raise UserError(f"{name} is no list of queries by its name ({end}); {_ADVICE}.")
    text = formats.as_text(data, path)
    if end == ".parquet":
        raise UserError(f"{name} is no Parquet file by its first characters; {_ADVICE}.")
    if end in (".csv", ".tsv"):
        return list(_separated(text, name, "\t" if end == ".tsv" else None, column))
    start = text.lstrip()
    if end in LINES and not re.match(r'\{|\[\s*[\[{"\]]', start):
        return [(_line(name, i), line.strip()) for i, line in _lines(text)]
    is_array = start.startswith("[") and end not in (".jsonl", ".ndjson")
    found = _array(text, name) if is_array else None
    if found is None:
        found = [
            (_line(name, i), parse_json(line, _line(name, i), object, finite=False))
            for i, line in _lines(text)
        ]
    return [(where, row if isinstance(row, str) else own(row, where, column)) for where, row in found]


_ADVICE = f"give one query per line (.txt), or one of {', '.join(READ[3:])}"


def own(row: Any, where: str, column: str | None = None) -> dict[str, Any]:
    """A row with our own names: ``query``, and ``answer``, ``expect``, ``seed`` and ``span`` if it has them.

    Args:
      row: a mapping. In a chat (``messages``) the last turn of the user is the query, and the assistant's
        turn after it the answer; what was said before is left out. Of several answers the first counts.
      where: where it stands, for errors.
      column: the one that holds the query, where its name doesn't say so.

    Raises:
      UserError: it is no mapping, or it isn't known which column holds the query.

    Example:
      >>> own({"id": 7, "question": "How long?", "answers": {"text": ["90 cm", "90"]}}, "line 1")
      {'query': 'How long?', 'answer': '90 cm'}
    """
    if not isinstance(row, Mapping):
        raise UserError(f'{where}: expected {{"query": "...", "answer": "..." (optional)}}.')
    columns = _columns(row, where, column)
    # Of other data sets, these are something else.
    more = [name for name in ("seed", "span") if name in row and columns["query"] == "query"]
    return _renamed(row, where, columns) | {name: row[name] for name in more}


def _columns(names: Iterable[Any], where: str, column: str | None) -> dict[str, Any]:
    """The names of the columns of the query, the answer and what is expected, as far as they are there."""
    try:
        return _chosen(tuple(names), column)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


@functools.lru_cache  # rows mostly have the same names
def _chosen(names: tuple[Any, ...], column: str | None) -> dict[str, Any]:
    def those(known: Iterable[str]) -> list[Any]:
        return [name for word in known for name in names if str(name).strip().casefold() == word]

    found = [name for name in names if name == column] if column else those(["query"]) or those(QUERY)
    if len(found) != 1:
        there = in_a_line(", ".join(map(str, names)), 300) or "none"
        what = f"there is no column {column!r}" if column else "it isn't known which column holds the query"
        raise UserError(f"{what}; the columns are {there}. Call it query, or name it with --query-column.")
    others = {"answer": those(ANSWER), "expect": those(["expect"])}
    others = {ours: [name for name in theirs if name != found[0]] for ours, theirs in others.items()}
    missing = [*(() if others["answer"] else ANSWER), *(() if others["expect"] else ["expect"])]
    for name in names:
        word = str(name).strip().casefold()
        near = difflib.get_close_matches(word, missing, n=1, cutoff=_MISSPELT)
        if near and name != found[0]:
            raise UserError(f"unknown key {name!r}; did you mean {near[0]}? Rename it, or leave it out.")
    return {"query": found[0], **{ours: theirs[0] for ours, theirs in others.items() if theirs}}


def _renamed(row: Mapping[Any, Any], where: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """A row by our own names, without what is not given."""
    found = {ours: row.get(theirs) for ours, theirs in columns.items()}
    query, answer = found["query"], _first(found.get("answer"))
    if isinstance(query, list | tuple):
        query, said = _last_turns(query, f"{where}, {columns['query']}")
        answer = said if answer is None else answer
    elif columns["query"] == "messages":
        raise UserError(f"{where}: messages must be a list of turns, not {query!r:.60}; give JSON lines.")
    given = {"query": query, "answer": answer, "expect": found.get("expect")}
    return {name: value for name, value in given.items() if value is not None or name == "query"}


def _first(answer: Any) -> Any:
    """The first of several answers; some data sets have them in a mapping."""
    if isinstance(answer, Mapping):
        answer = answer.get("text", answer.get("value", answer))
    if isinstance(answer, list | tuple):
        return answer[0] if answer else None
    return answer


def _last_turns(messages: Sequence[Any], where: str) -> tuple[str, str | None]:
    """The last turn of the user, and the assistant's after it."""
    for i, turn in enumerate(messages, start=1):
        if not (isinstance(turn, Mapping) and isinstance(turn.get("content"), str) and "role" in turn):
            raise UserError(f'{where}: turn {i} must be {{"role": "...", "content": "..."}}, a text.')
    asked = [i for i, turn in enumerate(messages) if turn["role"] == "user"]
    if not asked:
        raise UserError(f"{where}: no turn of the user (role user) is there to be the query.")
    after = messages[asked[-1] + 1 :]
    said = next((turn["content"] for turn in after if turn["role"] == "assistant"), None)
    return messages[asked[-1]]["content"], said


def _line(name: str, number: int) -> str:
    return f"{name}, line {number}"


def _lines(text: str) -> list[tuple[int, str]]:
    return [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _array(text: str, name: str) -> list[Row] | None:
    """The elements of a JSON array; ``None`` if each line is an array of its own."""
    try:
        found = parse_json(text, name, list, finite=False)
    except Damaged as error:
        if "Extra data" in error.what:
            return None
        raise
    return [(f"{name}, row {i}", row) for i, row in enumerate(found, start=1)]


def _separated(text: str, name: str, separator: str | None, column: str | None) -> Iterator[Row]:
    """The rows of a table in text, whose first line names the columns; empty cells are left out."""
    head = text.lstrip().partition("\n")[0]
    separator = separator or max(",;\t", key=head.count)
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a column may hold whole documents
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        names = next(row for row in reader if row)
        columns = _columns(names, _line(name, 1), column)
        for cells in reader:
            if not any(map(str.strip, cells)):  # spreadsheets leave such lines at the end
                continue
            where = _line(name, reader.line_num)
            if len(cells) != len(names):
                raise UserError(
                    f"{where}: {len(cells)} cells, where the first line names {len(names)} columns; a cell"
                    f" with {separator!r} in it stands in quotes."
                )
            row = {key: cell for key, cell in zip(names, cells, strict=True) if cell.strip()}
            found = _renamed({columns["query"]: "", **row}, where, columns)
            for ours, theirs in (("answer", "answers"), ("expect", columns.get("expect"))):
                if columns.get(ours) == theirs and found.get(ours, "").startswith(("[", "{")):
                    raise UserError(f"{where}: {theirs} is a list in one cell; save the table as JSON lines.")
            yield where, found
    except csv.Error as error:
        raise UserError(f"{name}: no table ({error}).") from error
    finally:
        csv.field_size_limit(limit)


def _parquet(data: bytes, name: str, column: str | None) -> Iterator[Row]:
    """The rows of a Parquet file; of its columns those alone that are used are read."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        columns = _columns(file.schema_arrow.names, name, column)
        rows = file.read(columns=list(columns.values())).to_pylist()
    except UserError:
        raise
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # texts and dates that are none
        raise UserError(f"{name} is a damaged Parquet file ({in_a_line(error, 120)}).") from error
    for i, row in enumerate(rows, start=1):
        yield f"{name}, row {i}", _renamed(row, f"{name}, row {i}", columns)
