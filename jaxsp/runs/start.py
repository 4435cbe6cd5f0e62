"""Runs, begun or gone on with: everything is checked before any work is done."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsp import processes
from jaxsp.models.language_model import LanguageModel
from jaxsp.progress import Display
from jaxsp.runs.folder import Result, RunFolder
from jaxsp.runs.job import check_jobs, make_job, model_identity
from jaxsp.runs.runner import Runner
from jaxsp.settings import check_limits, decides_result, make_settings
from jaxsp.training.slots import Callback
from jaxsp.typing import UserError


@dataclasses.dataclass(frozen=True)
class Start:
    """Whether a run may begin, go on, or replace another in its folder."""

    resume: bool = False
    overwrite: bool = False
    keep_going: bool = False


def open_run(
    model: LanguageModel,
    rows: Sequence[tuple[str, Any]],
    settings: Mapping[str, Any],
    *,
    out: str | Path | None,
    start: Start,
    at_once: int | None,
    callbacks: Sequence[Callback],
    display: Display,
) -> Iterator[Result]:
    """The results of many jobs, each in a folder of its own within ``out``; rows say where they come from.

    Raises:
      UserError: something is invalid; nothing is then done.
    """
    if at_once is not None:
        check_limits("at_once", at_once, at_least=1)
    folder = _checked_folder(out, start)
    if not rows:
        raise UserError("There is no context to compress; give at least one.")
    jobs, problems = check_jobs(model, rows, settings)
    if problems and not start.keep_going:
        more = f" ({len(problems) - 1} more are wrong)" if problems[1:] else ""
        raise UserError(f"{problems[0]} Mend it{more}, or do the others alone with --keep-going.")
    for problem in problems:
        display.say(f"Skipped: {problem}")
    if not jobs:
        raise UserError("None of the jobs can be done.")
    runner = Runner(model, jobs, folder, at_once=at_once, callbacks=callbacks, display=display)
    shared = decides_result(make_settings(settings))
    identity = {
        **model_identity(model),
        "settings": {name: shared[name] for name in settings if name in shared},
    }
    everything = hashlib.sha256(repr(jobs).encode()).hexdigest()[:16]
    _open(folder, identity, start, {**identity, "jobs": everything})
    if folder is not None and start.overwrite and processes.is_first():
        for job in jobs:  # no longer finished
            RunFolder(folder.directory / job.id).report.unlink(missing_ok=True)
    return runner.results()


def run_one(
    model: LanguageModel,
    row: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    out: str | Path | None,
    start: Start,
    callbacks: Sequence[Callback],
    display: Display,
) -> Result:
    """The result of one job, whose folder is ``out`` itself.

    Raises:
      UserError: something is invalid; nothing is then done.
    """
    folder = _checked_folder(out, start)
    try:
        job = make_job(model, row, settings)
    except UserError as error:
        told = str(error).rstrip(".")
        raise UserError(f"{told[0].upper()}{told[1:]}.") from error
    runner = Runner(model, [job], folder, at_once=1, callbacks=callbacks, display=display, single=True)
    identity = job.identity(model)
    _open(folder, identity, start, identity)
    (result,) = runner.results()
    return result


def _checked_folder(out: str | Path | None, start: Start) -> RunFolder | None:
    if out is not None:
        folder = RunFolder(out)
        options = {"resume": start.resume, "overwrite": start.overwrite}
        processes.on_first_process(lambda: folder.check(**options))
        return folder
    if start.resume or start.overwrite:
        raise UserError("resume and overwrite need a folder: pass out=....")
    return None


def _open(folder: RunFolder | None, identity: dict[str, Any], start: Start, agreed: dict[str, Any]) -> None:
    processes.assert_same(agreed)
    if folder is not None:
        begin = folder.check_same if start.resume else folder.start
        processes.on_first_process(lambda: begin(identity))
