"""The files of an earlier run: what is finished, where training goes on; of many jobs, the damaged anew."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxsp.errors import Damaged
from jaxsp.evaluation import table
from jaxsp.runs.folder import Result, RunFolder
from jaxsp.training.slots import TrainingJob, lines_checksum, past_lines
from jaxsp.training.state import stack, unstack
from jaxsp.typing import UserError

if TYPE_CHECKING:
    from jaxsp.training.checkpoint import Checkpoints

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Earlier:
    """An earlier run.

    Attributes:
      single: it is of one job, which can't go on if a file of it is damaged: that is an error.
      say: hears of what is done anew.
    """

    single: bool
    say: Callable[[str], None]

    def _whole(self, read: Callable[[], T], what: str) -> T | None:
        """The result of ``read``; of many jobs ``None`` if a file is damaged: ``what`` is then anew."""
        try:
            return read()
        except Damaged as damage:
            if self.single:
                raise Damaged(damage.what, "start anew with --overwrite") from damage
            self.say(f"{damage.what}; {what} anew.")
            return None

    def is_finished(self, folder: RunFolder | None, name: str, identity: dict[str, Any]) -> bool:
        """Whether it finished a job.

        Args:
          folder: of the job.
          name: its id.
          identity: all that decides its result.

        Raises:
          UserError: it was another job; or, of one alone, its files are damaged.
        """

        def outcome() -> str | None:
            assert folder is not None
            try:
                result = Result.load(folder.directory)
                table.row(result.report)
            except (KeyError, TypeError, AttributeError) as error:
                raise Damaged(f"{folder.report} is damaged ({error!r:.60})") from error
            try:
                folder.check_same(identity)
            except Damaged:
                raise
            except UserError:
                if not result.error:
                    raise
                return "failed"  # and is to be tried with other settings
            return "failed" if self.single and result.error else "finished"

        if folder is None or not folder.report.is_file():
            return False
        return self._whole(outcome, f"{name} is done") == "finished"

    def opened(self, folder: Path) -> tuple[Checkpoints, dict[str, Any] | None]:
        """The checkpoints in a folder, and the block of the newest; those that can't be read are removed."""
        from jaxsp.training.checkpoint import Checkpoints  # orbax takes seconds to import

        checkpoints = Checkpoints(folder, self.say)
        if checkpoints.latest is None:
            return checkpoints, None
        try:
            saved = self._whole(checkpoints.block, "its prompts are begun")
        except Damaged:
            checkpoints.close()
            raise
        if saved is None:
            checkpoints.clear()
        return checkpoints, saved

    def placed(
        self, checkpoints: Checkpoints, saved: dict[str, Any], begin: Callable[[str], TrainingJob | None]
    ) -> list[TrainingJob | None]:
        """The prompts of a checkpoint in their slots; ``None`` for one that does not go on.

        Args:
          checkpoints: where the states are.
          saved: the block that belongs to them.
          begin: from an id to the job as training takes it, or ``None`` if it is no longer asked for.
        """
        names = saved["jobs"]
        jobs = [name and self._whole(functools.partial(begin, name), f"{name} is done") for name in names]
        if not any(jobs):
            return []
        like = next(job.state for job in jobs if job)
        states = checkpoints.restore(stack([like] * len(jobs)))
        found: list[TrainingJob | None] = []
        for i, (job, lines) in enumerate(zip(jobs, saved.get("lines") or [None] * len(jobs), strict=True)):
            if job is None:
                found.append(None)
            else:
                own = dataclasses.replace(job, state=unstack(states, i))
                whole = functools.partial(_with_its_lines, own, lines)
                found.append(self._whole(whole, f"{job.id} is done"))
        return found


def _with_its_lines(job: TrainingJob, known: str | None) -> TrainingJob:
    """The job; raises ``Damaged`` if the lines of its steps are not those that the checkpoint knows."""
    if job.metrics is not None:
        if not job.metrics.exists():
            raise Damaged(f"{job.metrics} is missing")
        lines = past_lines(job.metrics, int(job.state.step))
        if known not in (None, lines_checksum(lines)):  # older ones know none
            raise Damaged(f"{job.metrics} is damaged: its lines are not those that were written")
    return job
