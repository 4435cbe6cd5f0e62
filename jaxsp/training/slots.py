"""A prompt in training: what goes in, what the host keeps of it while it trains, and what comes out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxsp import processes
from jaxsp.data.examples import Rows
from jaxsp.data.packing import Packing
from jaxsp.errors import Damaged
from jaxsp.files import as_read, atomic_write, flush, parse_json, read_whole
from jaxsp.training.state import TrainState
from jaxsp.typing import PyTree

OwnAnswers = list[list[int] | None]
"""The prompt's own answer to each training query, as token ids; ``None``: the teacher's is in use."""


@dataclasses.dataclass(frozen=True)
class OnPolicy:
    """Training on the prompt's own answers, which are made anew from time to time.

    Both functions give the same for the same arguments: a resumed run trains on the same rows.

    Attributes:
      every: steps that answers are in use.
      longest: tokens of the longest sequence that there may be.
      refreshed: from σ and the number of its steps to new answers, and the training rows with them: the
        teacher's targets are those on these answers.
      rows: from answers to the same rows.
    """

    every: int
    longest: int
    refreshed: Callable[[PyTree, int], tuple[OwnAnswers, Rows]]
    rows: Callable[[OwnAnswers], Rows]


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """A prompt to train.

    Attributes:
      id: its name, for callbacks and checkpoints.
      state: where it starts.
      train: rows with the teacher's targets.
      held_out: likewise.
      packing: the shape that decides what is drawn for each step.
      patience: evaluations without a better one after which it stops; 0: it goes on to the end.
      metrics: a JSON-lines file that gets one line a step; those of steps beyond ``state`` are dropped.
      on_policy: the rule by which ``train`` changes; ``None``: it stays as it is.
    """

    id: str
    state: TrainState
    train: Rows
    held_out: Rows
    packing: Packing
    patience: int = 0
    metrics: Path | None = None
    on_policy: OnPolicy | None = None


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """A prompt whose training has ended.

    Attributes:
      id: id of its job.
      state: at the end; of a failed one, the last that was good.
      lines: a dict of metrics a step; ``seconds`` is this prompt's share of the step.
      compile_seconds: its share of what was compiled meanwhile.
      held_out_seconds: its share of the evaluations on held-out queries.
      error: why it failed, if it did.
    """

    id: str
    state: TrainState
    lines: list[dict[str, Any]]
    compile_seconds: float
    held_out_seconds: float
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of one prompt, as callbacks hear of it.

    Attributes:
      job: id of the prompt.
      number: steps done, 0 before the first.
      steps: steps of the run.
      metrics: ``loss``, ``gradient_norm``, ``learning_rate``, ``answer_tokens``, ``tokens``, ``seconds``; and
        ``held_out_kl`` where it was evaluated.
      sigma: gives the prompt after the step.
    """

    job: str
    number: int
    steps: int
    metrics: dict[str, Any]
    sigma: Callable[[], PyTree]


Callback = Callable[[Step], bool | None]
"""Called after every step of every prompt; if it returns ``True`` the prompt stops at its next evaluation. Of
several processes each calls its own, and they must say the same. A method ``on_end``, if it has one, is
called with the id of each prompt whose training has ended, whatever the reason."""


