"""A job as token ids, and with what the teacher said: the problem that a prompt is trained on."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsp import processes
from jaxsp.data.documents import Query
from jaxsp.data.examples import Rows, joined, make_rows
from jaxsp.data.packing import Packing
from jaxsp.data.parts import Part, check_length, cut, search
from jaxsp.models import decoder
from jaxsp.models.chat import ChatTexts
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.output_head import OutputHead
from jaxsp.progress import Display
from jaxsp.settings import Settings, TeacherSettings
from jaxsp.teacher import targets
from jaxsp.teacher.answers import answer_ids
from jaxsp.teacher.keys import (
    digest as digest,
    identity as identity,
    said_key as said_key,
    teacher_key as teacher_key,
)
from jaxsp.teacher.signals import SIGNALS, USUAL, Wanted
from jaxsp.teacher.store import Store, about
from jaxsp.typing import Bool, Int, KeyValues, UserError

QUERY_TOKENS = 128
"""Tokens of a query that the parts of a long document leave room for at least, in a window of four times as
many: the cut does not depend on the queries that the document then gives."""

FEWEST = 16
"""Tokens of a part that there must be room for."""

SAMPLE = Query("What does the text say?", seed="question")
"""A query such as the document gives, in place of those that are not yet made."""


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedJob:
    """The texts of a job as token ids; N queries.

    Attributes:
      chat: the texts around the context and the query.
      preamble_ids: what stands before the context.
      context_ids: ``[C]`` of the whole context.
      parts: the parts of the context that the teacher reads; one, if the window has room for all of it.
      part_of: ``[N]`` the part that each query is taught by: the one that it was made from, or else the one
        found by its words.
      found: ``[N]`` the part found by each query's words.
      queries: as texts.
      is_train: ``[N]`` True for those to train on, False for those held out.
      query_ids: token ids of each query, up to where the answer starts.
      given_ids: token ids of the user's own answers, where there are any.
    """

    chat: ChatTexts
    preamble_ids: Int[np.ndarray, " p"]
    context_ids: Int[np.ndarray, " c"]
    parts: list[Part]
    part_of: Int[np.ndarray, " n"]
    found: Int[np.ndarray, " n"]
    queries: list[Query]
    is_train: Bool[np.ndarray, " n"]
    query_ids: list[list[int]]
    given_ids: list[list[int] | None]

    def part(self, query: int) -> Part:
        """The part of the context that a query is taught by."""
        return self.parts[self.part_of[query]]

    @property
    def longest_part(self) -> Part:
        """The part with most tokens."""
        return max(self.parts, key=lambda part: len(part.ids))

    def take(self, index: Sequence[int], train: int | None = None) -> TokenizedJob:
        """The job of these queries, in their order: see ``Problem.take``."""
        numbers = np.asarray(index, int)

        def some(things: Sequence[Any]) -> list[Any]:
            return [things[i] for i in index]

        return dataclasses.replace(
            self,
            part_of=self.part_of[numbers],
            found=self.found[numbers],
            queries=some(self.queries),
            is_train=self.is_train[numbers] if train is None else np.arange(len(index)) < train,
            query_ids=some(self.query_ids),
            given_ids=some(self.given_ids),
        )

    def held_out(self, things: Sequence[Any]) -> list[Any]:
        """The things of the held-out queries, out of one for each query."""
        return [thing for thing, train in zip(things, self.is_train, strict=True) if not train]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A job with the teacher's outputs.

    Attributes:
      job: what was asked.
      preamble: the prefix before the context, and before σ.
      rows: all queries with their answers and targets, in the order of the job's.
      answers: the teacher's own answer to each query, as token ids.
      teacher_head: head of the teacher, if it is another model.
      teacher_job: the same queries with the context as the teacher read it, if it is another model.
      samples: more rows to train on: queries of the job with other answers of the teacher (``samples.py``).
      wanted: the signals that the rows have.
      packing: shape of the batches in which all rows are read once.
    """

    job: TokenizedJob
    preamble: KeyValues
    rows: Rows
    answers: list[list[int]]
    teacher_head: OutputHead | None = None
    teacher_job: TokenizedJob | None = None
    samples: Problem | None = None
    wanted: Wanted = USUAL

    @property
    def read(self) -> TokenizedJob:
        """The job as the teacher read it."""
        return self.teacher_job or self.job

    @property
    def has_other_teacher(self) -> bool:
        """Whether another model is the teacher: one with its own head, or one that gave its answers alone."""
        return self.teacher_job is not None

    @property
    def packing(self) -> Packing:
        return Packing.for_all(self.rows.lengths)

    def take(self, index: Sequence[int], train: int | None = None) -> Problem:
        """The problem of these queries, in their order, without samples.

        Args:
          index: numbers of the queries.
          train: how many of them, the first ones, are to train on; by default those that were.
        """
        return dataclasses.replace(
            self,
            job=self.job.take(index, train),
            rows=self.rows.take(index),
            answers=[self.answers[i] for i in index],
            teacher_job=self.teacher_job and self.teacher_job.take(index, train),
            samples=None,
        )

    @classmethod
    def joined(cls, several: Sequence[Problem]) -> Problem:
        """The problem of all queries of several on one context with one teacher, the first one's first."""
        jobs = [problem.job for problem in several]
        job = dataclasses.replace(
            jobs[0],
            queries=[query for job in jobs for query in job.queries],
            is_train=np.concatenate([job.is_train for job in jobs]),
            query_ids=[ids for job in jobs for ids in job.query_ids],
            given_ids=[ids for job in jobs for ids in job.given_ids],
            part_of=np.concatenate([job.part_of for job in jobs]),
            found=np.concatenate([job.found for job in jobs]),
        )
        answers = [answer for problem in several for answer in problem.answers]
        rows = joined([problem.rows for problem in several])
        return dataclasses.replace(several[0], job=job, rows=rows, answers=answers)

    @property
    def train(self) -> Rows:
        """The rows to train on, one a query, and then the samples."""
        rows = self.some(np.flatnonzero(self.job.is_train))
        return joined([rows, self.samples.train]) if self.samples else rows

    @property
    def train_part_of(self) -> Int[np.ndarray, " n"]:
        """The part that each of these rows is taught by."""
        more = [self.samples.job.part_of] if self.samples else []
        return np.concatenate([self.job.part_of[self.job.is_train], *more])

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """Tokens of all rows, those of samples last."""
        return np.concatenate([self.rows.lengths, *([self.samples.rows.lengths] if self.samples else [])])

    @property
    def held_out(self) -> Rows:
        """The rows to measure on."""
        return self.some(np.flatnonzero(~self.job.is_train))

    def some(self, index: Sequence[int] | np.ndarray) -> Rows:
        """The rows of some queries, all to train on or none, with the signals that these have."""
        is_train = self.job.is_train[np.asarray(index, int)]
        there = {"tokens", *self.wanted.rows(is_train)}
        targets = {name: target for name, target in self.rows.targets.items() if name in there}
        return dataclasses.replace(self.rows, targets=targets).take(index)


