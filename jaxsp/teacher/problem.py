"""A job as token ids, and with what the teacher said: the problem that a prompt is trained on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxsp import processes
from jaxsp.data.documents import Query
from jaxsp.data.examples import Rows, joined, make_rows
from jaxsp.data.packing import Packing
from jaxsp.models import decoder
from jaxsp.models.chat import ChatTexts, encode
from jaxsp.models.decoder import OutputHead
from jaxsp.models.language_model import LanguageModel
from jaxsp.progress import Display
from jaxsp.settings import Settings, TeacherSettings, plain
from jaxsp.teacher import targets
from jaxsp.teacher.answers import answer_ids
from jaxsp.teacher.signals import SIGNALS
from jaxsp.typing import Bool, Int, KeyValues, UserError

Reader = Literal["model", "teacher", "student"]
"""A model that teaches itself; or one of two: the student, to which another is the teacher, need not have
room for the context."""


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedJob:
    """The texts of a job as token ids; N queries.

    Attributes:
      chat: the texts around the context and the query.
      preamble_ids: what stands before the context.
      context_ids: ``[C]``.
      queries: as texts.
      is_train: ``[N]`` True for those to train on, False for those held out.
      query_ids: token ids of each query, up to where the answer starts.
      given_ids: token ids of the user's own answers, where there are any.
    """

    chat: ChatTexts
    preamble_ids: Int[np.ndarray, " p"]
    context_ids: Int[np.ndarray, " c"]
    queries: list[Query]
    is_train: Bool[np.ndarray, " n"]
    query_ids: list[list[int]]
    given_ids: list[list[int] | None]

    def held_out(self, things: Sequence[Any]) -> list[Any]:
        """The things of the held-out queries, out of one for each query."""
        return [thing for thing, train in zip(things, self.is_train, strict=True) if not train]

    def fits(self, window: int, settings: TeacherSettings) -> bool:
        """Whether a window has room for the whole context with a query and its answer."""
        return len(self.preamble_ids) + len(self.context_ids) + self.longest(settings) < window

    def longest(self, settings: TeacherSettings) -> int:
        """Tokens that a query with its answer may take."""
        room = (max(settings.max_answer_tokens, len(given or ())) for given in self.given_ids)
        lengths = (len(ids) for ids in self.query_ids)
        return max(map(sum, zip(lengths, room, strict=True))) - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A job with the teacher's outputs.

    Attributes:
      job: what was asked.
      preamble: the prefix before the context, and before σ.
      rows: all queries with their answers and targets, in the order of the job's.
      answers: the teacher's own answer to each query, as token ids.
      teacher_head: head of the teacher, if it is another model.
      packing: shape of the batches in which all rows are read once.
    """

    job: TokenizedJob
    preamble: KeyValues
    rows: Rows
    answers: list[list[int]]
    teacher_head: OutputHead | None = None

    @property
    def has_other_teacher(self) -> bool:
        """Whether another model is the teacher: one with its own head, or one that gave its answers alone."""
        return self.teacher_head is not None or "hidden" not in self.rows.targets

    @property
    def packing(self) -> Packing:
        return Packing.for_all(self.rows.lengths)

    def take(self, index: Sequence[int], train: int | None = None) -> Problem:
        """The problem of these queries, in their order.

        Args:
          index: numbers of the queries.
          train: how many of them, the first ones, are to train on; by default those that were.
        """
        job = self.job

        def some(things: Sequence[Any]) -> list[Any]:
            return [things[i] for i in index]

        is_train = job.is_train[list(index)] if train is None else np.arange(len(index)) < train
        queries, query_ids, given_ids = some(job.queries), some(job.query_ids), some(job.given_ids)
        job = dataclasses.replace(
            job, queries=queries, is_train=is_train, query_ids=query_ids, given_ids=given_ids
        )
        rows = self.rows.take(index)
        return dataclasses.replace(self, job=job, rows=rows, answers=some(self.answers))

    @classmethod
    def joined(cls, parts: Sequence[Problem]) -> Problem:
        """The problem of all queries of several on one context, those of the first one first."""
        jobs = [part.job for part in parts]
        job = dataclasses.replace(
            jobs[0],
            queries=[query for job in jobs for query in job.queries],
            is_train=np.concatenate([job.is_train for job in jobs]),
            query_ids=[ids for job in jobs for ids in job.query_ids],
            given_ids=[ids for job in jobs for ids in job.given_ids],
        )
        answers = [answer for part in parts for answer in part.answers]
        return cls(job, parts[0].preamble, joined([part.rows for part in parts]), answers)

    @property
    def train(self) -> Rows:
        """The rows to train on."""
        return self.rows.take(np.flatnonzero(self.job.is_train))

    @property
    def held_out(self) -> Rows:
        """The rows to measure on."""
        return self.rows.take(np.flatnonzero(~self.job.is_train))


