"""The folder of a run: what lies where, and whether a run may start or go on there."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import html
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsp.artifact import ARRAYS, CARD, CONTEXT, MANIFEST, SoftPrompt
from jaxsp.errors import Damaged
from jaxsp.evaluation import asking, page, report as reports
from jaxsp.exports import readme
from jaxsp.files import (
    as_path,
    as_read,
    atomic_write,
    os_errors_as_user_errors,
    read_json,
    read_json_lines,
    remove_signed,
    sealed,
    unsealed,
)
from jaxsp.settings import differences
from jaxsp.study.lost import lost, passages
from jaxsp.typing import UserError

VERSION = 6
"""Version of the files in a run's folder; 0.1 wrote none."""

REPORT, METRICS, RESULTS = "report.json", "metrics.jsonl", "results.parquet"
MARKDOWN, PAGE = "report.md", "report.html"
TOKENS = "tokens.json"
"""The held-out answers token by token: for the page, and too long for a report that people read."""
CHECKSUMS = "run/checksums.json"
"""SHA-256 of these three; the prompt's own files have theirs in the manifest."""

_OURS = (REPORT, MARKDOWN, PAGE, "plots", METRICS, TOKENS, "run", ARRAYS, MANIFEST, CONTEXT)
_ANEW = "start anew with --overwrite"


@dataclasses.dataclass(frozen=True)
class Result:
    """A compressed context.

    Attributes:
      prompt: the trained soft prompt.
      report: what was measured (``report.json`` as a dict).
      lines: the training's metrics, a dict a step.
      tokens: the held-out answers token by token (``tokens.json``), as ``jaxsp.evaluation.tokens`` gives
        them; ``None`` of runs that did not keep them.
    """

    prompt: SoftPrompt
    report: dict[str, Any]
    lines: list[dict[str, Any]]
    tokens: list[dict[str, Any]] | None = None

    def __repr__(self) -> str:
        return f"Result({self.prompt!r}, {self.error or self.report['verdict']['text']})"

    def _repr_html_(self) -> str:
        """The verdict and the held-out KL between its brackets, as a notebook shows them."""
        if self.error:
            return f"<p>{html.escape(repr(self))}</p>"
        rows = "".join(
            f"<tr><td>{name.replace('_', ' ')}</td><td>{found['kl']:.3f}</td></tr>"
            for name, found in self.report["held_out"]["brackets"].items()
        )
        return (
            f"<p>{html.escape(repr(self.prompt))}: {html.escape(self.report['verdict']['text'])}</p>"
            f"<table><tr><th>held-out queries with</th><th>KL, nats a token</th></tr>{rows}</table>"
        )

    def ask(self, question: str, **options: Any) -> str:
        """The model's answer with the prompt in place of the context; options as in ``jaxsp.ask``, and
        ``model``."""
        return asking.ask(self.prompt, question, **options)

    @property
    def error(self) -> str | None:
        """Why training failed: the prompt is the best until then, nothing is measured."""
        return self.report.get("error")

    def save(self, directory: str | Path) -> None:
        """Writes the prompt, its README, metrics, plots and reports into ``directory``, ``report.json`` last.

        A ``README.md`` that jaxsp did not write, or that was changed since, stays as it is.
        """
        folder = Path(directory)
        self.prompt.save(folder)
        readme.write(folder, self.prompt, self.report)
        lines = "".join(json.dumps(line) + "\n" for line in self.lines)
        if self.error is None:
            self.write_reports(folder)
        # What another result left there would be taken for this one's.
        stale = [TOKENS] * (self.tokens is None) + [PAGE, MARKDOWN] * (self.error is not None)
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        content = {METRICS: lines}
        if self.tokens is not None:
            content[TOKENS] = json.dumps(self.tokens, ensure_ascii=False, separators=(",", ":"))
        content[REPORT] = reports.as_json(self.report)
        checksums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in content.items()}
        (folder / CHECKSUMS).parent.mkdir(exist_ok=True)
        atomic_write(folder / CHECKSUMS, json.dumps(sealed(checksums)))
        for name, text in content.items():
            atomic_write(folder / name, text)

    def write_reports(self, folder: Path) -> list[Path]:
        """Writes the reports for people, and the plots, into a folder that is there; gives the reports."""
        reports.write(self.report, self.lines, folder)
        missed, context = lost(self.report["queries"]), self.prompt.context
        document = [] if context is None else passages(context, missed, self.report.get("study"))
        text = page.html(self.report, self.lines, self.tokens, document, missed)
        atomic_write(folder / PAGE, text)
        return [folder / PAGE, folder / MARKDOWN]

    @classmethod
    def load(cls, directory: str | Path) -> Result:
        """Reads what ``save`` wrote.

        Raises:
          Damaged: a file is missing, or not as it was written.
        """
        folder = Path(directory)
        report, checksums = _read_report(folder)
        lines = read_json_lines(folder / METRICS, sha256=checksums.get(METRICS))
        steps = [line.get("step") for line in lines]
        if steps != [*range(len(lines))] or report.get("steps", len(lines) - 1) != len(lines) - 1:
            raise Damaged(f"{folder / METRICS} lacks lines: it must have one of every step")
        tokens, file = None, folder / TOKENS
        # Older runs have none, and one that the checksums don't name is another run's.
        if TOKENS in checksums or (not checksums and file.is_file()):
            tokens = read_json(file, list, finite=False, sha256=checksums.get(TOKENS))
        return cls(SoftPrompt.load(folder), report, lines, tokens)


