"""The problems of a run: each studied, and put to the teacher, once."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from jaxsp import processes
from jaxsp.losses import as_objective
from jaxsp.models.language_model import LanguageModel
from jaxsp.progress import Display
from jaxsp.runs.job import Job
from jaxsp.settings import Settings, plain
from jaxsp.study import NothingFit, Study, only_fills, study, study_key
from jaxsp.teacher.another import Teacher
from jaxsp.teacher.problem import (
    SAMPLE,
    Problem,
    TokenizedJob,
    keep,
    read_preamble,
    run_teacher,
    said_key,
    teacher_key,
    tokenize,
)
from jaxsp.teacher.samples import count, sample
from jaxsp.teacher.signals import USUAL, Wanted
from jaxsp.teacher.store import Store, about
from jaxsp.typing import KeyValues, PyTree

T = TypeVar("T")

KEPT = 128
"""Contexts whose problem and brackets are kept in memory, for other jobs on the same."""


class Kept(Generic[T]):
    """Things by their keys; the ones not used for longest go."""

    def __init__(self) -> None:
        self._things: collections.OrderedDict[Any, T] = collections.OrderedDict()

    def get(self, key: Any) -> T | None:
        if key in self._things:
            self._things.move_to_end(key)
        return self._things.get(key)

    def keep(self, key: Any, thing: T) -> T:
        self._things[key] = thing
        while len(self._things) > KEPT:
            self._things.popitem(last=False)
        return thing


class Problems:
    """The problems of jobs; those that ask the same share one.

    Args:
      model: the frozen model, which is also the teacher if there is no other.
      preamble: its prefix before a context.
      store: where studies, and what the teacher said, are kept.
      teacher: the teacher, if it is another model.
      named: say which job it is whose document gives nothing to train on.
      keep_going: leave such a job out.

    Attributes:
      left_out: the ids of the jobs left out.
    """

    def __init__(
        self,
        model: LanguageModel,
        preamble: KeyValues,
        store: Store,
        teacher: Teacher | None = None,
        *,
        named: bool = False,
        keep_going: bool = False,
    ) -> None:
        self.model, self.preamble, self.store, self.teacher = model, preamble, store, teacher
        self.named, self.keep_going, self.left_out = named, keep_going, set[str]()
        self.asked = teacher.model if teacher else model  # who answers
        self.teacher_preamble = read_preamble(teacher.model) if teacher else preamble
        self._problems, self._studies = Kept[Problem](), Kept[Study]()
        self._answers = Kept[list[list[int]]]()  # of the teacher, whatever else is wanted of it

    def if_any(self, job: Job, display: Display, say: Callable[[str], None]) -> Problem | None:
        """As ``of`` gives it; ``None`` if the document gives nothing to train on and the run keeps going."""
        if job.id in self.left_out:
            return None
        try:
            return self.of(job, display)
        except NothingFit as error:
            if not self.keep_going:
                raise
            self.left_out.add(job.id)
            say(f"Skipped: {error}")
            return None

    def of(self, job: Job, display: Display) -> Problem:
        """The job with what the teacher said.

        Raises:
          NothingFit: its document gives nothing to train on.
        """
        asked, found, made, known = job, None, None, dict[str, list[int]]()
        if job.is_studied:
            try:
                found, made, known = self._studied(job, display)
            except NothingFit as error:
                if not self.named:
                    raise
                if self.keep_going:
                    raise NothingFit(f"{job.id}: {error}") from error
                advice = "Or leave its row out, or do the others alone with --keep-going."
                raise NothingFit(f"{job.id}: {error} {advice}") from error
            job = dataclasses.replace(job, train=found.train, held_out=found.held_out)
        tokenized = job.tokenized(self.asked)
        seed = job.settings.training.seed if count(job.settings.teacher) else None
        wanted = self._wanted(job)
        usual = teacher_key(self.asked, tokenized, job.settings.teacher)
        said = said_key(usual, tokenized, wanted)
        key = said, tokenized.is_train.tobytes(), seed
        if (problem := self._problems.get(key)) is not None:
            return problem
        if made is not None and made.wanted == wanted and len(made.rows.targets) > 1:
            made = keep(self.store, said, self.asked, made) or made
        else:
            texts = self.asked, tokenized, job.settings.teacher, self.teacher_preamble
            answers = made.answers if made else self._answers.get(usual) or _answers(tokenized, known)
            made = run_teacher(*texts, display, self.store, wanted, answers)
        self._answers.keep(usual, made.answers)
        if found is not None and processes.is_first():
            self._keep_study(asked, found)  # last: who finds it, finds what was said
        sampled = self.asked, tokenized, job.settings, self.teacher_preamble, display, self.store
        index, samples = sample(*sampled, vocab_size=self._shared.config.vocab_size) or ([], None)
        if self.teacher is not None:
            own, more = job.tokenized(self.model), (self.preamble, job.settings)
            made = self.teacher.problem(made, own, *more)
            samples = samples and self.teacher.problem(samples, own.take(index), *more)
        return self._problems.keep(key, dataclasses.replace(made, samples=samples))

    def study(self, job: Job) -> Study | None:
        """The queries that a job's document gave; ``None`` if it was not asked for any."""
        return self._studies.get(self._key(job)) if job.is_studied else None

    @property
    def _shared(self) -> LanguageModel:
        """The model whose vocabulary teacher and student share, at most."""
        return self.model if self.teacher is None or self.teacher.difference is None else self.asked

    def _wanted(self, job: Job) -> Wanted:
        """The signals that a job wants of the teacher."""
        tokens = min(self.asked.config.vocab_size, self._shared.config.vocab_size)
        return Wanted.by(as_objective(job.settings.training.objective, by_gradient=False), tokens)

    def _key(self, job: Job) -> str:
        return study_key(self.asked, job.context, job.train, job.held_out, job.settings, self._wanted(job))

    def _keep_study(self, job: Job, found: Study) -> None:
        shown = about("study", self.asked.name, job.context, len(found.train) + len(found.held_out))
        self.store.write(f"{self._key(job)}.study", shown, found.write, Study.read)
        self.store.remove_begun(self._key(job))

    def _begun(self, job: Job) -> Store:
        """The store for what is kept of a study until it ends."""
        return self.store.begun(self._key(job))

    def _said(self, job: Job, display: Display) -> Problem | None:
        """The user's own queries with what the teacher says; ``None`` if there are none."""
        if not job.train:
            return None
        asked, settings = (self.asked, job.context), job.settings
        parts = tokenize(*asked, [*job.train, SAMPLE], job.held_out, settings).parts
        tokenized = tokenize(*asked, job.train, job.held_out, settings, parts)
        wanted = self._wanted(job) if only_fills(settings, job.train) else USUAL
        texts = self.asked, tokenized, settings.teacher, self.teacher_preamble
        store = self.store.with_own(self._begun(job).own, mend=True)
        usual = teacher_key(self.asked, tokenized, settings.teacher)
        said = run_teacher(*texts, display, store, wanted, self._answers.get(usual))
        self._answers.keep(usual, said.answers)
        return said

    def _studied(self, job: Job, display: Display) -> tuple[Study, Problem | None, dict[str, list[int]]]:
        """The queries that a job's document gives.

        If they have just been made, also their problem, unless several processes share the teacher's work:
        what all must do together, none leaves out. And the answers that are known then, by query.
        """
        key, made = self._key(job), None
        if (found := self._studies.get(key)) is not None:
            return found, None, {}
        if (found := self.store.read(f"{key}.study", Study.read, "Questions from the document")) is not None:
            return self._studies.keep(key, found), None, {}
        said = self._said(job, display)

        def make() -> dict[str, Any]:
            nonlocal made
            with processes.alone():
                asked = job.context, job.train, job.held_out, job.settings
                found, made = study(self.asked, *asked, display, kept=self._begun(job), said=said)
            return found.as_json()

        found = self._studies.keep(key, Study.from_json(processes.on_first_process(make)))
        asked = [query.text for query in said.job.queries] if said else []
        known = dict(zip(asked, said.answers if said else [], strict=True))
        return found, None if processes.are_several() else made, known


def _answers(job: TokenizedJob, known: dict[str, list[int]]) -> list[list[int]] | None:
    """The answers to all queries of a job, if they are known or given."""
    pairs = zip(job.queries, job.given_ids, strict=True)
    found = [known.get(query.text, given if query.seed else None) for query, given in pairs]
    answers = [ids for ids in found if ids is not None]
    return answers if len(answers) == len(found) else None


def bracket_key(
    model: LanguageModel, job: TokenizedJob, settings: Settings, initial: PyTree
) -> tuple[Any, ...]:
    """Equal where the brackets are: of the teacher, the queries held out, and the prompt before training."""
    start = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(initial))
    split, objective = job.is_train.tobytes(), as_objective(settings.training.objective, by_gradient=False)
    wanted = Wanted.by(objective, model.config.vocab_size)
    key = said_key(teacher_key(model, job, settings.teacher), job, wanted)
    return key, split, tuple(plain(settings.prompt).items()), start
