"""A run shown in the terminal while it is written (rich)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jaxsp.runs.watched import WatchedPrompt, WatchedRun
from jaxsp.terminal import duration, visible

WIDTH, HEIGHT = 60, 4
"""Characters of a curve."""

MOST_ROWS = 20
"""Prompts of many that are shown."""

_BLOCKS = " ▁▂▃▄▅▆▇█"
MANY_TIMES = 20.0
"""Largest over smallest value from which a curve is logarithmic."""


def watch(
    directory: str,
    console: Console | None = None,
    every: float = 1.0,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Shows a run until it ends, or Ctrl-C.

    Args:
      directory: its folder.
      console: where; by default standard output.
      every: seconds between two looks.
      sleep: waits.

    Raises:
      UserError: there is no run in the folder.
    """
    run, console = WatchedRun(directory), console or Console(highlight=False)
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                has_ended = run.has_ended  # before it looks: it misses nothing that was written
                run.look()
                live.update(view(run, has_ended), refresh=True)
                if has_ended:
                    return
                sleep(every)
    except KeyboardInterrupt:
        return
    finally:
        if not console.is_terminal:  # a terminal's line has been ended
            console.line()


def view(run: WatchedRun, has_ended: bool) -> RenderableType:
    """The picture of a run as it is now."""
    return (
        _many(run, has_ended) if run.is_many else _one(run.prompts[0], str(run.folder.directory), has_ended)
    )


def _one(prompt: WatchedPrompt, name: str, has_ended: bool) -> RenderableType:
    parts: list[RenderableType] = [Text(f"{visible(name)}: {_state(prompt, has_ended, 1)}")]
    if prompt.step is None:
        return Group(*parts)
    if prompt.steps:
        done = min(WIDTH * prompt.step // prompt.steps, WIDTH)
        parts.append(Text("━" * done + "─" * (WIDTH - done)))
    for metric, title in (("held_out_kl", "held-out KL"), ("loss", "training loss")):
        if points := [(step, y) for step, y in prompt.series(metric) if math.isfinite(y)]:
            values = [y for _, y in points]
            best = f", lowest {min(values):.3f}" if metric == "held_out_kl" else ""
            parts.append(Text(f"{title} {values[-1]:.3f}{best} (from {values[0]:.3f})"))
            parts += map(Text, curve(points, prompt.steps or points[-1][0], WIDTH, HEIGHT))
    return Group(*parts)


def _many(run: WatchedRun, has_ended: bool) -> RenderableType:
    training = run.in_training
    state = "ended" if has_ended else f"{len(training)} in training"
    title = Text(f"{visible(str(run.folder.directory))}: {run.finished} finished, {state}")
    table = Table("id", "", "held-out KL", "lowest", "curve", box=None, padding=(0, 2, 0, 0))
    order = [*training, *(p for p in reversed(run.prompts) if p not in training)]
    for prompt in order[:MOST_ROWS]:
        points = [(step, y) for step, y in prompt.series("held_out_kl") if math.isfinite(y)]
        values = [y for _, y in points]
        figures = [f"{values[-1]:.3f}", f"{min(values):.3f}"] if values else ["", ""]
        (line,) = curve(points, prompt.steps or 1, 16, 1) if points else [""]
        state = _state(prompt, has_ended, max(len(training), 1))
        table.add_row(*map(Text, (visible(prompt.name), state, *figures, line)))
    more = [Text(f"and {len(order) - MOST_ROWS} more")] if order[MOST_ROWS:] else []
    return Group(title, table, *more)


def _state(prompt: WatchedPrompt, has_ended: bool, beside: int) -> str:
    """A prompt's progress, in words."""
    if prompt.report is not None:
        error = prompt.report.get("error")
        return f"failed: {visible(str(error))}" if error else f"finished after {prompt.step or 0} steps"
    if prompt.step is None:
        return "ended before its first step" if has_ended else "no step yet: the teacher answers first"
    where = f"step {prompt.step}" + (f" of {prompt.steps}" if prompt.steps is not None else "")
    if has_ended:
        return f"interrupted at {where}; --resume goes on"
    if not prompt.is_in_training:
        return f"{where}, being measured"
    left = prompt.seconds_left(beside)
    return where if left is None else f"{where}, about {duration(left)} left"


def curve(points: Sequence[tuple[int, float]], steps: int, width: int, height: int) -> list[str]:
    """A curve of blocks, the lowest value at the bottom; on a logarithmic scale, if it spans much.

    Args:
      points: steps with their values, ascending.
      steps: steps of the whole width.
      width: characters.
      height: lines.

    Returns:
      The lines, from the top.

    Example:
      >>> curve([(0, 3.0), (2, 1.0), (4, 0.0)], 4, 5, 1)
      ['██▃▃▁']
    """
    values = [y for _, y in points]
    if min(values) > 0 and max(values) > MANY_TIMES * min(values):
        points = [(step, math.log(y)) for step, y in points]
        values = [y for _, y in points]
    low, span = min(values), (max(values) - min(values)) or 1.0
    heights = list[int]()
    place = 0
    for column in range(width):
        step = column * steps / max(width - 1, 1)
        if step > points[-1][0]:
            break
        while place + 1 < len(points) and points[place + 1][0] <= step:
            place += 1
        heights.append(1 + round((8 * height - 1) * (points[place][1] - low) / span))
    rows = range(height - 1, -1, -1)
    return ["".join(_BLOCKS[min(max(h - 8 * row, 0), 8)] for h in heights) for row in rows]
