"""Many prompts in one step: as many as there are slots, the next of the queue as soon as one has ended."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsp.data.packing import Packing
from jaxsp.data.examples import Rows
from jaxsp.models import sharding
from jaxsp.training.loop import non_finite, out_of_patience
from jaxsp.training.state import TrainState
from jaxsp.training.update import Frozen, Metrics, UpdateSettings, update_many
from jaxsp.typing import EMPTY, Float, PyTree

Evaluate = Callable[[PyTree, Sequence[Rows]], Float[np.ndarray, " m"]]


@dataclasses.dataclass(frozen=True)
class Trainee:
    """A prompt to train.

    Attributes:
      state: where it starts, with its pace.
      train: rows with the teacher's hidden states.
      held_out: likewise.
      patience: as in ``LoopSettings``.
    """

    state: TrainState
    train: Rows
    held_out: Rows
    patience: int = 0


@dataclasses.dataclass(frozen=True)
class Trained:
    """A prompt whose training has ended.

    Attributes:
      index: which of the queue.
      state: at the end; of a failed one, ``best_sigma`` is what it was before.
      lines: a dict of metrics a step, as ``train`` gives them; ``seconds`` is this prompt's share.
      error: why it failed, if it did.
    """

    index: int
    state: TrainState
    lines: list[dict[str, Any]]
    error: str | None = None


class _Slot:
    """A prompt in training, as the host sees it."""

    def __init__(self, index: int, trainee: Trainee, packing: Packing) -> None:
        assert trainee.state.pace is not None
        self.index, self.trainee, self.packing = index, trainee, packing
        self.steps = int(trainee.state.pace.steps)
        self.order = np.asarray(trainee.state.key)
        self.lines: list[dict[str, Any]] = [{"step": 0}]
        self.cursor = 0
        held_out = trainee.held_out
        self.held_out = [packing.pack(held_out, index) for index in packing.in_order(held_out)]

    @property
    def blank(self) -> Rows:
        return self.packing.pack(self.trainee.train, np.zeros(0, int))

    def draw(self, ahead: int) -> Rows:
        """The batch of the step after ``ahead`` more."""
        if self.lines[-1]["step"] + ahead >= self.steps:
            return self.blank
        rows = self.trainee.train
        drawn = self.packing.draw(rows.lengths, self.cursor, self.order)
        self.cursor += len(drawn)
        return self.packing.pack(rows, drawn)


def train_many(
    trainees: Iterable[Trainee],
    frozen: Frozen,
    settings: UpdateSettings,
    packing: Packing,
    evaluate: Evaluate,
    *,
    slots: int,
    evaluate_every: int,
    mesh: Mesh | None = None,
    on_round: Callable[[list[dict[str, Any]]], None] = lambda lines: None,
) -> Iterator[Trained]:
    """Trains every prompt of a queue as ``train`` would, ``slots`` of them side by side.

    All have the same settings, packing and number of vectors, so that one compiled update serves them. The
    queue is read when a slot is free, between two evaluations.

    Args:
      trainees: may make their rows when they are asked for.
      frozen: the weights and the prefix before σ, shared.
      settings: of the update.
      packing: shape of every prompt's batches.
      evaluate: from M prompts and their packed batches to their mean held-out KL.
      slots: M.
      evaluate_every: steps between two evaluations.
      mesh: over whose axis ``data`` the prompts go, M a multiple of it; they have nothing to tell each other.
      on_round: told the newest line of each prompt in training (and not failed) after every evaluation.

    Yields:
      Each prompt as its training ends.
    """
    queue, held_out = enumerate(trainees), []
    running: list[_Slot | None] = [None] * slots
    states: Any = None
    while True:
        fresh = set()
        for place, slot in enumerate(running):
            if slot is None and (entry := next(queue, None)) is not None:
                running[place] = _Slot(*entry, packing)
                states = _put(states, place, entry[1].state, slots)
                fresh.add(place)
        live = [slot for slot in running if slot is not None]
        if not live:
            return
        blank = live[0].blank
        if fresh:
            held_out = _held_out(running, blank)
            states = _evaluated(states, running, evaluate(states.sigma, held_out), fresh)

        started = time.perf_counter()
        history, tokens = [], []
        left = max(slot.steps - slot.lines[-1]["step"] for slot in live)
        for ahead in range(min(evaluate_every, left)):
            batches = [blank if slot is None else slot.draw(ahead) for slot in running]
            states, metrics = step_many(
                states, _stack(batches), frozen=frozen, settings=settings, mesh=mesh
            )
            history.append(metrics)
            tokens.append([int(np.sum(batch.offsets != EMPTY)) for batch in batches])
        history = jax.device_get(history)
        done = sum(read > 0 for step in tokens for read in step)
        share = (time.perf_counter() - started) / max(done, 1)

        errors: dict[int, str] = {}
        for place, slot in enumerate(running):
            for metrics, read in zip(history, tokens, strict=True):
                if slot is None or slot.lines[-1]["step"] == slot.steps or place in errors:
                    continue
                values = {name: float(value[place]) for name, value in metrics.items()}
                at = slot.lines[-1]["step"] + 1
                if not all(math.isfinite(value) for value in values.values()):
                    errors[place] = non_finite(at, values)
                    continue
                slot.lines.append({"step": at, **values, "tokens": read[place], "seconds": share})
        kl_M = evaluate(states.sigma, held_out)
        for place, slot in enumerate(running):
            if slot is not None and place not in errors and not math.isfinite(kl_M[place]):
                values = {"held-out KL": float(kl_M[place])}
                errors[place] = non_finite(slot.lines[-1]["step"], values)
        sound = {i for i, slot in enumerate(running) if slot is not None} - set(errors)
        states = _evaluated(states, running, kl_M, sound)
        on_round(
            [slot.lines[-1] for i, slot in enumerate(running) if slot is not None and i in sound]
        )
        for place, slot in enumerate(running):
            if slot is None:
                continue
            done = slot.lines[-1]["step"] == slot.steps
            if place in errors or done or out_of_patience(slot.lines, slot.trainee.patience):
                state = jax.tree.map(lambda leaf, at=place: leaf[at], states)
                yield Trained(slot.index, state, slot.lines, errors.get(place))
                running[place] = None


@functools.partial(jax.jit, static_argnames=("settings", "mesh"), donate_argnames="states")
def step_many(
    states: TrainState,
    batches: Rows,
    *,
    frozen: Frozen,
    settings: UpdateSettings,
    mesh: Mesh | None,
) -> tuple[TrainState, Metrics]:
    """``update_many``, the prompts spread over the mesh's axis ``data`` if there is one."""

    def update(frozen: Frozen, states: TrainState, batches: Rows) -> tuple[TrainState, Metrics]:
        return update_many(states, batches, frozen=frozen, settings=settings)

    spread = sharding.over_data(update, mesh, (False, True, True), out=True)
    return spread(frozen, states, batches)


