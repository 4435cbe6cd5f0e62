"""Reading what the user gives: a context, and queries with or without answers."""

from __future__ import annotations

import dataclasses
import random
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsp.data import formats, plain_text, rows
from jaxsp.data.words import pattern
from jaxsp.typing import UserError


@dataclasses.dataclass(frozen=True)
class Query:
    """An input z.

    Attributes:
      text: the query.
      answer: to train towards, if the user gives one (else the teacher's).
      expect: texts that a right answer contains, where that is known: words, or a regular expression between
        slashes, as ``"/4[.,]5/"``. The report counts the answers that have all.
      seed: form in which the document itself gave it (see ``jaxsp.study``); empty for the user's own.
      span: start and end, in the document, of what it was made from; ``None`` for the user's own.
    """

    text: str
    answer: str | None = None
    expect: tuple[str, ...] = ()
    seed: str = dataclasses.field(default="", repr=False)
    span: tuple[int, int] | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        for text in self.expect:
            pattern(text)  # a mistake in one is found before anything is done

    def as_row(self) -> dict[str, Any]:
        """The query as a line of JSONL, without what it doesn't have."""
        row = {"query": self.text, "answer": self.answer, "expect": list(self.expect), "seed": self.seed}
        row |= {"span": list(self.span or ())}
        return {key: value for key, value in row.items() if value}


_OPENING = "\"'“”„‘’«»¿¡(["
"""Signs that a word may begin with and be the same word; a full stop is none (.NET)."""


