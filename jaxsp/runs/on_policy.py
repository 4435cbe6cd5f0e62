"""On-policy training: σ answers, and the teacher's distributions on these answers are the targets.

So σ learns from the tokens that it will come upon when it answers freely, not from the teacher's alone.

Reference: Agarwal et al. 2024, On-Policy Distillation of Language Models (GKD, arXiv:2306.13649).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import numpy as np

from jaxsp import distributions, processes
from jaxsp.data.documents import Query
from jaxsp.data.examples import Rows, joined, make_rows
from jaxsp.data.packing import Packing
from jaxsp.losses import as_objective
from jaxsp.models.language_model import LanguageModel
from jaxsp.progress import Display
from jaxsp.settings import Settings
from jaxsp.teacher import targets
from jaxsp.teacher.answers import answer_ids
from jaxsp.teacher.problem import Problem, read_part
from jaxsp.training.slots import OnPolicy, OwnAnswers
from jaxsp.typing import Int, KeyValues, PyTree, UserError

_DRAW = 2
"""Folded into the run's key: the draw of the queries is its own."""


def check(settings: Settings, train: Sequence[Query] = ()) -> None:
    """Raises ``UserError`` if there is nothing to learn from the prompt's own answers.

    Args:
      settings: settings of the compression.
      train: all queries to train on, where they are known.
    """
    if not (fraction := settings.training.on_policy):
        return
    objective = as_objective(settings.training.objective, by_gradient=False)
    if "tokens" in objective.needs or not objective.needs:
        raise UserError(
            f"--on-policy {fraction:g} needs an objective that compares with the teacher's distribution, such"
            f" as kl, reverse_kl or js, not {objective}: of its own answers' tokens alone a prompt learns"
            " nothing."
        )
    if train and all(query.answer is not None for query in train):
        raise UserError(
            f"--on-policy {fraction:g} takes the place of the teacher's answers, but every query to train on"
            " has an answer given; leave it away, or give queries without answers."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class OnPolicyRows:
    """A prompt's training rows with some answers of its own.

    Attributes:
      model: the frozen model.
      teacher: the model that teaches; the same one, if there is no other.
      teacher_preamble: its prefix before the context.
      problem: the queries, and what the teacher said.
      settings: settings of the compression.
      display: shows that it goes on.
    """

    model: LanguageModel
    teacher: LanguageModel
    teacher_preamble: KeyValues
    problem: Problem
    settings: Settings
    display: Display

    def as_training_takes_it(self) -> OnPolicy | None:
        """The rule for the training; ``None`` if the settings ask for none."""
        if not self.settings.training.on_policy or not self._open:
            return None
        longest = self._longest([self.problem.job.query_ids[i] for i in self._numbers])
        return OnPolicy(self.settings.training.on_policy_every, longest, self.refreshed, self.rows)

    def refreshed(self, sigma: PyTree, step: int) -> tuple[OwnAnswers, Rows]:
        """New answers of σ after so many steps, and the rows with them."""
        with self.display.phase("on_policy", "The prompt's own answers") as note:
            answers = processes.on_first_process(lambda: self._answers(sigma, step))
            note("read by the teacher")
            return answers, self._rows(answers)

    def rows(self, answers: OwnAnswers) -> Rows:
        """The training rows with these answers, and the teacher's targets on them."""
        with self.display.phase("on_policy", "The prompt's own answers, read by the teacher"):
            return self._rows(answers)

    @functools.cached_property
    def _numbers(self) -> Int[np.ndarray, " n"]:
        """The training rows' numbers among all queries."""
        return np.flatnonzero(self.problem.job.is_train)

    @functools.cached_property
    def _open(self) -> list[int]:
        """The training rows without an answer given."""
        given = self.problem.job.given_ids
        return [row for row, number in enumerate(self._numbers) if given[number] is None]

    def _longest(self, queries: Sequence[Sequence[int]]) -> int:
        """Tokens of the longest sequence that there may be; the last of an answer is never read."""
        return max(map(len, queries)) + self.settings.teacher.max_answer_tokens - 1

    def _answers(self, sigma: PyTree, step: int) -> OwnAnswers:
        model, job, training = self.model, self.problem.job, self.settings.training
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(training.seed), _DRAW), step)
        order = np.asarray(jax.random.permutation(key, len(self._open))).tolist()
        count = max(1, round(training.on_policy * len(order)))
        rows = sorted(self._open[i] for i in order[:count])
        kind = self.settings.prompt.kind
        prefix = distributions.prompt_prefix(model.params, model.config, sigma, self.problem.preamble, kind)
        queries = [job.query_ids[self._numbers[row]] for row in rows]
        answered = answer_ids(model, prefix, queries, max_tokens=self.settings.teacher.max_answer_tokens)
        found: OwnAnswers = [None] * len(self._numbers)
        for row, ids in zip(rows, answered, strict=True):
            # Where vocabularies are padded to two sizes, the teacher may lack an id.
            found[row] = ids if max(ids) < self.teacher.config.vocab_size else None
        return found

    def _rows(self, answers: OwnAnswers) -> Rows:
        own, read = [row for row, ids in enumerate(answers) if ids is not None], self.problem.read
        pieces = [self.problem.train]
        order = list(range(len(pieces[0])))
        signals = [(n, self.problem.wanted.options_of(n)) for n in pieces[0].targets if n != "tokens"]
        part_of = read.part_of[self._numbers[own]]
        for part in np.unique(part_of).tolist():
            some = [row for row, other in zip(own, part_of, strict=True) if other == part]
            numbers, ids = self._numbers[some], [answers[row] or [] for row in some]
            asked = [read.query_ids[i] for i in numbers]
            rows = make_rows(asked, ids)
            context = read_part(self.teacher, read, part, self.teacher_preamble)
            # The same shapes whatever was answered.
            packing = Packing.for_all(np.full(len(some), self._longest(asked)))
            said = (targets.in_batches(self.teacher, context, rows, packing, *signal) for signal in signals)
            found = targets.in_order(itertools.chain.from_iterable(said))
            for place, row in enumerate(some, start=sum(map(len, pieces))):
                order[row] = place
            student = make_rows([self.problem.job.query_ids[i] for i in numbers], ids)
            pieces.append(student.with_targets(**found))
        return joined(pieces).take(order)