def tokenize(
    model: LanguageModel,
    context: str,
    train: Sequence[Query],
    held_out: Sequence[Query],
    settings: Settings,
    *,
    reader: Reader = "model",
) -> TokenizedJob:
    """The job as token ids.

    Args:
      model: whose tokenizer and window these are.
      context: the text.
      train: queries to train on.
      held_out: queries to measure on.
      settings: settings of the compression.
      reader: what the model is.

    Raises:
      UserError: it fits neither the model's window nor the prompt.
    """
    queries = [*train, *held_out]
    context_ids = model.encode_context(context)
    query_ids = [model.encode_query(query.text).tolist() for query in queries]
    tokenizer: Any = model.tokenizer
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    given_ids = [
        None if q.answer is None else [*encode(tokenizer, q.answer, control=False), *end] for q in queries
    ]
    for ids in filter(None, given_ids):
        model.check_ids(ids)
    room = max(settings.teacher.max_answer_tokens, *(len(ids or ()) for ids in given_ids))
    longest, preamble = max(map(len, query_ids)), len(model.preamble_ids)
    first, read = "context", len(context_ids)
    if reader == "student":
        reader, first, read = "model", "prompt", settings.prompt.prompt_length
    needed = preamble + read + longest + room
    if needed > model.config.window:
        shorten = f"Shorten the {first}" + (" (--prompt-length) or the queries" if first == "prompt" else "")
        raise UserError(
            f"The {first} has {read} tokens; with the chat's text ({preamble}),"
            f" the longest query ({longest}) and the answer ({room}) that is {needed}, more than the"
            f" {reader}'s window of {model.config.window}. {shorten}."
        )
    if not settings.prompt.prompt_length < len(context_ids):
        raise UserError(
            f"The prompt must be shorter than the context: --prompt-length is"
            f" {settings.prompt.prompt_length}, the context has {len(context_ids)} tokens."
        )
    is_train = np.arange(len(queries)) < len(train)
    return TokenizedJob(model.chat, model.preamble_ids, context_ids, queries, is_train, query_ids, given_ids)


def read_preamble(model: LanguageModel) -> KeyValues:
    """The prefix before the context."""
    return decoder.read_long(model.params, model.config, model.preamble_ids[None])


def teacher_key(model: LanguageModel, job: TokenizedJob, settings: TeacherSettings) -> str:
    """Equal where the teacher says the same: of its weights, the texts, and all of its settings."""
    texts = job.preamble_ids.tolist(), job.context_ids.tolist(), job.query_ids, job.given_ids
    return digest((model.fingerprint, model.config.dtype, *texts, plain(settings)))


def digest(value: Any) -> str:
    """A short text, equal for values that are written alike."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def run_teacher(
    model: LanguageModel,
    job: TokenizedJob,
    settings: TeacherSettings,
    preamble: KeyValues,
    display: Display,
    file: Path | None = None,
) -> Problem:
    """The teacher's answers and signals; those kept in ``file`` are read, new ones kept there.

    Several processes share the work: each answers every n-th query.
    """
    if file is not None and file.is_file():
        return Problem(job, preamble, *targets.read(file))
    count = len(job.queries)
    # What the document itself answers, nobody compares with the teacher's own words.
    known = {i: ids for i, ids in enumerate(job.given_ids) if ids is not None and job.queries[i].seed}
    open_ones = [i for i in range(count) if i not in known]
    with display.phase("answers", f"Answers to {len(open_ones)} queries") as note:
        context = decoder.read_long(model.params, model.config, job.context_ids[None], preamble)
        made = answer_ids(
            model,
            context,
            [job.query_ids[open_ones[i]] for i in processes.strided_shard(len(open_ones))],
            max_tokens=settings.max_answer_tokens,
            on_batch=lambda done: note(f"{done} done"),
        )
        made = processes.gather_strided(made, len(open_ones))
        found = known | dict(zip(open_ones, made, strict=True))
        answers = [found[i] for i in range(count)]
    with display.phase("signals", "Teacher's distributions"):
        pairs = zip(job.given_ids, answers, strict=True)
        rows = make_rows(job.query_ids, [given or own for given, own in pairs])
        own, packing = rows.take(processes.strided_shard(count)), Packing.for_all(rows.lengths)
        for name in SIGNALS:
            signal = targets.compute(model, context, own, packing, name)
            whole = jax.tree.map(lambda leaf: processes.gather_strided(leaf, count), signal)
            rows = rows.with_targets(**{name: whole})
    problem = Problem(job, preamble, rows, answers)
    if file is not None and processes.is_first():
        keep(problem, file)
    return problem


def keep(problem: Problem, file: Path) -> None:
    """Keeps what the teacher said, for ``run_teacher`` to read."""
    file.parent.mkdir(parents=True, exist_ok=True)
    targets.write(file, problem.rows, problem.answers)
