"""Progress of a long run (rich), and the seconds of each part."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from jaxsp.terminal import visible

WAIT = 0.2
"""Seconds between two changes of what a notebook shows, at least."""


class _Output:
    """An output of a notebook's cell, written anew in place: as text, so that it needs no widgets."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._handle, self._shown = quiet, None, -math.inf

    def show(self, thing: RenderableType, *, at_once: bool = False) -> None:
        """Writes it; what comes too soon after the last one is left out, unless it is to be there at once."""
        now = time.monotonic()
        if self._quiet or (now < self._shown + WAIT and not at_once):
            return
        from IPython.display import display

        console = Console(file=io.StringIO(), force_jupyter=False, color_system=None, width=120)
        with console.capture() as captured:
            console.print(thing)
        text = {"text/plain": captured.get().rstrip()}
        if self._handle is None:
            self._handle: Any = display(text, raw=True, display_id=True)
        else:
            self._handle.update(text, raw=True)
        self._shown = now


class _BarInNotebook(Progress):
    """A bar that is such an output. rich's own is a widget, whose thread writes into other cells, too."""

    def __init__(self, *columns: Any, console: Console, disable: bool) -> None:
        super().__init__(*columns, console=console, disable=True)
        self._output = _Output(disable)

    def update(self, *arguments: Any, **changes: Any) -> None:
        super().update(*arguments, **changes)
        if self.tasks[0].visible:
            self._output.show(self, at_once=self.finished)

    def stop(self) -> None:
        if self.tasks and self.tasks[0].visible:
            self._output.show(self, at_once=True)


class Display:
    """Shows phases on standard error, or as a cell's output, and keeps how long each took.

    Args:
      visible: whether anything is shown; the seconds are kept all the same.

    Attributes:
      seconds: by phase; what was compiled meanwhile counts under ``compile``.
    """

    def __init__(self, visible: bool = True) -> None:
        self._console = Console(stderr=True, quiet=not visible)
        self.seconds: dict[str, float] = {}
        self._training: Progress | None = None

    def say(self, text: str) -> None:
        self._console.print(visible(text), highlight=False, markup=False, emoji=False, soft_wrap=True)

    @contextlib.contextmanager
    def phase(self, name: str, title: str) -> Iterator[Callable[[str], None]]:
        """A phase of unknown length; the function it gives changes the text beside the spinner."""
        if self._training is not None:
            self._training.stop()  # two can't be shown at once
        started, compiled = time.perf_counter(), compile_seconds()
        output = _Output(self._console.quiet) if self._console.is_jupyter else None
        if output is not None:
            output.show(Text(title))
            yield lambda text: output.show(Text(visible(f"{title}: {text}")))
        else:
            with self._console.status(Text(title)) as spinner:
                yield lambda text: spinner.update(Text(visible(f"{title}: {text}")))
        seconds, compiled = time.perf_counter() - started, compile_seconds() - compiled
        self.add(name, seconds - compiled)
        self.add("compile", compiled)
        if output is not None:
            output.show(Text(f"{title}: {seconds:.1f} s"), at_once=True)
        else:
            self.say(f"{title}: {seconds:.1f} s")

    def add(self, name: str, seconds: float) -> None:
        """Notes seconds of a phase that was timed elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextlib.contextmanager
    def training(self, steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        """The bar of one prompt's training; the function it gives takes a line of ``metrics.jsonl``."""
        shown: dict[str, Any] = {"loss": math.nan, "held_out": math.nan, "rate": 0.0}
        self._training = progress = self._bar(
            TextColumn("Training step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn(
                "loss {task.fields[loss]:.3f} · held-out KL {task.fields[held_out]:.3f}"
                " · {task.fields[rate]:,.0f} tokens/s ·"
            ),
        )
        task = progress.add_task("", total=steps, visible=False, **shown)

        def on_step(line: dict[str, Any]) -> None:
            progress.start()  # not before the phases that come first
            shown["held_out"] = line.get("held_out_kl", shown["held_out"])
            if "loss" in line:
                shown["loss"] = line["loss"]
                shown["rate"] = line["tokens"] / line["seconds"]
            progress.update(task, completed=line["step"], visible=True, **shown)

        try:
            yield on_step
        finally:
            progress.stop()

    @contextlib.contextmanager
    def jobs(self, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
        """The bar of many jobs; the function it gives takes how many more are done, and what goes on."""
        progress = self._bar(
            TextColumn("{task.completed}/{task.total} prompts"),
            BarColumn(),
            TextColumn("{task.description} ·", markup=False),
        )
        with progress:
            task = progress.add_task("", total=total, completed=done)
            yield lambda more, text: progress.update(task, advance=more, description=visible(text))

    def _bar(self, *columns: Any) -> Progress:
        left = TimeRemainingColumn(), TextColumn("left")
        kind = _BarInNotebook if self._console.is_jupyter else Progress
        return kind(*columns, *left, console=self._console, disable=self._console.quiet)


@functools.cache
def _compile_clock() -> list[float]:
    """One number: the seconds that this process has spent lowering and compiling since it was first asked."""
    import jax.monitoring

    clock = [0.0]
    counted = ("jaxpr_to_mlir_module_duration", "backend_compile_duration")

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith(counted):
            clock[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    return clock


def compile_seconds() -> float:
    """Seconds spent compiling so far; only differences mean anything."""
    return _compile_clock()[0]
