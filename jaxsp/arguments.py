"""From the words of a command line to a command (tyro); a mistake in them is answered in one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import operator
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tyro

import jaxsp
from jaxsp.errors import UserError, check_unicode, suggestion

_Command = TypeVar("_Command")

_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)

_END_OF_HELP = """
jaxsp COMMAND --help shows the options of a command, jaxsp --version the version.
Completion for bash, zsh or tcsh: jaxsp --tyro-print-completion bash
"""


def parse(commands: Mapping[str, type[_Command]], arguments: list[str]) -> _Command:
    """The command that the arguments ask for.

    Args:
      commands: dataclasses by the names of commands, each with ``examples``, a line each.
      arguments: without the program; of none, help is shown.

    Raises:
      UserError: they can't be parsed.
      SystemExit: help or the version was asked for, and has been printed.
    """
    for word in arguments:
        check_unicode(word, f"The argument {word!a:.60}")
    arguments = arguments or ["--help"]
    if arguments == ["--version"]:
        print(f"jaxsp {jaxsp.__version__}")
        raise SystemExit
    name = arguments[0]
    _check_names(commands, *arguments)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                functools.reduce(operator.or_, commands.values()),
                prog="jaxsp",
                description="Soft prompts that stand in for long contexts.",
                args=arguments,
                config=_CONFIG,
            )
    except SystemExit as stop:
        if stop.code:
            help_ = f"jaxsp {name} --help" if name in commands else "jaxsp --help"
            raise UserError(f"{_in_a_sentence(box.getvalue())}; see {help_}.") from None
        if {"-h", "--help"} & set(arguments):
            print(_examples(commands[name]) if name in commands else _END_OF_HELP.strip())
        raise


def _check_names(commands: Mapping[str, type], name: str, *words: str) -> None:
    """Raises ``UserError`` for a command or an option that there is not, with the nearest that there is."""
    if name.startswith("-"):
        return
    if name not in commands:
        raise UserError(f"There is no command {name!r}{_or_see(suggestion(name, commands))} jaxsp --help.")
    options = {"--help", *_options(commands[name])}
    for word in itertools.takewhile(lambda word: word != "--", words):
        option = word.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option not in options:
            nearest = _or_see(suggestion(option, sorted(options)))
            raise UserError(f"There is no option {option}{nearest} jaxsp {name} --help.")


def _or_see(meant: str) -> str:
    return f"{meant} See" if meant.endswith("?") else f"{meant}; see"


def _options(kind: type) -> Iterator[str]:
    """The options of a command and of the groups in it."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.default):
            yield from _options(type(field.default))
        elif "Positional" not in str(field.type):
            yield f"--{field.name.replace('_', '-')}"
            yield from re.findall(r"--[\w-]+", str(field.type))  # its aliases


_NUMBERS = {  # what Python says of a number that is none
    r"Error parsing (\S+): invalid literal for int\(\) with base 10:": r"\1 must be a whole number, not",
    r"Error parsing (\S+): could not convert string to float:": r"\1 must be a number, not",
    # Of an option that may also be left out.
    r"Error parsing (\S+): no type matching INT could be instantiated from \['(.*?)'\]": (
        r"\1 must be a whole number, not '\2'"
    ),
    r"Error parsing (\S+): no type matching FLOAT could be instantiated from \['(.*?)'\]": (
        r"\1 must be a number, not '\2'"
    ),
}


def _in_a_sentence(box: str) -> str:
    """The complaint in tyro's box: below its title, above a rule and advice."""

    def is_rule(line: str) -> bool:
        return set(line) <= set("─-╰╯ ")

    # The box has no sides where all is ASCII.
    inside = re.sub("^│|│$", " ", box, flags=re.MULTILINE).splitlines()[1:]
    wrong = itertools.takewhile(lambda line: not is_rule(line), itertools.dropwhile(is_rule, inside))
    lines = textwrap.dedent("\n".join(wrong)).splitlines()
    if lines[0].startswith("Missing from"):
        return f"Missing: {' and '.join(line.strip() for line in lines if re.match(' {4}[^ ]', line))}"
    sentence = " ".join(line.strip() for line in lines)
    for theirs, ours in _NUMBERS.items():
        sentence = re.sub(theirs, ours, sentence)
    return sentence.rstrip(".")


def _examples(command: Any) -> str:
    return "examples:\n" + textwrap.indent(inspect.cleandoc(command.examples), "  ")


def program() -> str:
    """The words that call this program again from the same folder."""
    script = Path(sys.argv[0]).absolute()
    if script.name == "__main__.py":
        return f"{shlex.quote(_nearby(Path(sys.executable)))} -m jaxsp"
    # `uv run` puts the environment's programs on the path of its child alone.
    found = None if "UV_RUN_RECURSION_DEPTH" in os.environ else shutil.which(script.name)
    return script.name if found and script.samefile(found) else shlex.quote(_nearby(script))


def _nearby(file: Path) -> str:
    """The path from this folder, if it lies below."""
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)
