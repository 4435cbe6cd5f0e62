"""python -m experiments: lists the experiments, or runs one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from experiments import suite
from jaxsp.errors import UserError


@dataclasses.dataclass(frozen=True)
class Command:
    """Lists the experiments, or runs one."""

    name: tyro.conf.Positional[str] = ""
    """Experiment to run; without one all are listed."""
    full: bool = False
    """The whole run, into the experiment's folder. Without it: a small one, into a temporary folder."""
    only: tuple[str, ...] = ()
    """Settings to run; by default all, or the first one of a small run."""
    out: Path | None = None
    """Folder for the results, instead."""
    torch_python: str = sys.executable
    """A Python with torch, transformers and peft, for the experiments that compare with them."""
    redraw: bool = False
    """Draw all tables and pictures anew from the committed results; measures nothing."""


def show() -> None:
    """Prints the list."""
    table = Table("experiment", "question and result", "cost and command", show_lines=True)
    for name in suite.NAMES:
        row = suite.summary(name)
        table.add_row(
            f"[bold]{name}[/bold]\n{row['date']}\n{row['commit']}",
            f"{row['question']}\n[green]{row['result']}[/green]",
            f"{row['cost']}\n[cyan]{row['command']}[/cyan]",
        )
    Console().print(table)


def run(command: Command) -> None:
    """Runs an experiment and prints its table."""
    name = command.name
    if name not in suite.NAMES:
        raise UserError(f"There is no experiment {name!r}; there are {', '.join(suite.NAMES)}.")
    experiment = suite.load(name)
    settings = command.only or experiment.settings[: None if command.full else 1]
    if unknown := set(settings) - set(experiment.settings):
        raise UserError(f"{name} has no setting {min(unknown)!r}; it has {', '.join(experiment.settings)}.")
    committed = suite.HERE / name
    out = command.out or (committed if command.full else Path(tempfile.mkdtemp(prefix=f"{name}-")))
    out.mkdir(parents=True, exist_ok=True)
    if len(settings) == 1:
        suite.measure(name, settings[0], suite.Run(command.full, out, command.torch_python))
    else:  # each in a process of its own: its memory is counted from nothing
        options = ["--full"] * command.full + ["--out", str(out), "--torch-python", command.torch_python]
        for setting in settings:
            again = [sys.executable, "-m", "experiments", name, "--only", setting, *options]
            subprocess.run(again, check=True)
        return
    print(experiment.table(suite.read(out / experiment.file)))
    print(f"Results: {out / experiment.file}")
    if out == committed:
        suite.fill()


def main() -> None:
    command = tyro.cli(Command, prog="python -m experiments")
    try:
        if command.redraw:
            suite.redraw()
        elif command.name:
            run(command)
        else:
            show()
    except UserError as error:
        sys.exit(f"experiments: {error}")


if __name__ == "__main__":
    main()
