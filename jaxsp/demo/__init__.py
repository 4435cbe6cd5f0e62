"""The manual that ``jaxsp demo`` compresses, and the questions about it."""

from __future__ import annotations

import importlib.resources

from jaxsp.data.documents import Query, read_context, read_queries


def read() -> tuple[str, list[Query], list[Query]]:
    """The manual, the queries to train on, and those held out.

    Example:
      >>> context, queries, held_out = read()
      >>> held_out[1]
      Query(text='How much does it weigh?', answer=None, expect=('4.5',))
    """
    with importlib.resources.as_file(importlib.resources.files("jaxsp.demo")) as folder:
        queries, held_out = (read_queries(folder / name) for name in ("questions.txt", "held_out.jsonl"))
        return read_context(folder / "manual.md"), queries, held_out
