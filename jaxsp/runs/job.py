"""The rows of a run of many contexts: read and checked before any work is done."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxsp import stages
from jaxsp.data.documents import Query, as_queries, read_text, split_queries
from jaxsp.models.language_model import LanguageModel
from jaxsp.settings import Settings, make_settings
from jaxsp.typing import UserError

_KEYS = ("id", "context", "queries", "held_out")


@dataclasses.dataclass(frozen=True)
class Job:
    """A context to compress.

    Attributes:
      id: names its folder and its row in the table.
      context: the text.
      train: queries to train on.
      held_out: queries to measure on.
      settings: those of the run, but for what the row says otherwise.
      query_lengths: tokens of each query.
      longest: tokens that a query with its answer may take.
    """

    id: str
    context: str
    train: list[Query]
    held_out: list[Query]
    settings: Settings
    query_lengths: tuple[int, ...]
    longest: int

    def encoded(self, model: LanguageModel) -> stages.Task:
        """Its texts as token ids, which take more memory than the texts."""
        return stages.encode_task(model, self.context, self.train, self.held_out, self.settings)


def read_rows(path: str | Path) -> list[tuple[str, Any]]:
    """The rows of a JSONL file, each with where it stands; of one that is no JSON, the error."""
    rows: list[tuple[str, Any]] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                row = UserError(f"not valid JSON ({error})")
            rows.append((f"{path}, line {number}", row))
    return rows


def check_jobs(
    model: LanguageModel, rows: Iterable[tuple[str, Any]], defaults: Mapping[str, Any]
) -> tuple[list[Job], list[str]]:
    """The jobs that can be done, and what is wrong with the other rows, a sentence each.

    Args:
      model: whose tokenizer and window decide what fits.
      rows: mappings with ``id``, ``context``, ``queries``, ``held_out`` (queries, or a fraction; 0.2 if
        absent) and any field of ``Settings``, and where each comes from.
      defaults: settings of the rows that say nothing else.
    """
    jobs: dict[str, Job] = {}
    problems = []
    for where, row in rows:
        try:
            job = _job(model, row, defaults)
            name = job.id.casefold()  # as some file systems see it
            if name in jobs:
                raise UserError(f"the id {job.id!r} is given twice")
            shape = job.settings.batch_shape
            if shape is not None and job.longest > shape[1]:
                raise UserError(
                    f"--batch-shape has rows of {shape[1]} tokens, and a query may take {job.longest}"
                    " with its answer; give it longer ones"
                )
            jobs[name] = job
        except UserError as error:
            problems.append(f"{where}: {str(error).rstrip('.')}.")
    return list(jobs.values()), problems


def _job(model: LanguageModel, row: Any, defaults: Mapping[str, Any]) -> Job:
    if isinstance(row, UserError):
        raise row
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"there is text that is no Unicode ({error.reason})") from error
    if not isinstance(row, Mapping):
        raise UserError(f"expected an object with the keys {', '.join(_KEYS)}; got {row!r:.60}")
    for key in _KEYS[:3]:
        if key not in row:
            raise UserError(f"the key {key!r} is missing")
    name, context, held_out = row["id"], row["context"], row.get("held_out", 0.2)
    good = isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,99}", name)
    if not good or name.casefold().split(".")[0] in ("run", "results"):
        raise UserError(
            f"the id {name!r:.120} can't name a folder here; use up to 100 letters, digits, '.', '-' and"
            " '_', and neither 'run' nor 'results'"
        )
    if not (isinstance(context, str) and context.strip()):
        raise UserError("the context must be a text that is not empty")
    for key in ("queries", "held_out"):
        if key in row and not isinstance(row[key], list | tuple | float | int):
            raise UserError(f"{key} must be a list of queries, not {row[key]!r:.60}")
    if isinstance(row["queries"], float | int):
        raise UserError(f"queries must be a list of queries, not {row['queries']!r}")
    own = {key: value for key, value in row.items() if key not in _KEYS}
    if own.keys() & {"parallel", "mesh"}:
        raise UserError(
            "a row can't have devices of its own; give parallel and mesh for the whole run"
        )
    settings = make_settings({**defaults, **own})
    settings.check()
    if settings.parallel == "pmap":
        raise UserError("many prompts go over devices with --parallel mesh, not pmap")
    train, held_out = split_queries(
        as_queries(row["queries"]),
        float(held_out) if isinstance(held_out, float | int) else as_queries(held_out),
        settings.seed,
    )
    task = stages.encode_task(model, context, train, held_out, settings)
    lengths = tuple(len(ids) for ids in task.query_ids)
    answers = (max(settings.max_answer_tokens, len(given or ())) for given in task.given_ids)
    longest = max(map(sum, zip(lengths, answers, strict=True))) - 1
    return Job(name, context, train, held_out, settings, lengths, longest)