def normal_form(text: str) -> str:
    """The text without what makes it no other question: capitals, blanks, and a sentence's signs.

    Example:
      >>> normal_form("  What is  5-3 ?") == normal_form("what is 5-3")
      True
    """

    def bare(word: str) -> str:
        return word.lstrip(_OPENING).rstrip(_OPENING + ".,;:!?。、？！…)]")

    words = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).split()
    return " ".join(filter(None, map(bare, words))) or " ".join(words)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, or of standard input for ``-``.

    Raises:
      UserError: the file is missing, unreadable, empty, binary, of another kind or not UTF-8.
    """
    return formats.as_text(formats.read_bytes(path), path)


def read_context(path: str | Path) -> str:
    """The context of a file or of standard input (``-``), stripped at its ends.

    A page (HTML), a notebook (``.ipynb``) and, with ``jaxsp[pdf]``, a PDF become text with the marks of
    Markdown; any other file must be text.

    Args:
      path: the file.

    Raises:
      UserError: as ``read_text``; or it holds no text.
    """
    return plain_text.of_document(formats.read_bytes(path), str(path)).strip()


def read_queries(path: str | Path, column: str | None = None) -> list[Query]:
    """Queries from a file: one per line, JSON, or a table.

    JSON is an array or one row a line, each a text or ``{"query": ..., "answer": ..., "expect": [...]}``.
    Text that begins with ``{`` is taken for it whatever the file's name. Tables are ``.csv``, ``.tsv`` and
    ``.parquet``. Rows of other data sets are read, too: the query may be called ``question``, ``prompt``,
    ``input`` or ``instruction``, the answer ``answers``, ``completion``, ``output``, ``response``. The first
    of several answers counts; other columns are passed over. In a chat, ``{"messages": [{"role": ...,
    "content": ...}, ...]}``, the last turn of the user is the query, and the assistant's turn after it the
    answer; what was said before is left out.

    Args:
      path: the file, or ``-`` for standard input.
      column: the column that holds the query, where its name doesn't say so.

    Raises:
      UserError: the file can't be read, or is of another kind; a row is malformed (it is named); or it isn't
        known which column holds the query.
    """
    found = rows.read(path, column)
    return [_from_dict({"query": row} if isinstance(row, str) else row, where) for where, row in found]


def as_queries(queries: Sequence[str | Query | Mapping[str, Any]]) -> list[Query]:
    """Queries in any form the Python interface takes: texts, rows as ``read_queries`` has them, ``Query``."""
    if isinstance(queries, str | Mapping):
        one = "text" if isinstance(queries, str) else "row"
        raise UserError(f"The queries must be a list of texts, not one {one}.")
    if not isinstance(queries, Iterable):
        raise UserError(f"The queries must be a list of texts, not {queries!r:.60}.")
    found = []
    for i, query in enumerate(queries, start=1):
        where = f"query {i}"
        if isinstance(query, str):
            row: Mapping[str, Any] = {"query": query}
        else:
            given = isinstance(query, Query)
            row = query.as_row() | {"query": query.text} if given else rows.own(query, where)
        read = _from_dict(row, where)
        found.append(query if isinstance(query, Query) else read)
    return found


def split_queries(
    queries: list[Query], held_out: list[Query] | float, seed: int
) -> tuple[list[Query], list[Query]]:
    """Training and held-out queries.

    Args:
      queries: the user's queries.
      held_out: the held-out ones, or the fraction (0 to 1) of ``queries`` to hold out, at least one.
      seed: seed of the draw.

    Raises:
      UserError: fewer than one query for training or none held out, a query given twice or in both.
    """
    _check_once(queries)
    if isinstance(held_out, list):
        _check_once(held_out)
        train = list(queries)
        known = {normal_form(q.text): q.text for q in train}
        for query in held_out:
            if (twin := known.get(normal_form(query.text))) is not None:
                also = "" if twin == query.text else f" (there as {twin!r})"
                raise UserError(
                    f"The query {query.text!r} is both for training{also} and held out; remove it from one"
                    " of the two, or the report would measure what was trained on."
                )
    else:
        if not 0 < held_out < 1:
            raise UserError(f"The held-out fraction must lie between 0 and 1, not {held_out}.")
        if len(queries) < 2:
            raise UserError(
                f"At least two queries are needed, one to train on and one held out; got {len(queries)}."
            )
        order = random.Random(seed).sample(range(len(queries)), len(queries))
        chosen = set(order[: min(len(queries) - 1, max(1, round(held_out * len(queries))))])
        train = [q for i, q in enumerate(queries) if i not in chosen]
        held_out = [q for i, q in enumerate(queries) if i in chosen]
    if not train or not held_out:
        side = "train on" if not train else "hold out"
        raise UserError(f"There is no query to {side}; give at least one.")
    return train, held_out


def _check_once(queries: list[Query]) -> None:
    seen: dict[str, str] = {}
    for query in queries:
        if (twin := seen.get(form := normal_form(query.text))) is not None:
            also = "" if twin == query.text else f", also as {twin!r}"
            raise UserError(f"The query {query.text!r} is given twice{also}; remove one.")
        seen[form] = query.text


def _from_dict(row: Mapping[str, Any], where: str) -> Query:
    query, answer, expect = row["query"], row.get("answer"), row.get("expect", [])
    if not isinstance(query, str):
        raise UserError(f'{where}: expected {{"query": "..."}}, a text, not {query!r:.60}.')
    if answer is not None and not (isinstance(answer, str) and answer.strip()):
        raise UserError(f"{where}: the answer must be a text that is not empty, not {answer!r:.60}.")
    expect = [expect] if isinstance(expect, str) else expect
    if not (isinstance(expect, list | tuple) and all(isinstance(e, str) and e.strip() for e in expect)):
        raise UserError(f"{where}: expect must be a text, or a list of texts, that a right answer contains.")
    if not query.strip():
        raise UserError(f"{where}: the query is empty.")
    if not isinstance(seed := row.get("seed", ""), str):
        raise UserError(f"{where}: the seed must be a text, not {seed!r}.")
    span = row.get("span")
    if span is not None and not (
        isinstance(span, list | tuple) and len(span) == 2 and all(type(place) is int for place in span)
    ):
        raise UserError(f"{where}: the span must be two whole numbers, not {span!r}.")
    place = None if span is None else (span[0], span[1])
    try:
        return Query(query.strip(), answer and answer.strip(), tuple(expect), seed, place)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
