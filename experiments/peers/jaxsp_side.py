"""A side in jaxsp: training by its own loop with one of its optimizers, or the answers.

python -m experiments.peers.jaxsp_side JOB VARIANT, started by experiment.py. VARIANT: a key of ``VARIANTS``.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxsp
from experiments.peers.job import Job, end_turn
from jaxsp.data.examples import Rows, make_rows
from jaxsp.data.packing import Packing
from jaxsp.data.parts import Part
from jaxsp.evaluation.metrics import at_positions, mean_kl_function
from jaxsp.models import decoder
from jaxsp.models.chat import ChatTexts
from jaxsp.models.language_model import LanguageModel
from jaxsp.prompts import DEFAULT_KIND
from jaxsp.prompts.sizes import root_mean_square
from jaxsp.settings import make_settings
from jaxsp.teacher import targets
from jaxsp.teacher.answers import answer_ids
from jaxsp.teacher.problem import Problem, TokenizedJob
from jaxsp.training.drivers import JitDriver
from jaxsp.training.loop import Block
from jaxsp.training.slots import Step, TrainingJob
from jaxsp.training.start import start_state
from jaxsp.training.state import TrainState
from jaxsp.training.update import Frozen, UpdateSettings
from jaxsp.typing import KeyValues

ADAM = 1e-2
"""The peers' learning rate."""


def turns(first: dict[str, Any]) -> Callable[[Step], None]:
    """A callback that lets training go on from one held-out evaluation to the next, a turn each."""
    taken: list[dict[str, float]] = []

    def on_step(step: Step) -> None:
        if step.number:
            taken.append({key: step.metrics[key] for key in ("loss", "seconds")})
        if "held_out_kl" in step.metrics:
            result = {"steps": taken[:]} if step.number else first
            end_turn(kl=step.metrics["held_out_kl"], **result)
            taken.clear()

    return on_step


def train(kind: str, job: Job, optimizer: str | None = None) -> None:
    """The first turn readies everything; every other takes some steps and measures."""
    model = load(job)
    options = {
        "kind": kind,
        "prompt_length": job.prompt_length,
        "steps": job.steps,
        "evaluate_every": job.evaluate_every,
    }
    settings = make_settings(options if optimizer is None else {**options, "optimizer": optimizer})
    rows = make_rows(job.queries, job.answers)
    packing = Packing.for_all(rows.lengths)

    def hidden(context: KeyValues, rows: Rows) -> np.ndarray:
        return targets.compute(model, context, rows, packing, "hidden")

    def start(preamble: KeyValues, rows: Rows) -> TrainState:
        return start_state(model, Problem(tokenized(job), preamble, rows, job.answers), settings)

    def set_up() -> tuple[KeyValues, KeyValues, TrainState]:
        preamble, context = read(model, job)
        hidden(context, rows.take(range(job.train)))
        return preamble, context, start(preamble, rows)

    (preamble, context, state), setup = timed(set_up)
    setup_warm = timed(set_up)[1]
    # Once more, with the held-out queries, which are in nobody's seconds.
    rows = rows.with_targets(hidden=hidden(context, rows))
    problem = Problem(tokenized(job), preamble, rows, job.answers)
    if optimizer == "adam":  # jaxsp's rate is relative to the size of σ's entries
        rate = ADAM / root_mean_square(state.sigma["embeddings"]).item()
        settings = make_settings({"learning_rate": rate}, base=settings)
        state = start(preamble, rows)
    held_out = problem.held_out
    kl = at_positions(model, preamble, held_out, packing, ("kl",))["kl"].sum() / held_out.mask.sum()
    first = {"setup": setup, "setup_warm": setup_warm, "no_context_kl": float(kl)}
    frozen, chosen = Frozen(model.params, preamble), UpdateSettings.of(model.config, settings)
    own = Packing.of(rows.lengths, settings.training.batch_size)
    block = Block(
        iter([TrainingJob("prompt", state, problem.train, held_out, own)]),
        lambda slots: JitDriver(frozen, chosen, slots=slots),
        mean_kl_function(model, preamble, settings.prompt.kind),
        slots=1,
        evaluate_every=job.evaluate_every,
        callbacks=[turns(first)],
    )
    list(block.run())


def tokenized(job: Job) -> TokenizedJob:
    """The job as jaxsp knows it; of its texts there are only the ids."""
    given: list[list[int] | None] = [*job.answers]
    preamble, context = np.array(job.preamble, np.int32), np.array(job.context, np.int32)
    is_train = np.arange(len(job.queries)) < job.train
    whole, one = [Part(0, 0, "", context)], np.zeros(len(job.queries), np.int64)
    chat = ChatTexts("", "", "")
    return TokenizedJob(chat, preamble, context, whole, one, one, [], is_train, job.queries, given)


def template_too(job: Job) -> Job:
    """The job in which the chat template's tokens are part of σ, as in PEFT's prompt tuning."""
    return dataclasses.replace(
        job,
        preamble=[],
        context=job.preamble + job.context,
        prompt_length=len(job.preamble) + job.prompt_length,
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

    def after(ids: list[int], prefix: KeyValues | None = None) -> KeyValues:
        return decoder.read_long(model.params, model.config, np.array([ids], np.int32), prefix)

    preamble = after(job.preamble)
    return preamble, after(job.context, preamble)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - started


VARIANTS: dict[str, Callable[[Job], None]] = {
    "jaxsp": functools.partial(train, DEFAULT_KIND),
    "jaxsp, vectors": functools.partial(train, "embedding"),
    "jaxsp, template too": lambda job: train("embedding", template_too(job)),
    "jaxsp, adam": functools.partial(train, "embedding", optimizer="adam"),
    "answers": answers,
}


if __name__ == "__main__":
    VARIANTS[sys.argv[2]](Job.read(Path(sys.argv[1])))
