"""Reading what the user gives: a context, and queries with or without answers."""

from __future__ import annotations

import dataclasses
import random
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsp.files import as_path, parse_json
from jaxsp.typing import UserError


@dataclasses.dataclass(frozen=True)
class Query:
    """An input z.

    Attributes:
      text: the query.
      answer: to train towards, if the user gives one (else the teacher's).
      expect: texts that a right answer contains, where that is known; the report counts them.
      seed: form in which the document itself gave it (see ``jaxsp.study``); empty for the user's own.
      span: start and end, in the document, of what it was made from; ``None`` for the user's own.
    """

    text: str
    answer: str | None = None
    expect: tuple[str, ...] = ()
    seed: str = dataclasses.field(default="", repr=False)
    span: tuple[int, int] | None = dataclasses.field(default=None, repr=False)

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
      UserError: the file is missing, unreadable, empty, binary or not UTF-8.
    """
    name = "standard input" if str(path) == "-" else str(path)
    try:
        if str(path) == "-":
            given = sys.stdin.buffer if hasattr(sys.stdin, "buffer") else sys.stdin  # a notebook has none
            data = text.encode() if isinstance(text := given.read(), str) else text
        else:
            data = as_path(path, "The file").read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"There is no file {name}.") from error
    except OSError as error:
        raise UserError(f"{name} can't be read ({error.strerror}).") from error
    if b"\0" in data:
        raise UserError(f"{name} is a binary file; give plain text in UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start}); convert it first.") from error
    if not text.strip():
        raise UserError(f"{name} is empty.")
    return text


def read_context(path: str | Path) -> str:
    """The context of a ``.txt`` or ``.md`` file or of standard input (``-``), stripped at its ends."""
    return read_text(path).strip()


def read_queries(path: str | Path) -> list[Query]:
    """Queries from a file: one per line, or JSONL ``{"query": ..., "answer": ..., "expect": [...]}``.

    A file is JSONL if its name ends in ``.jsonl`` or its first character is ``{``. Blank lines are
    passed over.

    Raises:
      UserError: the file can't be read, a JSONL line is malformed (the line is named), or a query
        occurs twice.
    """
    text = read_text(path)
    jsonl = str(path).endswith(".jsonl") or text.lstrip().startswith("{")
    numbered = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not jsonl:
        return [Query(line.strip()) for _, line in numbered]
    lines = [(f"{path}, line {i}", line) for i, line in numbered]
    return [_from_dict(parse_json(line, where, object), where) for where, line in lines]


def as_queries(queries: Sequence[str | Query | Mapping[str, str]]) -> list[Query]:
    """Queries in any form the Python interface takes: strings, dicts with ``query``, or ``Query``."""
    if isinstance(queries, str):
        raise UserError("The queries must be a list of texts, not one text.")
    if not isinstance(queries, Iterable):
        raise UserError(f"The queries must be a list of texts, not {queries!r:.60}.")
    found = []
    for i, query in enumerate(queries, start=1):
        row = {"query": query} if isinstance(query, str) else query
        read = _from_dict(row.as_row() if isinstance(row, Query) else row, f"query {i}")
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


def _from_dict(row: object, where: str) -> Query:
    if not isinstance(row, dict) or not isinstance(row.get("query"), str):
        raise UserError(f'{where}: expected {{"query": "...", "answer": "..." (optional)}}.')
    answer = row.get("answer")
    if answer is not None and not (isinstance(answer, str) and answer.strip()):
        raise UserError(f"{where}: the answer must be a text that is not empty.")
    expect = row.get("expect", [])
    expect = [expect] if isinstance(expect, str) else expect
    if not (isinstance(expect, list | tuple) and all(isinstance(e, str) and e.strip() for e in expect)):
        raise UserError(f"{where}: expect must be a text, or a list of texts, that a right answer contains.")
    if unknown := sorted(set(row) - {"query", "answer", "expect", "seed", "span"}):
        keys = "query, answer, expect, seed and span"
        raise UserError(f"{where}: unknown key {unknown[0]!r}; the keys are {keys}.")
    if not row["query"].strip():
        raise UserError(f"{where}: the query is empty.")
    if not isinstance(seed := row.get("seed", ""), str):
        raise UserError(f"{where}: the seed must be a text, not {seed!r}.")
    span = row.get("span")
    if span is not None and not (
        isinstance(span, list | tuple) and len(span) == 2 and all(type(place) is int for place in span)
    ):
        raise UserError(f"{where}: the span must be two whole numbers, not {span!r}.")
    own = None if span is None else (span[0], span[1])
    return Query(row["query"].strip(), answer and answer.strip(), tuple(expect), seed, own)
