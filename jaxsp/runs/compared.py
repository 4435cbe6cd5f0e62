"""The runs that are compared, read from their folders."""

from __future__ import annotations

import contextlib
import os
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsp.artifact import CONTEXT
from jaxsp.errors import Damaged, UserError, in_a_line
from jaxsp.evaluation.compare import MOST_CURVES, Comparison, Run, compare, html
from jaxsp.files import as_path, read_json_lines
from jaxsp.runs.folder import METRICS, PAGE, REPORT, finished_runs, read_report

_MADE_HERE = b'<meta name="generator" content="jaxsp">'


def check_out(file: Path) -> None:
    """Raises ``UserError`` if a page can't be written there, or would replace another file than a page."""
    if file.is_dir():
        raise UserError(f"{file} is a folder; give a file with --out.")
    if not file.parent.is_dir():
        raise UserError(f"There is no folder {file.parent}; choose another with --out.")
    if file.name == PAGE and (file.parent / REPORT).exists():
        raise UserError(f"{file} is the report of a run; choose another file with --out.")
    if file.exists():
        with file.open("rb") as page:
            if _MADE_HERE not in page.read(4096):
                raise UserError(
                    f"{file} is there already and is no page of jaxsp; choose another with --out."
                )


_DAMAGE = (KeyError, TypeError, AttributeError, ValueError, IndexError, ArithmeticError)


def compare_folders(directories: Sequence[str], out: Path) -> tuple[Comparison, list[str], str]:
    """The comparison of the runs in some folders, what is wrong with those left out, and its page.

    Args:
      directories: folders of one run each, or one of many.
      out: where the page will be.

    Raises:
      UserError: they can't be compared, or a report is damaged.
    """
    runs, left_out = read_runs(directories, out)
    try:
        found = compare(runs, of_many=len(directories) == 1)
        return found, left_out, html(found)
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(
            f"A report in {', '.join(map(str, directories))} is damaged, or was written by another version of"
            f" jaxsp ({type(error).__name__}: {in_a_line(error, 120)})."
        ) from error


def read_runs(directories: Sequence[str], out: Path) -> tuple[list[Run], list[str]]:
    """The runs in some folders, and what is wrong with those left out, a sentence each.

    Args:
      directories: folders of one run each, or one of many.
      out: the page that will link to theirs.

    Raises:
      UserError: a folder holds no finished run, or several beside others; or fewer than two are left.
    """
    folders: list[Path] = []
    for directory in directories:
        found = finished_runs(as_path(directory, "The folder"))
        if len(directories) > 1 and found[1:]:
            raise UserError(f"{directory} holds {len(found)} runs; compare it alone, or give one of them.")
        folders += found
    absolute = [folder.resolve() for folder in folders]
    for i, folder in enumerate(absolute):
        if folder in absolute[:i]:
            raise UserError(f"{folders[i]} is given twice.")
    runs, left_out = [], []
    for folder in folders:
        name = folder.name if len(directories) == 1 and folders[1:] else str(folder)
        report = read_report(folder)
        if report.get("error"):
            left_out.append(f"{folder} is left out: its training failed ({report['error']})")
            continue
        file = folder / CONTEXT
        document = file.read_text("utf-8", "replace") if file.is_file() else None
        lines = list[dict[str, Any]]()
        if len(folders) <= MOST_CURVES:  # others are not drawn
            with contextlib.suppress(Damaged):
                lines = read_json_lines(folder / METRICS)
        run = Run(name, report, document, _link(folder, out), lines)
        try:
            _ = run.figures, run.settings
        except _DAMAGE as error:
            reason = f"{type(error).__name__}: {in_a_line(error, 120)}"
            raise Damaged(
                f"{folder / REPORT} is damaged, or was written by another version of jaxsp ({reason})"
            ) from error
        runs.append(run)
    if len(runs) < 2:
        why = f" ({'; '.join(left_out)})" if left_out else ""
        raise UserError(
            f"A comparison needs two finished runs, and there is {'one' if runs else 'none'}{why}; give more"
            " folders, or that of a compress-many run."
        )
    return runs, left_out


def _link(folder: Path, out: Path) -> str | None:
    """The address of a run's page, seen from another page."""
    page = folder / PAGE
    try:
        place = os.path.relpath(page.resolve(), out.resolve().parent)
    except ValueError:  # on another drive
        return None
    return urllib.parse.quote(Path(place).as_posix()) if page.is_file() else None