def _put(states: Any, place: int, state: TrainState, slots: int) -> TrainState:
    """The stacked states with this one in its place."""
    if states is None:
        return jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * slots), state)
    return jax.tree.map(lambda all_M, leaf: all_M.at[place].set(leaf), states, state)


def _stack(batches: Sequence[Rows]) -> Rows:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def _held_out(running: Sequence[_Slot | None], blank: Rows) -> list[Rows]:
    """The held-out batches of all prompts side by side; those that have fewer get empty ones."""
    most = max(len(slot.held_out) for slot in running if slot is not None)
    return [
        _stack(
            [
                slot.held_out[i] if slot is not None and i < len(slot.held_out) else blank
                for slot in running
            ]
        )
        for i in range(most)
    ]


def _evaluated(
    states: TrainState, running: Sequence[_Slot | None], kl_M: np.ndarray, places: set[int]
) -> TrainState:
    """Notes the held-out KL of the prompts in these places, and keeps what is best."""
    for place in places:
        slot = running[place]
        assert slot is not None
        slot.lines[-1]["held_out_kl"] = float(kl_M[place])
    there = np.isin(np.arange(len(running)), list(places))
    return _keep_best(states, np.where(there, kl_M, np.nan).astype(np.float32))


@jax.jit
def _keep_best(states: TrainState, kl_M: Float[np.ndarray, " m"]) -> TrainState:
    def one(state: TrainState, kl: Any) -> TrainState:
        better = kl < state.best_kl
        best = jax.tree.map(
            lambda new, old: jnp.where(better, new, old), state.sigma, state.best_sigma
        )
        return dataclasses.replace(
            state, best_sigma=best, best_kl=jnp.where(better, kl, state.best_kl)
        )

    return jax.vmap(one)(states, kl_M)
