"""Runs, begun or gone on with: everything is checked before any work is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxsp import processes
from jaxsp.files import os_errors_as_user_errors
from jaxsp.models.chat import ChatTexts
from jaxsp.models.language_model import LanguageModel
from jaxsp.runs.folder import Result, RunFolder
from jaxsp.runs.job import check_jobs, make_job, model_identity
from jaxsp.runs.runner import Runner, Start as Start
from jaxsp.settings import check_limits, decides_result, make_settings
from jaxsp.teacher.another import Teacher
from jaxsp.teacher.problem import digest
from jaxsp.typing import UserError


def open_run(
    model: LanguageModel,
    rows: Sequence[tuple[str, Any]],
    settings: Mapping[str, Any],
    start: Start,
    teacher: LanguageModel | None = None,
) -> Iterator[Result]:
    """The results of many jobs, each in a folder of its own within ``start.out``.

    Args:
      model: the frozen model.
      rows: the jobs, each with where it comes from.
      settings: those of the rows that say nothing else.
      start: the way to begin.
      teacher: the model that teaches; by default the model itself.

    Raises:
      UserError: something is invalid; nothing is then done.
    """
    if start.at_once is not None:
        check_limits("at_once", start.at_once, at_least=1)
    _check_folder(start)
    model, teacher = _as_begun(model, teacher, start)
    if not rows:
        raise UserError("There is no context to compress; give at least one.")
    other = Teacher.of(model, teacher)
    jobs, problems = check_jobs(model, rows, settings, other)
    if problems and not start.keep_going:
        more = f" ({len(problems) - 1} more are wrong)" if problems[1:] else ""
        raise UserError(f"{problems[0]} Mend it{more}, or do the others alone with --keep-going.")
    for problem in problems:
        start.display.say(f"Skipped: {problem}")
    if not jobs:
        raise UserError("None of the jobs can be done.")
    runner = Runner(model, jobs, start, teacher=other)
    identity = {**model_identity(model, other), "settings": decides_result(make_settings(settings))}
    lock = _open(start, identity, {**identity, "jobs": digest(jobs)})
    if (folder := start.folder) is not None and start.overwrite and processes.is_first():
        for job in jobs:  # no longer finished
            RunFolder(folder.directory / job.id).report.unlink(missing_ok=True)

    def results() -> Iterator[Result]:
        with lock:
            yield from runner.results()

    return results()


def run_one(
    model: LanguageModel,
    row: Mapping[str, Any],
    settings: Mapping[str, Any],
    start: Start,
    teacher: LanguageModel | None = None,
) -> Result:
    """The result of one job, whose folder is ``start.out`` itself.

    Raises:
      UserError: something is invalid; nothing is then done.
    """
    _check_folder(start)
    model, teacher = _as_begun(model, teacher, start)
    other = Teacher.of(model, teacher)
    try:
        job = make_job(model, row, settings, other)
    except UserError as error:
        message = str(error).rstrip(".")
        raise UserError(f"{message[0].upper()}{message[1:]}.") from error
    runner = Runner(model, [job], start, single=True, teacher=other)
    identity = job.identity(model, other)
    with _open(start, identity, identity):
        (result,) = runner.results()
    return result


def _check_folder(start: Start) -> None:
    if (folder := start.folder) is not None:
        processes.on_first_process(lambda: folder.check(resume=start.resume, overwrite=start.overwrite))
    elif start.resume or start.overwrite:
        raise UserError("resume and overwrite need a folder: pass out=....")


def _as_begun(
    model: LanguageModel, teacher: LanguageModel | None, start: Start
) -> tuple[LanguageModel, LanguageModel | None]:
    """The models with the chat's texts as the run began with them: a template may write today's date.

    Raises:
      UserError: what the run has kept of them is damaged.
    """
    if (folder := start.folder) is None or not start.resume:
        return model, teacher
    chats = processes.on_first_process(folder.chats)
    try:
        own, theirs = (chat and ChatTexts(**chat) for chat in chats)
    except TypeError as error:
        raise UserError(f"{folder.settings} is damaged ({error}); start anew with --overwrite.") from error
    begun = model.with_chat(own) if own else model
    if teacher is model:
        return begun, begun
    return begun, teacher.with_chat(theirs) if teacher is not None and theirs else teacher


def _open(start: Start, identity: dict[str, Any], agreed: dict[str, Any]) -> contextlib.ExitStack:
    """Makes the folder ready; others are kept out of it until what this gives is closed."""
    processes.assert_same(agreed)
    with contextlib.ExitStack() as lock:
        if (folder := start.folder) is not None:
            begin = folder.check_same if start.resume else folder.start
            advice = "when that is mended, go on with --resume"
            lock.enter_context(os_errors_as_user_errors(folder.directory, advice, of_the_system_alone=True))

            def ready() -> None:
                lock.enter_context(folder.locked())
                folder.check(resume=start.resume, overwrite=start.overwrite)  # another may just have ended
                begin(identity)

            processes.on_first_process(ready)
        return lock.pop_all()
