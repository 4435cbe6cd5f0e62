"""A side in jaxsp: training by its own loop with one of its optimizers, or the answers.

python -m experiments.peers.jaxsp_side JOB VARIANT, started by run.py; VARIANT is a key of ``VARIANTS``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxsp
from experiments.peers.job import Job, end_turn
from jaxsp import stages
from jaxsp.progress import Display
from jaxsp.models.chat import ChatSlots
from jaxsp.data.examples import make_rows
from jaxsp.evaluation.brackets import read_context
from jaxsp.evaluation.metrics import at_positions
from jaxsp.models.language_model import LanguageModel
from jaxsp.settings import Settings
from jaxsp.teacher.answers import answer_ids
from jaxsp.teacher.signals import hidden_states
from jaxsp.teacher.store import TeacherData
from jaxsp.training.optimizers import root_mean_square
from jaxsp.typing import KeyValues

ADAM = 1e-2
"""The peers' learning rate."""


class Turns(Display):
    """Lets ``jaxsp.training.loop.train`` go on from one held-out evaluation to the next, a turn each."""

    def __init__(self, first: dict[str, Any]) -> None:
        super().__init__(visible=False)
        self._first = first

    @contextlib.contextmanager
    def training(self, steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        del steps  # a line says its own
        taken: list[dict[str, float]] = []

        def on_step(line: dict[str, Any]) -> None:
            if line["step"]:
                taken.append({key: line[key] for key in ("loss", "seconds")})
            if "held_out_kl" in line:
                result = {"steps": taken[:]} if line["step"] else self._first
                end_turn(kl=line["held_out_kl"], **result)
                taken.clear()

        yield on_step


def train(optimizer: str, job: Job) -> None:
    """The first turn readies everything; every other takes some steps and measures."""
    model = load(job)
    settings = Settings(
        length=job.length,
        steps=job.steps,
        evaluate_every=job.evaluate_every,
        optimizer=optimizer,
    )
    rows = make_rows(job.queries, job.answers)
    packing = stages.packing_of(rows, settings)

    def teach() -> tuple[KeyValues, KeyValues, np.ndarray]:
        before, context = read(model, job)
        return before, context, hidden_states(model, context, rows.take(range(job.train)), packing)

    (before, context, _), setup = timed(teach)
    setup_warm = timed(teach)[1]
    # Once more, with the held-out queries, which are in nobody's seconds.
    rows = dataclasses.replace(rows, teacher_hidden=hidden_states(model, context, rows, packing))
    lesson = stages.Lesson(task_of(job), settings, before, TeacherData(rows, job.answers), packing)
    state = stages.initial_state_of(model, lesson)
    if optimizer == "adam":  # jaxsp's rate is relative to the size of σ's entries
        rate = ADAM / root_mean_square(state.sigma)
        settings = dataclasses.replace(settings, learning_rate=rate)
        lesson = dataclasses.replace(lesson, settings=settings)
        state = stages.initial_state_of(model, lesson)
    held_out = lesson.held_out_rows
    kl = at_positions(model, before, held_out, packing, ("kl",))["kl"].sum() / held_out.mask.sum()
    first = {"setup": setup, "setup_warm": setup_warm, "no_context_kl": float(kl)}
    stages.train_prompt(model, lesson, state, None, Turns(first))


def task_of(job: Job) -> stages.Task:
    """The job as jaxsp's stages know it; of its texts there are only the ids."""
    given: list[list[int] | None] = [*job.answers]
    before, context = np.array(job.before, np.int32), np.array(job.context, np.int32)
    return stages.Task(ChatSlots("", "", ""), before, context, [], job.train, job.queries, given)


def template_too(job: Job) -> Job:
    """The job in which the chat template's tokens are part of σ, as in PEFT's prompt tuning."""
    return dataclasses.replace(
        job, before=[], context=job.before + job.context, length=len(job.before) + job.length
    )


def answers(job: Job) -> None:
    """Each turn reads the context and answers all queries."""
    model = load(job)
    end_turn()
    while True:

        def answer() -> list[list[int]]:
            context = read(model, job)[1]
            return answer_ids(model, context, job.queries, max_tokens=job.max_answer_tokens)

        made, seconds = timed(answer)
        end_turn(seconds=seconds, answers=made)


def load(job: Job) -> LanguageModel:
    return jaxsp.load_model(job.model, dtype=job.dtype, tokenizer=None)


def read(model: LanguageModel, job: Job) -> tuple[KeyValues, KeyValues]:
    """The prefixes of the chat template and of the whole context."""
    before = read_context(model, np.array(job.before, np.int32))
    return before, read_context(model, np.array(job.context, np.int32), before)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - started


VARIANTS: dict[str, Callable[[Job], None]] = {
    "jaxsp": functools.partial(train, "muon"),
    "jaxsp, adam": functools.partial(train, "adam"),
    "jaxsp, template too": lambda job: train("muon", template_too(job)),
    "answers": answers,
}


if __name__ == "__main__":
    VARIANTS[sys.argv[2]](Job.read(Path(sys.argv[1])))
