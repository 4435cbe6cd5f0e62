"""One cell of the grid: a prompt started, trained, and measured on the queries of its document."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jaxsp
from experiments import suite
from experiments.initialisation import variants
from experiments.narrativeqa import passages
from jaxsp import demo, distributions, prompts
from jaxsp.data.documents import as_queries
from jaxsp.data.packing import Packing
from jaxsp.evaluation.facts import agrees
from jaxsp.evaluation.metrics import at_positions, mean_kl_function
from jaxsp.models.language_model import LanguageModel
from jaxsp.progress import Display, compile_seconds
from jaxsp.prompts import with_defaults
from jaxsp.settings import make_settings
from jaxsp.teacher.answers import answer_ids
from jaxsp.teacher.problem import Problem, read_preamble, run_teacher, tokenize
from jaxsp.teacher.store import Store
from jaxsp.training import Frozen, JitDriver, UpdateSettings
from jaxsp.training.loop import Block
from jaxsp.training.slots import TrainingJob
from jaxsp.training.start import start_state
from jaxsp.typing import PyTree

ASKED, HELD_OUT = 22, 8
"""Questions of a passage of NarrativeQA to train on, and to measure on; of the other documents' questions to
train on as many are measured."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A prompt: settings of a compression that decide what is compared."""

    kind: str
    initial: str
    prompt_length: int
    steps: int
    learning_rate: float | None = None
    rates: str = ""
    decay: float = 0.0
    """Strength of the decay towards the start."""
    length: int | None = None
    """Slots that are read, of a kind that holds shorter prompts; by default all."""


def texts(name: str) -> tuple[str, list[Any], list[Any]]:
    """A document with its queries: ``demo``, one of ``experiments/documents``, or ``narrativeqa-INDEX``.

    The index is in the list of the passages with questions enough; a negative one counts from its end.
    """
    if name == "demo":
        return demo.read()
    if not name.startswith("narrativeqa-"):
        return suite.own_document(name)
    long_enough = [p for p in passages() if len(p.questions) >= ASKED + HELD_OUT]
    text, questions = long_enough[int(name.removeprefix("narrativeqa-"))]
    return text, as_queries(questions[:ASKED]), as_queries(questions[ASKED : ASKED + HELD_OUT])


class Document:
    """A document whose teacher has spoken, and what the model makes of its queries without it."""

    def __init__(self, model: LanguageModel, name: str, folder: Path, *, small: bool = False) -> None:
        text, queries, held_out = texts(name)
        settings = make_settings({"max_answer_tokens": 8} if small else {})
        if small:
            queries, held_out = queries[:6], held_out[:2]
        job = tokenize(model, text, queries, held_out, settings)
        self.model, self.settings = model, settings
        self.problem: Problem = run_teacher(
            model, job, settings.teacher, read_preamble(model), Display(visible=False), Store(folder)
        )
        is_train = self.problem.job.is_train
        looked_at = [*np.flatnonzero(is_train)[:ASKED].tolist(), *np.flatnonzero(~is_train).tolist()]
        self.measured = self.problem.take(looked_at)
        nothing = self._positions(self.problem.preamble)
        self.kl_no_context = nothing["kl"].sum(axis=1)
        self.decisive = self.measured.rows.mask & (nothing["zero_one"] > 0)
        self._last = functools.lru_cache(maxsize=1)(self._trained)  # its other lengths need no other training

    def _positions(self, prefix: Any) -> dict[str, np.ndarray]:
        rows, packing = self.measured.rows, self.measured.packing
        return at_positions(self.model, prefix, rows, packing, ("kl", "zero_one"))

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Starts and trains a prompt, and measures it.

        Returns:
          KL and decisive agreement on training queries (the first 22) and on the held-out ones, the share of
          held-out queries captured, and seconds: of the start, of a step (median), and of all.
        """
        sigma, seconds = self._last(dataclasses.replace(cell, length=None))
        kind = cell.kind
        if cell.length is not None:
            kind, sigma = prompts.cut(kind, sigma, cell.length)
        model, problem = self.model, self.problem
        prefix = distributions.prompt_prefix(model.params, model.config, sigma, problem.preamble, kind)
        return {
            **dataclasses.asdict(cell),
            "context_tokens": len(problem.job.context_ids),
            **self._found(prefix),
            **seconds,
        }

    def _trained(self, cell: Cell) -> tuple[PyTree, dict[str, float]]:
        """The σ of a cell, with the seconds that it took."""
        model, problem = self.model, self.problem
        values = {name: value for name, value in dataclasses.asdict(cell).items() if value is not None}
        decay = values.pop("decay")
        settings = with_defaults(make_settings(values, base=self.settings))
        begun, compiled = time.perf_counter(), compile_seconds()
        state = jax.block_until_ready(start_state(model, problem, settings))
        # Compiled once for all prompts of this length: no part of what a start costs.
        start_seconds, steps = time.perf_counter() - begun - (compile_seconds() - compiled), []
        if cell.steps:
            frozen, chosen = Frozen(model.params, problem.preamble), UpdateSettings.of(model.config, settings)
            if decay:
                assert isinstance(chosen.optimizer, optax.GradientTransformation)  # Adam's, of these kinds
                optimizer = optax.chain(chosen.optimizer, variants.towards_start(decay))
                chosen = dataclasses.replace(chosen, optimizer=optimizer)
                state = dataclasses.replace(state, optimizer_state=optimizer.init(state.sigma))
            packing = Packing.of(problem.rows.lengths, settings.training.batch_size)
            job = TrainingJob("prompt", state, problem.train, problem.held_out, packing)
            block = Block(
                iter([job]),
                lambda slots: JitDriver(frozen, chosen, slots=slots),
                mean_kl_function(model, problem.preamble, cell.kind),
                slots=1,
                evaluate_every=cell.steps,
            )
            (trained,) = block.run()
            if trained.error:
                raise RuntimeError(f"{cell}: {trained.error}")
            state = trained.state
            steps = [line["seconds"] for line in trained.lines if "seconds" in line]
        return state.sigma, {
            "start_seconds": start_seconds,
            "step_seconds": float(np.median(steps)) if steps else 0.0,
            "train_seconds": float(np.sum(steps)),
        }

    def _found(self, prefix: Any) -> dict[str, float]:
        problem, found, is_train = self.measured, self._positions(prefix), self.measured.job.is_train
        measured: dict[str, float] = {}
        for part, there in (("train", is_train), ("held_out", ~is_train)):
            count, decisive = problem.rows.mask[there].sum(), self.decisive[there]
            measured[f"{part}_kl"] = float(found["kl"][there].sum() / count)
            measured[f"{part}_kl_no_context"] = float(self.kl_no_context[there].sum() / count)
            measured[f"{part}_decisive"] = float(1 - found["zero_one"][there][decisive].mean())
        most = self.settings.teacher.max_answer_tokens
        answers = answer_ids(self.model, prefix, problem.job.held_out(problem.job.query_ids), max_tokens=most)
        rows, stop_ids, kept = problem.rows, self.model.stop_ids, []
        for i, answer in zip(np.flatnonzero(~is_train), answers, strict=True):
            ids, decisive = rows.targets["tokens"][i, rows.mask[i]], self.decisive[i, rows.mask[i]]
            kept.append(agrees(ids.tolist(), decisive.tolist(), answer, stop_ids))
        return {**measured, "captured": float(np.mean(kept)), "held_out_queries": len(kept)}


def embedded() -> LanguageModel:
    """The model of all cells, in one dtype on every machine; the variants' kinds are in the table."""
    variants.register()
    return jaxsp.load_model(dtype="bfloat16")
