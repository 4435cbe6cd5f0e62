"""python -m experiments: lists the experiments, or runs one."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments import suite
from jaxsp.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The options. By argparse, so that a machine with an accelerator needs no more than it has anyway."""
    options = argparse.ArgumentParser(
        prog="python -m experiments", description="Lists the experiments, or runs one.", allow_abbrev=False
    )
    add = options.add_argument
    add("name", nargs="?", default="", help="experiment to run; without one all are listed")
    add(
        "--full", action="store_true",
        help="the whole run, into the experiment's folder; without it a small one, into a temporary folder",
    )  # fmt: skip
    add(
        "--only", nargs="+", default=[], metavar="SETTING",
        help="settings to run; by default all, or those of a small run",
    )  # fmt: skip
    add("--out", type=Path, metavar="FOLDER", help="folder for the results, instead")
    add(
        "--torch-python", default=sys.executable, metavar="PYTHON",
        help="a Python with torch, transformers and peft, for the experiments that compare with them",
    )  # fmt: skip
    add(
        "--redraw", action="store_true",
        help="draw all tables and pictures anew from the committed results; measures nothing",
    )  # fmt: skip
    return options


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


def run(command: argparse.Namespace) -> None:
    """Runs an experiment and prints its table."""
    name = command.name
    if name not in suite.NAMES:
        raise UserError(f"There is no experiment {name!r}; there are {', '.join(suite.NAMES)}.")
    experiment = suite.load(name)
    small = experiment.small or experiment.settings[:1]
    settings = command.only or (experiment.settings if command.full else small)
    if unknown := set(settings) - set(experiment.settings):
        raise UserError(f"{name} has no setting {min(unknown)!r}; it has {', '.join(experiment.settings)}.")
    committed = suite.HERE / name
    out = command.out or (committed if command.full else Path(tempfile.mkdtemp(prefix=f"{name}-")))
    out.mkdir(parents=True, exist_ok=True)
    if len(settings) == 1:
        suite.measure(name, settings[0], suite.Run(command.full, out, command.torch_python))
    else:  # each in a process of its own: its memory is counted from nothing
        options = ["--full"] * command.full + ["--out", str(out), "--torch-python", command.torch_python]
        crashed = []
        for setting in settings:
            again = [sys.executable, "-m", "experiments", name, "--only", setting, *options]
            code = subprocess.run(again, check=False).returncode
            if code > 0:  # it has told why
                sys.exit(code)
            if code < 0:
                crashed.append(f"{setting} (signal {-code})")
        if crashed:
            raise UserError(f"The process ended by itself in {', '.join(crashed)}; the others are measured.")
        return
    print(experiment.table(suite.read(out / experiment.file)))
    print(f"Results: {out / experiment.file}")
    if out == committed:
        suite.fill()


def main() -> None:
    command = parser().parse_args()
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