class Slot:
    """A prompt in training, as the host sees it."""

    def __init__(self, job: TrainingJob, *, left: bool = False) -> None:
        self.job, self.left = job, left  # left: its place is free
        self.step, self.cursor = int(job.state.step), int(job.state.cursor)
        self.steps = int(job.state.schedule.steps)
        self.order = np.asarray(job.state.key)
        self.lines = past_lines(job.metrics, self.step)
        if self.lines and job.metrics is not None and processes.is_first():
            atomic_write(job.metrics, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.fresh = not self.lines
        self.stopped = False
        self.error: str | None = None
        self.good = job.state  # of a failed one: the last state that was good
        self.compile_seconds = self.held_out_seconds = 0.0
        self.answers: OwnAnswers | None = None  # those in use
        self._answered = -1  # the step at which they were made
        self._written = self._given = len(self.lines)
        self._sum, self._summed = hashlib.sha256(), 0  # of the lines, so that each is read once
        self._drawn: dict[int, np.ndarray] = {}  # by cursor
        if self.fresh:
            self.lines.append({"step": self.step})

    @property
    def ended(self) -> bool:
        """Whether there is no further step for it."""
        return self.error is not None or self.step >= self.steps

    @property
    def finished(self) -> bool:
        """Whether it can leave its slot; if it stops before its last step, at an evaluation."""
        if self.ended or "held_out_kl" not in self.lines[-1]:
            return self.ended
        return self.stopped or out_of_patience(self.lines, self.job.patience)

    @property
    def answers_are_due(self) -> bool:
        """Whether its own answers are to be made before the next step."""
        policy = self.job.on_policy
        if policy is None or self.left or self.finished or self._answered == self.step:
            return False
        return self.step % policy.every == 0

    def answer(self, sigma: PyTree) -> None:
        """Makes its own answers, as σ is now, and trains on them from here on."""
        if (policy := self.job.on_policy) is not None:
            self._answered = self.step
            self._train_on(*policy.refreshed(sigma, self.step))

    def go_on_with(self, answers: OwnAnswers | None) -> None:
        """Trains on the answers that it had when it was saved, if it had any.

        In a slot that is free they are of a prompt that has ended.
        """
        if answers is not None and not self.left and (policy := self.job.on_policy) is not None:
            self._train_on(answers, policy.rows(answers))

    def _train_on(self, answers: OwnAnswers, rows: Rows) -> None:
        self.answers, self._drawn = answers, {}
        self.job = dataclasses.replace(self.job, train=rows)

    def drawn(self, later: int = 0) -> np.ndarray:
        """The rows of the next step, which its own shape decides; none if it has ended.

        Args:
          later: 1 for those of the step after it.
        """
        if self.left or self.error is not None or self.step + later >= self.steps:
            return np.zeros(0, int)
        cursor = self.cursor + sum(len(self.drawn(before)) for before in range(later))
        if cursor not in self._drawn:
            self._drawn[cursor] = self.job.packing.draw(self.job.train.lengths, cursor, self.order)
        return self._drawn[cursor]

    def advance(self, line: dict[str, Any]) -> None:
        """Notes that the step on the rows drawn is done."""
        rows = self.drawn()
        del self._drawn[self.cursor]
        self.cursor += len(rows)
        self.step += 1
        self.lines.append(line)

    def new_lines(self) -> list[dict[str, Any]]:
        """The lines not yet given out; they are also written."""
        self.write()
        lines, self._given = self.lines[self._given :], len(self.lines)
        return lines

    def checksum(self) -> str:
        """``lines_checksum`` of the lines; none of them may change from now on."""
        for line in self.lines[self._summed :]:
            self._sum.update(_canonical(line))
        self._summed = len(self.lines)
        return self._sum.hexdigest()

    def write(self, *, safely: bool = False) -> None:
        """Puts the lines into their file; ``safely``: a checkpoint needs them, whatever happens."""
        lines, self._written = self.lines[self._written :], len(self.lines)
        if self.job.metrics is not None and (lines or safely) and processes.is_first():
            with self.job.metrics.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
                if safely:
                    flush(file)


def lines_checksum(lines: Iterable[dict[str, Any]]) -> str:
    """SHA-256 of the lines of a run, however they are written.

    Example:
      >>> lines_checksum([{"step": 0, "loss": 1.0}]) == lines_checksum([{"loss": 1.0, "step": 0}])
      True
    """
    return hashlib.sha256(b"".join(map(_canonical, lines))).hexdigest()


def _canonical(line: dict[str, Any]) -> bytes:
    return json.dumps(as_read(line), sort_keys=True).encode() + b"\n"


def all_lengths(slot: Slot) -> np.ndarray:
    """The lengths of all of a prompt's sequences, and of the longest that may yet come."""
    longest = [slot.job.on_policy.longest] if slot.job.on_policy else []
    return np.concatenate([slot.job.train.lengths, slot.job.held_out.lengths, longest]).astype(int)


def next_batches(slot: Slot, count: int = 8) -> Iterator[np.ndarray]:
    """The lengths of the sequences of a prompt's next batches."""
    lengths, cursor = slot.job.train.lengths, slot.cursor
    for _ in range(count):
        index = slot.job.packing.draw(lengths, cursor, slot.order)
        cursor += len(index)
        yield lengths[index]


def out_of_patience(lines: list[dict[str, Any]], patience: int) -> bool:
    """Whether the last ``patience`` held-out evaluations were no better than one before them."""
    held_out = [line["held_out_kl"] for line in lines if "held_out_kl" in line]
    if not patience or len(held_out) <= patience:
        return False
    return min(held_out[-patience:]) >= min(held_out[:-patience])


def past_lines(file: Path | None, step: int) -> list[dict[str, Any]]:
    """The lines of the steps from 0 to ``step``; later ones are of steps that a resumed run repeats.

    Args:
      file: the metrics; there are no lines if it is ``None`` or not there.
      step: the last one done.

    Raises:
      Damaged: a line is missing, or is none.
    """
    if file is None or not file.exists():
        return []
    lines = read_whole(file).splitlines()[: step + 1]
    found = [parse_json(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1)]
    for number, line in enumerate(found):
        if line.get("step") != number:
            there = f"is that of step {line.get('step')!r}, not {number}"
            raise Damaged(f"{file}, line {number + 1} {there}: lines are missing or damaged")
    if len(found) <= step:
        raise Damaged(f"{file} lacks the line of step {len(found)}")
    return found