def _read_report(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The report of a run, and the checksums of its files."""
    checksums, file = {}, folder / CHECKSUMS
    if file.exists():  # older runs have none
        checksums = unsealed(read_json(file), file)
    return read_json(folder / REPORT, finite=False, sha256=checksums.get(REPORT)), checksums


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a finished run, without its prompt.

    Args:
      folder: the run's.

    Raises:
      Damaged: it is not as it was written.
    """
    return _read_report(folder)[0]


def finished_runs(directory: str | Path) -> list[Path]:
    """The folders of finished runs: the folder itself, or those in a folder of many, by name.

    Raises:
      UserError: there is none.
    """
    folder = as_path(directory, "The folder")
    folder = folder.parent if folder.is_file() else folder
    found = [folder] if (folder / REPORT).is_file() else sorted(f.parent for f in folder.glob(f"*/{REPORT}"))
    if not found:
        raise UserError(f"{folder} holds no finished run (no {REPORT}).")
    return found


def write_reports(directory: str | Path) -> tuple[list[Path], list[str]]:
    """Writes anew what people read: reports, plots and README of one prompt, or of all in a folder of many.

    Returns:
      The files for people, and what is wrong with the others, a sentence each.

    Raises:
      UserError: there is no finished run.
    """
    written, problems = [], []
    for one in finished_runs(directory):
        try:
            result = Result.load(one)
            if result.error is None:
                written += result.write_reports(one)
                own = readme.write(one, result.prompt, result.report)
                written += [] if own is None else [own]
            else:
                problems.append(f"{one}: its training failed, there is nothing to show ({result.error})")
        except UserError as error:
            problems.append(str(error).rstrip("."))
        except OSError as error:
            problems.append(f"{error.filename or one}: {error.strerror}")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
            reason = f"{type(error).__name__}: {error}"
            problems.append(
                f"{one / REPORT} is damaged, or was written by another version of jaxsp ({reason})"
            )
    return written, problems


class RunFolder:
    """Paths of a run, or of one of its jobs."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = as_path(directory, "The folder (--out)")
        self.report = self.directory / REPORT
        self.results = self.directory / RESULTS
        self.metrics = self.directory / METRICS
        self.settings = self.directory / "run" / "settings.json"
        self.teachers = self.directory / "run" / "teachers"
        self.checkpoints = self.directory / "run" / "checkpoints"

    @os_errors_as_user_errors()
    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raises ``UserError`` if a run can't start (or go on) here; touches nothing.

        Called before any work, so that a mistake costs no time.
        """
        if resume and overwrite:
            raise UserError("Give either --resume or --overwrite, not both.")
        path = self.directory
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; give a folder.")
        if resume and not self.settings.is_file():
            raise UserError(f"There is no run to resume in {path}; leave --resume away to start one.")
        if not resume and not overwrite and path.is_dir() and not self._is_free():
            raise UserError(
                f"The folder {path} is not empty; go on with --resume, replace what is there with"
                " --overwrite, or choose another with --out."
            )
        existing = path.absolute()
        while not existing.exists():
            existing = existing.parent
        if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
            raise UserError(f"The folder {path} can't be written to; choose another with --out.")

    def _is_free(self) -> bool:
        """Whether nothing is here but what a run leaves that ended before it had its settings."""
        run = self.settings.parent
        others = (path for path in self.directory.rglob("*") if path != run)
        return all(run in path.parents and path.suffix == ".part" for path in others)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out of the folder, until this one ends or its process is gone.

        Raises:
          UserError: another run is at work in it, or it can't be made.
        """
        try:
            import fcntl
        except ImportError:  # on Windows there are no locks of a folder
            yield
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.directory, os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"The folder {self.directory} can't be made ({error.strerror}); choose another with --out."
            ) from error
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                for last in (False, False, True):
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if last:
                            raise UserError(
                                f"Another run is at work in {self.directory}; wait until it has ended, or"
                                " choose another folder with --out."
                            ) from None
                        time.sleep(0.05)  # somebody may only have looked: is_at_work
            yield
        finally:
            os.close(handle)

    @property
    def is_at_work(self) -> bool:
        """Whether a run is at work in the folder, as far as locks tell."""
        try:
            import fcntl
        except ImportError:  # on Windows there are no locks of a folder
            return True
        handle = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until it is closed, at once
        except OSError:  # it is taken, or a file system without locks
            return True
        finally:
            os.close(handle)
        return False

    def start(self, settings: dict[str, Any]) -> None:
        """Makes the folder ready for a run with these settings: an earlier run's files go, others stay.

        Raises:
          UserError: it can't be written to.
        """
        try:
            for name in _OURS:
                old = self.directory / name
                if old.is_dir():
                    shutil.rmtree(old)
                else:
                    old.unlink(missing_ok=True)
            remove_signed(self.directory / CARD)
            self.settings.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.settings, reports.as_json(sealed({"version": VERSION, **settings})))
        except OSError as error:
            raise UserError(
                f"The folder {self.directory} can't be written to ({error.strerror}); choose another"
                " with --out."
            ) from error

    def _settings(self) -> dict[str, Any]:
        found = read_json(self.settings, advice=_ANEW)
        if found.get("version", 1) != VERSION:  # which check_same says
            return found
        return unsealed(found, self.settings, advice=_ANEW)

    def chats(self) -> list[dict[str, Any] | None]:
        """The texts around a context and a query in the run here: of the model, and of another teacher."""
        found = self._settings()
        return [found.get(name) for name in ("chat", "teacher_chat")]

    def check_same(self, settings: dict[str, Any]) -> None:
        """Raises ``UserError`` with the differences if the run here has other settings."""
        folder, before = self.directory, self._settings()
        if before.pop("version", 1) != VERSION:
            raise UserError(
                f"The run in {folder} was made by another version of jaxsp, whose files this one can't go"
                " on with; finish it with that version, or start anew with --overwrite."
            )
        if changed := differences(before, as_read(settings)):
            raise UserError(
                f"The run in {folder} can't be resumed with other settings: {'; '.join(changed)}. Give"
                " the same, or start anew with --overwrite."
            )
