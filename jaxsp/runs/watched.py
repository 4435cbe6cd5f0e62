"""A run as another process sees it while it is written: how far each of its prompts is."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from jaxsp.errors import Damaged, UserError
from jaxsp.files import as_path, parse_json, read_json
from jaxsp.runs.folder import RunFolder

RECENT = 20
"""Steps whose seconds say how long the others will take."""


class WatchedPrompt:
    """A prompt of a run, in training or finished.

    Attributes:
      folder: its paths.
      steps: steps of its training, if that is known.
      lines: a dict of metrics a step, as far as they are written.
      report: ``report.json``, once it is there.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.steps: int | None = None
        self.lines: list[dict[str, Any]] = []
        self.report: dict[str, Any] | None = None
        self._file: tuple[int, int] = (0, 0)  # the metrics' inode, and the bytes of it that were read
        self._settings: int | None = None

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.directory.name

    @property
    def step(self) -> int | None:
        """Steps done; ``None`` before training."""
        return self.lines[-1]["step"] if self.lines else None

    @property
    def is_in_training(self) -> bool:
        """Whether there are steps to come."""
        step, steps = self.step, self.steps
        return self.report is None and step is not None and (steps is None or step < steps)

    def look(self) -> None:
        """Reads what is new. What is just being written comes the next time."""
        with contextlib.suppress(OSError, Damaged):
            changed = self.folder.settings.stat().st_mtime_ns
            if changed != self._settings:
                steps = read_json(self.folder.settings).get("steps")
                self.steps, self._settings = steps if isinstance(steps, int) else None, changed
        self.report = None
        with contextlib.suppress(OSError, Damaged):
            self.report = read_json(self.folder.report, finite=False)
        try:
            with self.folder.metrics.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._file[0] or os.fstat(file.fileno()).st_size < self._file[1]:
                    self.lines, self._file = [], (inode, 0)  # begun anew, or gone on with
                file.seek(self._file[1])
                whole, end, _ = file.read().rpartition(b"\n")
        except OSError:
            self.lines, self._file = [], (0, 0)
            return
        self._file = inode, self._file[1] + len(whole) + len(end)
        for text in whole.splitlines():
            with contextlib.suppress(Damaged):
                line = parse_json(text, self.folder.metrics, finite=False)
                if isinstance(line.get("step"), int):
                    self.lines.append(line)

    def series(self, name: str) -> list[tuple[int, float]]:
        """A metric by the steps at which it is known."""
        return [(line["step"], line[name]) for line in self.lines if isinstance(line.get(name), int | float)]

    def seconds_left(self, beside: int) -> float | None:
        """Seconds that its other steps will take, about; ``None``: not known.

        Args:
          beside: prompts in training, itself included: each step's seconds are shared between them.
        """
        recent = [seconds for _, seconds in self.series("seconds")[-RECENT:]]
        if not recent or self.step is None or self.steps is None:
            return None
        return sum(recent) / len(recent) * beside * max(self.steps - self.step, 0)


class WatchedRun:
    """A run of one prompt, or of many.

    Args:
      directory: its folder.

    Raises:
      UserError: there is no run in it.
    """

    def __init__(self, directory: str | Path) -> None:
        folder = as_path(directory, "The folder")
        self.folder = RunFolder(folder.parent if folder.is_file() else folder)
        settings = self.folder.settings
        if not settings.is_file():
            raise UserError(
                f"{self.folder.directory} holds no run (no {settings.relative_to(self.folder.directory)})."
            )
        self.is_many = "settings" in read_json(settings)
        self.prompts: list[WatchedPrompt] = [] if self.is_many else [WatchedPrompt(self.folder)]

    def look(self) -> None:
        """Reads what is new of all prompts."""
        if self.is_many:
            known = {prompt.folder.directory for prompt in self.prompts}
            found = sorted(file.parents[1] for file in self.folder.directory.glob("*/run/settings.json"))
            self.prompts += [WatchedPrompt(RunFolder(place)) for place in found if place not in known]
        for prompt in self.prompts:
            if not (self.is_many and prompt.report):  # of many, those that are finished stay so
                prompt.look()

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come: its report is there, or no process is at work in its folder."""
        if not self.is_many and self.folder.report.is_file():
            return True
        above = RunFolder(self.folder.directory.absolute().parent)
        places = [self.folder] if self.is_many else [self.folder, above]  # of a job of many
        return not any(place.settings.is_file() and place.is_at_work for place in places)

    @property
    def finished(self) -> int:
        """The number of prompts that have a report."""
        return sum(prompt.report is not None for prompt in self.prompts)

    @property
    def in_training(self) -> list[WatchedPrompt]:
        """The prompts whose steps are under way."""
        return [prompt for prompt in self.prompts if prompt.is_in_training]
