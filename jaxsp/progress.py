"""What a long run shows while it works (rich): phases, and the training bar."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class Display:
    """Shows phases on standard error and keeps how long each took.

    Args:
      visible: whether anything is shown; the seconds are kept all the same.
    """

    def __init__(self, visible: bool = True) -> None:
        self._console = Console(stderr=True, quiet=not visible)
        self.seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def phase(self, name: str, title: str) -> Iterator[Callable[[str], None]]:
        """A phase of unknown length; the function it gives changes the text beside the spinner."""
        started = time.perf_counter()
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            transient=True,
            disable=self._console.quiet,  # a notebook would get an empty widget
        ) as progress:
            task = progress.add_task(title, total=None)
            yield lambda text: progress.update(task, description=f"{title}: {text}")
        self._add(name, started)
        self.say(f"{title}: {time.perf_counter() - started:.1f} s")

    @contextlib.contextmanager
    def training(self, steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        """The training bar; the function it gives takes a line of ``metrics.jsonl``."""
        started = time.perf_counter()
        shown: dict[str, Any] = {"loss": math.nan, "held_out": math.nan, "rate": 0.0}

        with Progress(
            TextColumn("Training step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn(
                "loss {task.fields[loss]:.3f} · held-out KL {task.fields[held_out]:.3f}"
                " · {task.fields[rate]:,.0f} tokens/s ·"
            ),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            disable=self._console.quiet,
        ) as progress:
            task = progress.add_task("", total=steps, **shown)

            def on_step(line: dict[str, Any]) -> None:
                shown["held_out"] = line.get("held_out_kl", shown["held_out"])
                if "loss" in line:
                    shown["loss"] = line["loss"]
                    shown["rate"] = line["tokens"] / line["seconds"]
                progress.update(task, completed=line["step"], **shown)

            yield on_step
        self._add("train", started)

    @contextlib.contextmanager
    def jobs(self, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
        """The bar of many jobs; the function it gives takes how many more are done, and what goes on."""
        with Progress(
            TextColumn("{task.completed}/{task.total} prompts"),
            BarColumn(),
            TextColumn("{task.description} ·"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            disable=self._console.quiet,
        ) as progress:
            task = progress.add_task("", total=total, completed=done)
            yield lambda more, text: progress.update(task, advance=more, description=text)

    def _add(self, name: str, started: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
