"""The command `jaxsp watch`: a run's progress from another terminal."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import tyro

from jaxsp.options import Folder


@dataclasses.dataclass(frozen=True)
class Watch:
    """Show the progress of a run, live, from another terminal, until it ends or Ctrl-C; loads no model."""

    examples: ClassVar[str] = """
      jaxsp watch prompt/
      jaxsp watch many/
    """
    directory: tyro.conf.Positional[Folder]
    """The folder that compress or compress-many writes (--out)."""

    def run(self) -> None:
        from jaxsp.watching import watch

        watch(self.directory)
