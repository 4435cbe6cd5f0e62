"""The training loop: batches in, evaluations, checkpoints and a line of metrics a step out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsp import processes as hosts
from jaxsp.data.packing import Packing
from jaxsp.data.examples import Rows
from jaxsp.training.checkpoint import Checkpoints
from jaxsp.training.drivers import Driver
from jaxsp.training.state import TrainState
from jaxsp.typing import EMPTY, Interrupted, PyTree, UserError


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How long and how often.

    Attributes:
      steps: updates in all.
      packing: the shape of every batch.
      evaluate_every: steps between held-out evaluations (there is one before the first step and one
        after the last, too).
      checkpoint_every: steps between checkpoints.
      patience: evaluations without a better one after which it stops; 0: it goes on to the end.
    """

    steps: int
    packing: Packing
    evaluate_every: int
    checkpoint_every: int
    patience: int = 0


class NonFiniteLoss(UserError):
    """The loss or its gradient became infinite or NaN.

    Attributes:
      state: the last good state.
    """

    def __init__(self, message: str, state: TrainState) -> None:
        super().__init__(message)
        self.state = state


@dataclasses.dataclass
class Watcher:
    """What wants to hear of the run as it goes; each field is optional.

    Attributes:
      metrics: a JSON-lines file that gets one line a step.
      checkpoints: where the state is saved.
      on_step: called with each line as a dict, e.g. to draw a progress bar.
    """

    metrics: Path | None = None
    checkpoints: Checkpoints | None = None
    on_step: Callable[[dict[str, Any]], None] = lambda line: None


def train(
    driver: Driver,
    state: TrainState,
    rows: Rows,
    settings: LoopSettings,
    *,
    evaluate: Callable[[PyTree], float],
    watcher: Watcher,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Updates σ for ``settings.steps`` steps, keeping the one with the lowest held-out KL.

    Args:
      driver: runs the update.
      state: where to start; not at step 0 when a run is resumed.
      rows: training rows with the teacher's hidden states.
      settings: how long and how often.
      evaluate: held-out KL of a σ, in nats.
      watcher: hears of every step.

    Returns:
      The final state, and the lines of ``metrics.jsonl`` (those of a resumed run's past included).

    Raises:
      Interrupted: on Ctrl-C.
      NonFiniteLoss: the loss or the gradient is no longer finite.
    """
    lines = hosts.first(lambda: _past_lines(watcher.metrics, int(state.step)))
    packing = settings.packing
    spread = packing.over(driver.multiple, int(rows.lengths.max()))
    placed = driver.place(state)
    order = np.asarray(state.key)

    def save(state: TrainState) -> None:
        if watcher.checkpoints:
            watcher.checkpoints.save(state)

    def measured(state: TrainState) -> TrainState:
        kl = hosts.first(lambda: float(evaluate(state.sigma)))
        if not math.isfinite(kl):
            raise NonFiniteLoss(non_finite(int(state.step), {"held-out KL": kl}), good)
        if kl < float(state.best_kl):
            state = dataclasses.replace(state, best_sigma=state.sigma, best_kl=jnp.float32(kl))
        lines[-1]["held_out_kl"] = kl
        return state

    good = state
    try:
        with _interrupts_between_steps() as check_interrupt:
            if not lines:
                lines.append({"step": 0})
                good = state = measured(state)
                placed = driver.place(state)
                save(state)
                _write(watcher.metrics, lines)
                watcher.on_step(lines[-1])
            for step in range(int(state.step), settings.steps):
                if out_of_patience(lines, settings.patience):
                    save(state)
                    break
                started = time.perf_counter()
                drawn = packing.draw(rows.lengths, int(state.cursor), order)
                batch = spread.pack(rows, drawn)
                placed, metrics = driver.step(placed, batch)
                values = {name: float(value) for name, value in metrics.items()}
                if not all(math.isfinite(value) for value in values.values()):
                    raise NonFiniteLoss(non_finite(step + 1, values), good)
                good, state = state, driver.fetch(placed)
                lines.append(
                    {
                        "step": step + 1,
                        **values,
                        "tokens": int(np.sum(batch.offsets != EMPTY)),
                        "seconds": time.perf_counter() - started,
                    }
                )
                last = step + 1 == settings.steps
                if last or (step + 1) % settings.evaluate_every == 0:
                    state = measured(state)
                    placed = driver.place(state)
                _write(watcher.metrics, lines[-1:])
                if last or (step + 1) % settings.checkpoint_every == 0:
                    save(state)
                watcher.on_step(lines[-1])
                check_interrupt()
    except KeyboardInterrupt:
        save(state)
        raise Interrupted(
            f"Interrupted after step {int(state.step)} of {settings.steps}."
        ) from None
    return state, lines


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


def out_of_patience(lines: list[dict[str, Any]], patience: int) -> bool:
    """Whether the last ``patience`` held-out evaluations were no better than one before them."""
    held_out = [line["held_out_kl"] for line in lines if "held_out_kl" in line]
    if not patience or len(held_out) <= patience:
        return False
    return min(held_out[-patience:]) >= min(held_out[:-patience])


def non_finite(step: int, values: dict[str, float]) -> str:
    """What to say of a step whose metrics are not finite."""
    told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    return f"Training stopped: step {step} is not finite ({told}). Lower --learning-rate."


def _past_lines(file: Path | None, step: int) -> list[dict[str, Any]]:
    """The lines up to ``step``; later ones, of steps that a resumed run repeats, are dropped."""
    if file is None or not file.exists():
        return []
    lines = []
    for text in file.read_text("utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break  # half a line: the run was killed while writing it
        if line["step"] > step:
            break
        lines.append(line)
    scratch = file.with_suffix(".part")
    scratch.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    scratch.replace(file)
    return lines


def _write(file: Path | None, lines: list[dict[str, Any]]) -> None:
    if file is not None and hosts.is_first():
        with file.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)
