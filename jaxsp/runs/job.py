"""The rows of a run of many contexts: read and checked before any work is done."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsp.data.documents import Query, as_queries, read_text, split_queries
from jaxsp.files import parse_json
from jaxsp.losses import as_objective
from jaxsp.models.language_model import LanguageModel
from jaxsp.prompts import PROMPT_KINDS, low_rank, storage, with_defaults
from jaxsp.prompts.initializers import INITIALIZERS, check_vectors
from jaxsp.runs import on_policy
from jaxsp.settings import Settings, decides_result, make_settings, side_by_side
from jaxsp.study.text import sentences
from jaxsp.teacher import samples
from jaxsp.teacher.another import Teacher
from jaxsp.teacher.problem import SAMPLE, TokenizedJob, digest, tokenize
from jaxsp.training.drivers import DRIVERS
from jaxsp.training.evolution import Evolution
from jaxsp.training.optimizers import check_rates, make_optimizer
from jaxsp.typing import UserError

BESIDE_GIVEN = True
"""Whether ``study="auto"`` also adds to the user's own queries what they don't ask for."""

_KEYS = ("id", "context", "queries", "held_out")


ALIKE = 1.25
"""Prompts train side by side if their batches differ in tokens by this factor at most: more is padding."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A context to compress.

    Attributes:
      id: names its folder and its row in the table.
      context: the text.
      train: queries to train on; none where the document is to give all.
      held_out: queries to measure on; none as well.
      settings: those of the run, but for what the row says otherwise.
      tokens: tokens of a query with its answer, about, as far as is known before the teacher speaks.
    """

    id: str
    context: str
    train: list[Query]
    held_out: list[Query]
    settings: Settings
    tokens: float

    @property
    def is_studied(self) -> bool:
        """Whether the document gives queries, or may."""
        study = self.settings.study.study
        return not self.train or study == "on" or (study == "auto" and BESIDE_GIVEN)

    def tokenized(self, model: LanguageModel) -> TokenizedJob:
        """Its texts as token ids, which take more memory than the texts."""
        return tokenize(model, self.context, self.train, self.held_out, self.settings)

    def identity(self, model: LanguageModel, teacher: Teacher | None = None) -> dict[str, Any]:
        """Everything that decides the result: a resumed run must have the same."""
        return {
            **decides_result(self.settings),
            **model_identity(model, teacher),
            "context": digest(model.encode_context(self.context).tobytes()),
            "queries": digest([dataclasses.astuple(query) for query in self.train]),
            "held_out": digest([dataclasses.astuple(query) for query in self.held_out]),
        }


def groups(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """The jobs that can train side by side, in their order, each group by a key that names its checkpoints.

    One compiled update serves a group, in batches of one shape: so a group's own batches are of like size.
    """
    found: dict[str, list[Job]] = {}
    alike: dict[tuple, list[Job]] = {}
    for job in jobs:
        alike.setdefault(side_by_side(job.settings), []).append(job)
    for shared, some in alike.items():
        sizes = sorted({job.tokens for job in some})
        starts = [sizes[0]]  # of each group
        for size in sizes:
            if size > ALIKE * starts[-1]:
                starts.append(size)
        for start, end in itertools.pairwise([*starts, math.inf]):
            key = digest([str(shared), start])
            found[key] = [job for job in some if start <= job.tokens < end]
    return found


def model_identity(model: LanguageModel, teacher: Teacher | None = None) -> dict[str, Any]:
    """The model, its weights, their dtype and its chat; the same of its teacher, if that is another."""
    chat = {"chat_options": dataclasses.asdict(model.chat_options), "chat": dataclasses.asdict(model.chat)}
    config = model.config
    found = {"model": model.short_name, "weights": model.fingerprint, "decoder": config.identity}
    found |= {"dtype": config.dtype, **chat}
    return found | (teacher.identity if teacher else {})


def check_settings(settings: Settings) -> None:
    """Raises ``UserError`` on a name that is in none of the tables, or on parts that don't fit together."""
    by_gradient = not isinstance(make_optimizer(settings.training), Evolution)
    as_objective(settings.training.objective, by_gradient=by_gradient)
    on_policy.check(settings)
    samples.count(settings.teacher)
    for name, value, table in (
        ("kind", settings.prompt.kind, PROMPT_KINDS),
        ("initial", settings.prompt.initial, INITIALIZERS),
        ("artifact dtype", settings.prompt.artifact_dtype, storage.DTYPES),
        ("parallel", settings.devices.parallel, DRIVERS),
        ("keep", settings.training.keep, ("best", "last")),
        ("study", settings.study.study, ("auto", "on", "off")),
    ):
        if value is not None and value not in table:
            raise UserError(f"Unknown {name} {value!r}; choose one of {', '.join(table)}.")
    prompt = settings.prompt
    if prompt.rank is not None and prompt.kind != "low_rank":
        raise UserError(f"--rank {prompt.rank} is for --kind low_rank, not {prompt.kind}.")
    if prompt.rank is not None and prompt.rank > prompt.prompt_length:
        raise UserError(
            f"--rank must be at most the number of slots (--prompt-length {prompt.prompt_length}), not"
            f" {prompt.rank}."
        )
    filled = with_defaults(settings)
    if PROMPT_KINDS[prompt.kind].IS_READ and filled.prompt.initial is not None:
        check_vectors(filled.prompt.initial)
    chosen = filled.training
    if chosen.steps is None:
        raise UserError(f"The kind {prompt.kind} has no number of steps of its own; give --steps.")
    make_optimizer(chosen)
    check_rates(settings)
    if settings.devices.mesh and settings.devices.parallel != "mesh":
        raise UserError(
            f"--mesh {settings.devices.mesh} needs --parallel mesh, not {settings.devices.parallel}."
        )