def tokenize(
    model: LanguageModel,
    context: str,
    train: Sequence[Query],
    held_out: Sequence[Query],
    settings: Settings,
    parts: list[Part] | None = None,
) -> TokenizedJob:
    """The job as token ids.

    Args:
      model: whose tokenizer and window these are.
      context: the text.
      train: queries to train on.
      held_out: queries to measure on.
      settings: settings of the compression.
      parts: parts of the context, where it is cut already.

    Raises:
      UserError: its queries and answers don't fit the model's window, or the context is too long for any run.
    """
    check_length(context)
    queries = [*train, *held_out]
    context_ids = model.encode_context(context)
    query_ids = [model.encode_query(query.text).tolist() for query in queries]
    given_ids = [None if q.answer is None else model.encode_answer(q.answer).tolist() for q in queries]
    parts = parts or _parts(model, context, context_ids, queries, query_ids, given_ids, settings.teacher)
    read = len(model.preamble_ids) + max(len(part.ids) for part in parts)
    for query, ids, given in zip(queries, query_ids, given_ids, strict=True):
        needed = read + len(ids) + max(settings.teacher.max_answer_tokens, len(given or ()) - 1)
        if needed > model.config.window:
            raise UserError(
                f"The query {query.text!r:.60}, its answer and what is before it take {needed} tokens, more"
                f" than the model's window of {model.config.window}. Shorten it, or leave it out."
            )
    is_train = np.arange(len(queries)) < len(train)
    found = search([part.text for part in parts], [query.text for query in queries])
    part_of = np.array(
        [_part_of(parts, query, own) for query, own in zip(queries, found.tolist(), strict=True)], np.int64
    )
    return TokenizedJob(
        model.chat, model.preamble_ids, context_ids, parts, part_of, found, queries, is_train, query_ids,
        given_ids,
    )  # fmt: skip


