"""The training loop: M slots for prompts, the next of the queue as soon as one has ended."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp import processes
from jaxsp.data.examples import Rows
from jaxsp.data.packing import Packing
from jaxsp.progress import compile_seconds
from jaxsp.training.drivers import Driver
from jaxsp.training.slots import (
    Callback,
    OwnAnswers,
    Slot,
    Step,
    TrainingJob,
    TrainingResult,
    all_lengths,
    next_batches,
)
from jaxsp.training.state import TrainState, put, stack, unstack
from jaxsp.typing import EMPTY, AnyArray, Float, Interrupted, PyTree

if TYPE_CHECKING:
    from jaxsp.training.checkpoint import Checkpoints

Evaluate = Callable[[PyTree, Sequence[Rows]], Float[np.ndarray, " m"]]


class Block:
    """Prompts that train side by side, one a slot, by one compiled update.

    Args:
      queue: further prompts; one may make its rows when it is asked for.
      make_driver: from the number of slots to the driver.
      evaluate: from M prompts and their packed batches to their mean held-out KL, in nats.
      slots: M.
      evaluate_every: steps between held-out evaluations; there is one before the first step and one after
        the last, too. Slots are filled again when the others are evaluated: one evaluation serves all.
      checkpoints: where the states are saved.
      checkpoint_every: steps between checkpoints.
      callbacks: hear of every step, and of the end.
    """

    packing: Packing
    states: TrainState  # as the driver places them

    def __init__(
        self,
        queue: Iterator[TrainingJob],
        make_driver: Callable[[int], Driver],
        evaluate: Evaluate,
        *,
        slots: int,
        evaluate_every: int,
        checkpoints: Checkpoints | None = None,
        checkpoint_every: int = 10,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.queue, self.evaluate, self.callbacks = queue, evaluate, callbacks
        self.evaluate_every, self.checkpoint_every = evaluate_every, checkpoint_every
        self.checkpoints, self.driver, self.count = checkpoints, make_driver(slots), slots
        self.slots: list[Slot] = []
        self.tick = 0
        self.longest = 0  # tokens of the longest sequence there has been
        self.recent: deque[TrainState] = deque(maxlen=2)  # before the last step, and the one before it
        self.ahead: Rows | None = None  # the next batches, packed beforehand
        self.held_out: list[Rows] = []  # side by side; none before there are prompts

    def resume(
        self,
        jobs: Sequence[TrainingJob | None],
        tick: int,
        packing: Packing,
        answers: Sequence[OwnAnswers | None] = (),
    ) -> None:
        """Goes on with a saved block, each prompt in its slot: the same programs on the same numbers."""
        (some, *_) = filter(None, jobs)
        self.slots = [Slot(job or some, left=job is None) for job in jobs]
        for slot, own in zip(self.slots, answers, strict=False):
            slot.go_on_with(own)
        self.tick, self.packing = tick, packing
        self.longest = max(int(all_lengths(slot).max()) for slot in self._live())
        self._put(stack([slot.job.state for slot in self.slots]))
        self._pack_held_out()

    def run(self) -> Generator[TrainingResult, None, None]:
        """Trains until the queue is empty; gives each prompt as its training ends.

        Raises:
          Interrupted: on Ctrl-C, between two steps; the states are then saved.
        """
        try:
            yield from self._run()
        finally:  # it may have failed, or have been interrupted
            for slot in self._live():
                self._tell_end(slot)

    def _run(self) -> Iterator[TrainingResult]:
        while True:
            try:
                self._fill()
                if not self._live():
                    return
                with _interrupts_between_steps() as check:
                    if not any(slot.finished for slot in self._live()):
                        self._step()
                    check()
            except KeyboardInterrupt:
                self._save()
                raise Interrupted(self._where()) from None
            for index, slot in enumerate(self.slots):
                if slot.finished and not slot.left:
                    result = self._result(index, slot)
                    slot.left, self.ahead = True, None
                    self._tell_end(slot)
                    yield result

    def _live(self) -> list[Slot]:
        return [slot for slot in self.slots if not slot.left]

    def _running(self) -> list[Slot]:
        return [slot for slot in self._live() if not slot.ended]

    def _where(self) -> str:
        """Says how far it has come."""
        slots = self._live()
        if len(slots) == 1:
            return f"Interrupted after step {slots[0].step} of {slots[0].steps}."
        return f"Interrupted with {len(slots)} prompts in training."

    def _at_evaluation(self) -> bool:
        """Whether the prompts here stand at one of their evaluations: all have the same ones."""
        running = self._running()
        return not running or running[0].step % self.evaluate_every == 0

    def _fill(self) -> None:
        """Puts the next prompts of the queue into the slots that are free."""
        if not self._at_evaluation():
            return
        first = not self.slots
        indices = range(self.count) if first else [i for i, slot in enumerate(self.slots) if slot.left]
        fresh = {index: Slot(job) for index, job in zip(indices, self.queue, strict=False)}
        if not fresh:
            return
        with _interrupts_between_steps() as check:
            if first:
                # Slots that stay empty hold a copy, which nothing is drawn for and nobody looks at.
                copies = [Slot(fresh[0].job, left=True) for _ in range(self.count - len(fresh))]
                self.slots = [*fresh.values(), *copies]
                states = stack([slot.job.state for slot in self.slots])
            else:
                states = self.driver.fetch(self.states)
                for index, slot in fresh.items():
                    states = put(states, np.int32(index), slot.job.state)
                    self.slots[index] = slot
            self.ahead = None  # it lacks theirs
            self._put(states)
            self._fit()
            self._evaluate({index for index, slot in fresh.items() if slot.fresh})
            self._save()
            check()

    def _put(self, states: TrainState) -> None:
        self.states = self.driver.place(states)
        self.recent = deque([self.states], maxlen=2)

    def _fit(self) -> None:
        """Finds a shape for the batches of all prompts here; what each draws does not depend on it."""
        slots = self._live()
        longest = [max(all_lengths(slot).max() for slot in slots)]
        self.longest = max(self.longest, int(longest[0]))
        if not self.held_out:
            ahead = [lengths for slot in slots for lengths in next_batches(slot)]
            own = [slot.job.packing for slot in slots]
            self.packing = Packing.shared(own, [*ahead, np.array(longest)])
        self.packing = self.packing.grown(np.array(longest))
        self._pack_held_out()

    def _pack_held_out(self) -> None:
        """The held-out batches of all prompts side by side; those that have fewer get empty ones."""
        pack, in_order = self.packing.pack, self.packing.in_order
        own = [
            [pack(slot.job.held_out, index) for index in ([] if slot.left else in_order(slot.job.held_out))]
            for slot in self.slots
        ]
        blank = pack(self.slots[0].job.held_out, np.zeros(0, int))
        together = itertools.zip_longest(*own, fillvalue=blank)
        self.held_out = [_stacked(batches) for batches in together]

    def _answer(self) -> None:
        """Makes the answers of their own that prompts are to train on from here on."""
        if due := [index for index, slot in enumerate(self.slots) if slot.answers_are_due]:
            states = self.driver.fetch(self.states)
            for index in due:
                self.slots[index].answer(unstack(states, index).sigma)
            self.ahead = None  # it was drawn from the rows before

    def _batches(self, later: int = 0) -> Rows | None:
        """The next batches of all prompts, stacked, in a shape that the driver's devices can share.

        Args:
          later: 1 for those of the step after it, if all goes well; there are none if they have no place in
            the shape of today.
        """
        drawn = [(slot.job.train, slot.drawn(later)) for slot in self.slots]
        packing = self.packing
        for rows, index in drawn:
            packing = packing.grown(rows.lengths[index])
        if later and (packing != self.packing or not any(len(index) for _, index in drawn)):
            return None
        if packing != self.packing:
            self.packing = packing
            self._pack_held_out()
        grid = packing.over(self.driver.multiple, self.longest)
        return _stacked([grid.pack(rows, index) for rows, index in drawn])

    def _step(self) -> None:
        """One step of all prompts, and the evaluation if it is due."""
        self._answer()
        batches = self._batches() if self.ahead is None else self.ahead
        assert batches is not None
        started, compiled = time.perf_counter(), compile_seconds()
        self.recent.append(self.states)
        states, metrics = self.driver.step(self.states, batches)
        self.ahead = self._batches(later=1)  # read and packed while the device works
        tokens_M = (batches.offsets != EMPTY).sum(axis=(1, 2)).tolist()
        stepping = [i for i, slot in enumerate(self.slots) if not slot.left and not slot.ended]
        values = jax.device_get(metrics)
        # Not before: an interrupt while waiting would leave states of a step without its lines.
        self.states, self.tick = states, self.tick + 1
        compiled = compile_seconds() - compiled
        seconds = (time.perf_counter() - started - compiled) / len(stepping)
        for index in stepping:
            slot, own = self.slots[index], {name: float(value_M[index]) for name, value_M in values.items()}
            slot.compile_seconds += compiled / len(stepping)
            if all(math.isfinite(value) for value in own.values()):
                slot.advance({"step": slot.step + 1, **own, "tokens": tokens_M[index], "seconds": seconds})
            else:
                self._fail(index, slot.step + 1, own)
        due = [i for i in stepping if self._at_evaluation() or self.slots[i].ended]
        self._evaluate(set(due))
        if self.tick % self.checkpoint_every == 0 or any(slot.finished for slot in self._live()):
            self._save()
        self._tell(set(stepping) - set(due))

    def _fail(self, index: int, step: int, values: dict[str, float]) -> None:
        """Ends a prompt: σ before the step may be what was wrong, the one before that was good."""
        slot = self.slots[index]
        summary = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        slot.error = f"Training stopped: step {step} is not finite ({summary}). Lower --learning-rate."
        before, now = (unstack(self.driver.fetch(states), index) for states in (self.recent[0], self.states))
        slot.good = dataclasses.replace(before, best_sigma=now.best_sigma, best_kl=now.best_kl)

    def _evaluate(self, indices: set[int]) -> None:
        """Measures the held-out KL of the prompts of these indices, and keeps the best σ."""
        if not indices:
            return
        states = self.driver.fetch(self.states)
        started, compiled = time.perf_counter(), compile_seconds()
        kl_M = processes.on_first_process(lambda: self.evaluate(states.sigma, self.held_out).tolist())
        compiled = compile_seconds() - compiled
        seconds = time.perf_counter() - started - compiled
        for index in sorted(indices):
            slot = self.slots[index]
            slot.compile_seconds += compiled / len(indices)
            slot.held_out_seconds += seconds / len(indices)
            if slot.error is None and math.isfinite(kl_M[index]):
                slot.lines[-1]["held_out_kl"] = kl_M[index]
            elif slot.error is None:
                self._fail(index, slot.step, {"held-out KL": kl_M[index]})
        good = [i in indices and self.slots[i].error is None for i in range(len(self.slots))]
        kl_M = np.where(good, np.array(kl_M, np.float32), np.nan)
        self.states = self.driver.place(_keep_best(states, kl_M.astype(np.float32)))
        self._tell(indices)

    def _tell(self, indices: set[int]) -> None:
        """Writes the new lines of these prompts, and calls the callbacks."""
        for index in sorted(indices):
            slot = self.slots[index]
            for line in slot.new_lines():
                metrics = {name: value for name, value in line.items() if name != "step"}
                sigma = functools.partial(self._sigma, index)
                step = Step(slot.job.id, line["step"], slot.steps, metrics, sigma)
                answers = [callback(step) for callback in self.callbacks]  # each hears of it
                slot.stopped |= True in answers

    def _tell_end(self, slot: Slot) -> None:
        """Tells the callbacks that want to know it that a training has ended."""
        for callback in self.callbacks:
            if (on_end := getattr(callback, "on_end", None)) is not None:
                on_end(slot.job.id)

    def _sigma(self, index: int) -> PyTree:
        return unstack(self.driver.fetch(self.states), index).sigma

    def _save(self) -> None:
        if self.checkpoints is not None and self.held_out:  # else not all is in place
            for slot in self._live():
                slot.write(safely=True)
            # Whose training has failed is not gone on with.
            going = [slot.job.id if not slot.left and slot.error is None else None for slot in self.slots]
            block = {"jobs": going, "tick": self.tick, "packing": dataclasses.astuple(self.packing)}
            block["lines"] = [None if slot.left else slot.checksum() for slot in self.slots]
            if any(slot.answers for slot in self._live()):
                block["answers"] = [None if slot.left else slot.answers for slot in self.slots]
            self.checkpoints.save(self.tick, self.driver.fetch(self.states), block)

    def _result(self, index: int, slot: Slot) -> TrainingResult:
        state = slot.good if slot.error else unstack(self.driver.fetch(self.states), index)
        seconds = slot.compile_seconds, slot.held_out_seconds
        return TrainingResult(slot.job.id, state, slot.lines, *seconds, error=slot.error)


def _stacked(batches: Sequence[Rows]) -> Rows:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


@jax.jit
def _keep_best(states: TrainState, kl_M: Float[AnyArray, " m"]) -> TrainState:
    def one(state: TrainState, kl: Any) -> TrainState:
        better = kl < state.best_kl
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), state.sigma, state.best_sigma)
        best_kl = jnp.where(better, kl, state.best_kl)
        return dataclasses.replace(state, best_sigma=best, best_kl=best_kl)

    return jax.vmap(one)(states, kl_M)


@contextlib.contextmanager
def _interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits for the end of the step: raised anywhere, it could leave a checkpoint's writer
    hanging. A second Ctrl-C is raised at once. Gives the function that raises a waiting one.
    """
    waiting = False

    def hold(*_: object) -> None:
        nonlocal waiting
        waiting = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check() -> None:
        if waiting:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check  # only the main thread may set handlers, and only it is interrupted
        return
    before = signal.signal(signal.SIGINT, hold)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