def read_rows(path: str | Path) -> list[tuple[str, Any]]:
    """The rows of a JSONL file, each with where it stands; of one that is no JSON, the error."""
    rows: list[tuple[str, Any]] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                row = parse_json(line, path, object)
            except UserError as error:
                row = UserError(str(error).removeprefix(f"{path}: "))
            rows.append((f"{path}, line {number}", row))
    return rows


def check_jobs(
    model: LanguageModel,
    rows: Iterable[tuple[str, Any]],
    defaults: Mapping[str, Any],
    teacher: Teacher | None = None,
) -> tuple[list[Job], list[str]]:
    """The jobs that can be done, and what is wrong with the other rows, a sentence each.

    Args:
      model: whose tokenizer and window decide what fits.
      rows: mappings with ``id``, ``context``, ``queries``, ``held_out`` (queries, or a fraction; 0.2 if
        absent) and any field of ``Settings``, and where each comes from.
      defaults: settings of the rows that say nothing else.
      teacher: the teacher, if it is another model.
    """
    jobs: dict[str, Job] = {}
    problems = []
    for where, row in rows:
        try:
            job = make_job(model, row, defaults, teacher)
            name = job.id.casefold()  # as some file systems see it
            if name in jobs:
                raise UserError(f"the id {job.id!r} is given twice")
            jobs[name] = job
        except UserError as error:
            problems.append(f"{where}: {str(error).rstrip('.')}.")
    return list(jobs.values()), problems


def make_job(
    model: LanguageModel, row: Any, defaults: Mapping[str, Any], teacher: Teacher | None = None
) -> Job:
    """The job of one row; raises ``UserError`` with what is wrong with it."""
    if isinstance(row, UserError):
        raise row
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"there is text that is no Unicode ({error.reason})") from error
    if not isinstance(row, Mapping):
        raise UserError(f"expected an object with the keys {', '.join(_KEYS)}; got {row!r:.60}")
    for key in _KEYS[:2]:
        if key not in row:
            raise UserError(f"the key {key!r} is missing")
    name, context, queries = row["id"], row["context"], row.get("queries", [])
    held_out = row.get("held_out", 0.2)
    good = isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,99}", name)
    if not good or name.casefold().split(".")[0] in ("run", "results"):
        raise UserError(
            f"the id {name!r:.120} can't name a folder here; use up to 100 letters, digits, '.', '-' and"
            " '_', and neither 'run' nor 'results'"
        )
    if not (isinstance(context, str) and context.strip()):
        raise UserError("the context must be a text that is not empty")
    for key, kinds in {"queries": list | tuple, "held_out": list | tuple | float | int}.items():
        if key in row and not isinstance(row[key], kinds):
            raise UserError(f"{key} must be a list of queries, not {row[key]!r:.60}")
    own = {key: value for key, value in row.items() if key not in _KEYS}
    if own.keys() & {"parallel", "mesh"}:
        raise UserError("a row can't have devices of its own; give parallel and mesh for the whole run")
    if "teacher" in own:
        raise UserError("a row can't have a teacher of its own; give teacher for the whole run")
    settings = make_settings({**defaults, **own})
    check_settings(settings)
    settings, config = with_defaults(settings), model.config
    if settings.prompt.rank is not None:
        entries = config.kv_heads * config.head_width
        low_rank.check_rank(settings.prompt.rank, settings.prompt.prompt_length, entries)
    train, held_out = _split(queries, held_out, settings)
    if not train and not sentences(context):
        raise UserError("the document has no sentence to ask about; give queries of your own (--queries)")
    if settings.study.study != "on":
        on_policy.check(settings, train)
    texts = context, train or [SAMPLE], held_out, settings
    tokenized = tokenize(model, *texts)
    if not settings.prompt.prompt_length < (tokens := len(tokenized.context_ids)):
        raise UserError(
            f"The prompt must be shorter than the context: --prompt-length is"
            f" {settings.prompt.prompt_length}, the context has {tokens} tokens."
        )
    if teacher is not None:
        teacher.check(settings)
        try:
            tokenize(teacher.model, *texts)
        except UserError as error:
            raise UserError(f"The teacher {teacher.model.name}: {error}") from None
    usual = settings.teacher.max_answer_tokens / 2
    answers = [usual if ids is None else len(ids) for ids in tokenized.given_ids]
    tokens = float(np.mean([*map(len, tokenized.query_ids)]) + np.mean(answers))
    return Job(name, context, train, held_out, settings, tokens)


def _split(queries: Any, held_out: Any, settings: Settings) -> tuple[list[Query], list[Query]]:
    """Queries to train on and to measure on, as far as the user gives them."""
    given, fraction = as_queries(queries), isinstance(held_out, float | int)
    if given or settings.study.study == "off":
        held_out = float(held_out) if fraction else as_queries(held_out)
        return split_queries(given, held_out, settings.training.seed)
    if fraction:
        return [], []
    return [], split_queries([Query("")], as_queries(held_out), 0)[1]