def _parts(
    model: LanguageModel,
    context: str,
    context_ids: Int[np.ndarray, " c"],
    queries: Sequence[Query],
    query_ids: Sequence[Sequence[int]],
    given_ids: Sequence[Sequence[int] | None],
    settings: TeacherSettings,
) -> list[Part]:
    """The context as the window has room for it beside the longest query with its answer.

    Queries that the document gives change nothing: the study leaves out those that there is no room for.
    """
    users = [i for i, query in enumerate(queries) if not query.seed]
    # The last token of an answer is predicted, never read.
    room = max([settings.max_answer_tokens, *(len(given_ids[i] or ()) - 1 for i in users)])
    lengths = [len(query_ids[i]) for i in users]
    if len(users) < len(queries):
        lengths.append(len(model.encode_query(SAMPLE.text)))
    longest, preamble, window = max(lengths), len(model.preamble_ids), model.config.window
    left, most = window - preamble - room, settings.teacher_context or window
    if len(context_ids) <= min(most, left - longest):
        return [Part(0, len(context), context, context_ids)]
    most = min(most, left - max(longest, min(QUERY_TOKENS, window // 4)))
    if most < FEWEST:
        raise UserError(
            f"The chat's text ({preamble} tokens), the longest query ({longest}) and the answer ({room})"
            f" leave no room for the context in the model's window of {window}. Shorten the query, or the"
            " answer with --max-answer-tokens."
        )
    return cut(context, most, model.encode_context)


def _part_of(parts: Sequence[Part], query: Query, found: int) -> int:
    """The part that has most of what a query was made from; the one found, if that is not known."""
    if query.span is None:
        return found
    shared = [part.shared(query.span) for part in parts]
    return int(np.argmax(shared)) if any(shared) else found


def read_preamble(model: LanguageModel) -> KeyValues:
    """The prefix before the context."""
    return decoder.read_long(model.params, model.config, model.preamble_ids[None])


def read_part(model: LanguageModel, job: TokenizedJob, part: int, preamble: KeyValues) -> KeyValues:
    """The prefix that a part of the context is."""
    ids, least = job.parts[part].ids[None], len(job.longest_part.ids)
    return decoder.read_long(model.params, model.config, ids, preamble, least=least)


def run_teacher(
    model: LanguageModel,
    job: TokenizedJob,
    settings: TeacherSettings,
    preamble: KeyValues,
    display: Display,
    store: Store | None = None,
    wanted: Wanted = USUAL,
    answers: list[list[int]] | None = None,
) -> Problem:
    """The teacher's answers and signals; those in the store are read, new ones kept there as they come.

    Several processes share the work: each answers every n-th query.

    Args:
      model: the teacher.
      job: what it is asked.
      settings: its settings.
      preamble: its prefix before the context.
      display: shows that it goes on.
      store: where all is kept.
      wanted: what it is to say; by default its last hidden states everywhere.
      answers: its own, where they are known; by default those that all runs share, of its last hidden states.
    """
    store = store or Store(None)
    usual = teacher_key(model, job, settings)
    key = said_key(usual, job, wanted)
    if (kept := store.read(key, _read(job, wanted), "Teacher's answers and signals")) is not None:
        return Problem(job, preamble, *kept, wanted=wanted)
    if answers is None and key != usual:
        known = store.shared_alone.read(usual, _read(job, USUAL), "Teacher's answers")
        answers = known and known[1]
    prefix = functools.lru_cache(maxsize=1)(lambda part: read_part(model, job, part, preamble))
    if answers is None:
        answers = _answers(model, job, settings, prefix, display)
    rows = _rows(job, answers)
    places = wanted.rows(job.is_train)

    def said() -> Iterator[targets.Said]:
        return targets.by_part(model, prefix, len(job.parts), job.part_of, rows, wanted, places)

    with display.phase("signals", "Teacher's distributions"):
        problem, several = Problem(job, preamble, rows, answers, wanted=wanted), processes.are_several()
        if not several and (kept := keep(store, key, model, problem, said)) is not None:
            return kept
        found = targets.gathered(targets.in_order(said()), rows, places)
        problem = dataclasses.replace(problem, rows=rows.with_targets(**found))
    if several and processes.is_first():
        keep(store, key, model, problem)
    return problem


def _answers(
    model: LanguageModel,
    job: TokenizedJob,
    settings: TeacherSettings,
    prefix: Callable[[int], KeyValues],
    display: Display,
) -> list[list[int]]:
    """The teacher's own answers; ``prefix`` gives that of a part of the context."""
    count = len(job.queries)
    # What the document itself answers, nobody compares with the teacher's own words.
    known = {i: ids for i, ids in enumerate(job.given_ids) if ids is not None and job.queries[i].seed}
    if not (open_ones := [i for i in range(count) if i not in known]):
        return [known[i] for i in range(count)]
    own = [open_ones[i] for i in processes.strided_shard(len(open_ones))]
    with display.phase("answers", f"Answers to {len(open_ones)} queries") as note:
        made, done = dict[int, list[int]](), itertools.count(1)
        for part in range(len(job.parts)):
            some = [i for i in own if job.part_of[i] == part]
            if not some and (own or part > 0):
                continue  # a process without queries joins in what all do
            answered = answer_ids(
                model,
                prefix(part),
                [job.query_ids[i] for i in some],
                max_tokens=settings.max_answer_tokens,
                on_batch=lambda _: note(f"{next(done)} done"),
            )
            made |= zip(some, answered, strict=True)
        gathered = processes.gather_strided([made[i] for i in sorted(made)], len(open_ones))
        found = known | dict(zip(open_ones, gathered, strict=True))
        return [found[i] for i in range(count)]


def _rows(job: TokenizedJob, answers: Sequence[Sequence[int]]) -> Rows:
    """The rows of the user's own answers, or else of the teacher's."""
    if len(answers) != len(job.queries):
        raise ValueError(f"it has {len(answers)} answers, not {len(job.queries)}")
    return make_rows(job.query_ids, [given or own for given, own in zip(job.given_ids, answers, strict=True)])


def _read(job: TokenizedJob, wanted: Wanted) -> Callable[[Path], tuple[Rows, list[list[int]]]]:
    return functools.partial(
        targets.read, rows_of=functools.partial(_rows, job), places=wanted.rows(job.is_train)
    )


def keep(
    store: Store,
    key: str,
    model: LanguageModel,
    problem: Problem,
    said: Callable[[], Iterable[targets.Said]] | None = None,
) -> Problem | None:
    """The problem with what the teacher said kept in the store; ``None`` if it can be kept nowhere.

    Args:
      store: where.
      key: its ``said_key``.
      model: the teacher.
      problem: without signals if ``said`` gives them.
      said: the signals, batch by batch; called again if they are to be written again.
    """
    job, rows, answers, wanted = problem.job, problem.rows, problem.answers, problem.wanted
    places = wanted.rows(job.is_train)
    given = [
        (name, places[name], jax.tree.map(lambda leaf, own=places[name]: leaf[own], target))
        for name, target in rows.targets.items()
        if name in SIGNALS
    ]
    kind = "teacher" if wanted.is_usual else f"teacher ({wanted.train})"
    shown = about(kind, model.name, job.parts[0].text, len(rows), tokens=len(job.context_ids))

    def write(folder: Path) -> None:
        targets.write(folder, rows, answers, given if said is None else said(), places)

    kept = store.write(key, shown, write, _read(job, wanted))
    return kept and Problem(job, problem.preamble, *kept, wanted=wanted)
