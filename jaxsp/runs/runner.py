"""The conductor of a run: jobs → teacher → training side by side → measuring → saving; and resuming."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsp import device, plan, processes
from jaxsp.artifact import environment, make_artifact
from jaxsp.data.packing import Packing
from jaxsp.evaluation import brackets, report as reports, table
from jaxsp.evaluation.brackets import Measured
from jaxsp.evaluation.metrics import mean_kl_function
from jaxsp.evaluation.tokens import by_token
from jaxsp.evaluation.verdict import gap_in_words
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.sharding import local, row_parts
from jaxsp.progress import Display
from jaxsp.runs.folder import Result, RunFolder
from jaxsp.runs.job import Job, groups
from jaxsp.runs.on_policy import OnPolicyRows
from jaxsp.runs.problems import Kept, Problems, bracket_key
from jaxsp.runs.resume import Earlier
from jaxsp.settings import Settings, plain
from jaxsp.teacher.another import Teacher
from jaxsp.teacher.problem import Problem, read_preamble
from jaxsp.teacher.store import Store
from jaxsp.training.drivers import DRIVERS, Driver, mesh_of
from jaxsp.training.loop import Block
from jaxsp.training.slots import Callback, Step, TrainingJob, TrainingResult
from jaxsp.training.start import start_state
from jaxsp.training.update import Frozen, UpdateSettings
from jaxsp.typing import Interrupted, PyTree, UserError, ceil_div

STEP_TOKENS = {"cpu": 2048}
"""Tokens of one step, of all prompts together; a CPU gains nothing from more."""
ACCELERATOR_STEP_TOKENS = 32768

PHASES = (
    "load", "questions", "answers", "signals", "coverage", "start", "compile", "on_policy", "train",
    "held_out", "evaluate",
)  # fmt: skip
"""Whose seconds a report has."""


@dataclasses.dataclass(frozen=True)
class Start:
    """The way a run begins, goes on or replaces another, and who hears of it.

    Attributes:
      out: its folder; ``None`` to write nothing.
      resume: go on with the run that is there.
      overwrite: replace it.
      display: shows what goes on.
      callbacks: hear of every step.
      keep_going: leave out the jobs that are invalid or whose document gives nothing to train on.
      at_once: prompts in one step; by default as many as suit the device and its memory.
    """

    out: str | Path | None
    resume: bool
    overwrite: bool
    display: Display
    callbacks: Sequence[Callback] = ()
    keep_going: bool = False
    at_once: int | None = None

    @property
    def folder(self) -> RunFolder | None:
        """The paths in ``out``."""
        return None if self.out is None else RunFolder(self.out)


class Runner:
    """A run of jobs; ``results`` does them.

    Args:
      model: the frozen model.
      jobs: all of them, also those that are finished.
      start: its folder, which is ready; who hears of it; how many prompts train in one step.
      single: the run is its only job, whose folder is the run's own.
      teacher: the teacher, if it is another model.
    """

    def __init__(
        self,
        model: LanguageModel,
        jobs: Sequence[Job],
        start: Start,
        *,
        single: bool = False,
        teacher: Teacher | None = None,
    ) -> None:
        mesh = mesh_of(jobs[0].settings)
        # One job is done by all processes together; of many, each does some by itself.
        self.divided = processes.are_several() and not single
        if self.divided and start.folder is None:
            raise UserError("Several processes need a folder that all can reach: pass out=....")
        self.mesh = local(mesh) if mesh is not None and self.divided else mesh
        self.teacher = teacher if teacher is None or mesh is None else teacher.on(mesh)
        self.model = self.teacher.student if self.teacher else model if mesh is None else model.on(mesh)
        self.jobs, self.folder, self.single = list(jobs), start.folder, single
        self.earlier = Earlier(single, start.display.say)
        self.at_once, self.callbacks, self.display = start.at_once, start.callbacks, start.display
        self.preamble = read_preamble(self.model)
        # Of many, one that is damaged keeps none of the others from going on.
        store = Store.of_run(self.folder and self.folder.teachers, self.display.say, mend=not single)
        # Processes wait for each other's results: they would wait for one that never comes.
        options = {"named": not single, "keep_going": start.keep_going and not self.divided}
        self.problems = Problems(self.model, self.preamble, store, self.teacher, **options)
        self.teacher_head = self.teacher and self.teacher.head
        self.brackets = Kept[dict[str, Measured]]()
        self.prefills = Kept[float]()  # seconds of the whole context
        self.running: dict[str, tuple[Problem, PyTree]] = {}  # with σ before training
        # They keep the seconds of each job under way.
        self.displays = collections.defaultdict[str, Display](lambda: Display(visible=False))
        if single:
            self.displays[jobs[0].id] = self.display

    def results(self) -> Iterator[Result]:
        """Every job's result, in order; each as soon as it and all before it are finished."""
        shares = processes.on_first_process(self._shares)
        unfinished = set(itertools.chain(*shares))
        rows = {j.id: table.row(self._load(j).report) for j in self.jobs if j.id not in unfinished}
        to_do = [job for job in self.jobs if job.id in unfinished]
        own = [job for job in to_do if job.id in shares[self._index]]
        waiting = collections.deque(self.jobs)
        early: dict[str, Result] = {}  # finished before one that comes first; not kept if on disk

        def next_ones() -> Iterator[Result]:
            while waiting and waiting[0].id in {*rows, *self.problems.left_out}:
                if (job := waiting.popleft()).id in self.problems.left_out:
                    continue
                yield early.pop(job.id) if job.id in early else self._load(job)

        try:
            if self.teacher is not None and to_do:
                self.display.say(self.teacher.message)
            with processes.peer_failure_as_user_error(), self._progress(len(rows)) as (on_step, finished):
                yield from next_ones()
                done = self._train_all(own, on_step)
                for job, result in processes.alone_while(done) if self.divided else done:
                    rows[job.id] = table.row(result.report)
                    self._write_table(rows)
                    finished(f"{job.id}: {_summary(result)}")
                    if self.folder is None or waiting[0].id == job.id:
                        early[job.id] = result
                    yield from next_ones()
                yield from next_ones()  # the last ones may have been left out
                for job in to_do:
                    if job.id not in {*rows, *self.problems.left_out}:
                        rows[job.id] = table.row(self._made_elsewhere(job).report)
                        finished(f"{job.id}: from another process")
                        yield from next_ones()
        except (KeyboardInterrupt, Interrupted) as error:
            saved = "" if self.folder is None else " It is saved; go on with the same command and --resume."
            where = f"Interrupted with {len(rows)} of {len(self.jobs)} prompts finished."
            if self.single:
                where = str(error) or "Interrupted."
            raise Interrupted(f"{where}{saved}") from None
        if not rows:
            raise UserError("None of the jobs can be done.")
        self._write_table(rows)
        for key in groups(self.jobs):  # those of a run that ended while it removed them
            self._remove_checkpoints(key)
        if self.folder is not None and not self.single and processes.is_first():
            self.display.say(f"Results: {self.folder.results}")

    # What is finished

    def _folder(self, job: Job) -> RunFolder | None:
        if self.folder is None or self.single:
            return self.folder
        return RunFolder(self.folder.directory / job.id)

    def _shares(self) -> list[list[str]]:
        """The ids of jobs that are not finished, for each process; a report of an earlier trial goes.

        A process has what it last saved in the midst of training, and its part of the others.
        """
        left = [job for job in self.jobs if not self._is_finished(job)]
        for job in left:
            if (folder := self._folder(job)) is not None:
                folder.report.unlink(missing_ok=True)
        ids = [job.id for job in left]
        if not self.divided:
            return [ids]
        shares: list[list[str]] = []
        for process in range(processes.rank_and_count()[1]):
            shares.append([name for name in self._saved(process) if name in ids])
            ids = [name for name in ids if name not in shares[-1]]
        return [[*saved, *more] for saved, more in zip(shares, processes.contiguous_shards(ids), strict=True)]

    def _saved(self, process: int) -> list[str]:
        """The ids of the jobs in a process's checkpoints."""
        names = []
        for key in groups(self.jobs):
            if (folder := self._checkpoint_folder(key, process)).is_dir():
                with processes.alone():
                    checkpoints, saved = self.earlier.opened(folder)
                    checkpoints.close()
                    names += saved["jobs"] if saved else []
        return names

    def _remove_checkpoints(self, key: str) -> None:
        """Everything is in the jobs' folders."""
        is_ours = self.folder is not None and (self.divided or processes.is_first())
        if is_ours and (folder := self._checkpoint_folder(key, self._index)).is_dir():
            shutil.rmtree(folder)

    @property
    def _index(self) -> int:
        """The number of the process, where each has checkpoints of its own."""
        return jax.process_index() if self.divided else 0

    def _checkpoint_folder(self, key: str, process: int) -> Path:
        assert self.folder is not None
        return self.folder.checkpoints / f"{key}-{process}"

    def _is_finished(self, job: Job) -> bool:
        folder = self._folder(job)
        if folder is None or not folder.report.is_file():
            return False  # the identity of a long document takes seconds
        return self.earlier.is_finished(folder, job.id, job.identity(self.model, self.teacher))

    def _load(self, job: Job) -> Result:
        folder = self._folder(job)
        assert folder is not None
        return Result.load(folder.directory)

    def _made_elsewhere(self, job: Job) -> Result:
        """The result of another process's job, waited for; jax ends this process if the other dies."""
        folder = self._folder(job)
        assert folder is not None
        while not folder.report.is_file():  # the last of its files; one of an earlier run is gone by now
            time.sleep(1)
        return self._load(job)

    def _write_table(self, rows: dict[str, dict[str, Any]]) -> None:
        if self.folder is not None and not self.single and processes.is_first():
            ordered = [rows[job.id] for job in self.jobs if job.id in rows]
            table.write(ordered, self.folder.results)

    @contextlib.contextmanager
    def _progress(self, done: int) -> Iterator[tuple[Callback, Callable[[str], None]]]:
        """Shows what goes on; gives two functions, called with every step and with every finished job."""
        if self.single:
            steps = self.jobs[0].settings.training.updates
            with self.display.training(steps) as on_line:
                yield lambda step: on_line({"step": step.number, **step.metrics}), lambda text: None
            return
        newest: dict[str, float] = {}
        with self.display.jobs(len(self.jobs), done) as show:

            def on_step(step: Step) -> None:
                if "held_out_kl" in step.metrics:
                    newest[step.job] = step.metrics["held_out_kl"]
                    some = [newest[name] for name in self.running if name in newest]
                    summary = ", ".join(f"{kl:.3f}" for kl in some[:3])
                    more = " …" if some[3:] else ""
                    show(0, f"{len(some)} in training, held-out KL {summary}{more}")

            yield on_step, lambda text: show(1, text)

    # Training

    def _train_all(self, jobs: Sequence[Job], on_step: Callback) -> Iterator[tuple[Job, Result]]:
        for key, group in groups(self.jobs).items():
            if own := [job for job in group if job in jobs]:
                yield from self._train(key, own, on_step)

    def _train(self, key: str, jobs: Sequence[Job], on_step: Callback) -> Iterator[tuple[Job, Result]]:
        """The results of jobs that can train side by side, as they finish."""
        settings, by_id = jobs[0].settings, {job.id: job for job in jobs}
        checkpoints = saved = None
        placed = list[TrainingJob | None]()
        if self.folder is not None:
            checkpoints, saved = self.earlier.opened(self._checkpoint_folder(key, self._index))
            if saved is not None:
                placed = self.earlier.placed(
                    checkpoints,
                    saved,
                    lambda name: self._training_job(by_id[name], fresh=False) if name in by_id else None,
                )
                if not any(placed):  # of jobs that are no longer asked for, or are done again
                    checkpoints.clear()
                    saved, placed = None, []
        inside = {job.id for job in placed if job is not None}
        waiting = (job for job in jobs if job.id not in inside)
        queue = (self._training_job(job) for job in waiting if self._problem(job))
        slots = len(placed) or self._slots(jobs)
        mesh = self.mesh  # of the evaluation: its devices share whole prompts, if they divide evenly
        mesh = None if mesh is None or slots % row_parts(mesh) else mesh
        block = Block(
            queue,
            lambda slots: self._driver(settings, slots),
            mean_kl_function(self.model, self.preamble, settings.prompt.kind, mesh, self.teacher_head),
            slots=slots,
            evaluate_every=settings.training.evaluate_every,
            checkpoints=checkpoints,
            checkpoint_every=settings.devices.checkpoint_every,
            callbacks=[on_step, *self.callbacks],
        )
        if saved is not None:
            block.resume(placed, saved["tick"], Packing(*saved["packing"]), saved.get("answers", ()))
            if self.single:
                self.display.say(f"Resuming after step {block.slots[0].step}.")
        with contextlib.closing(block.run()) as results:  # callbacks hear of the end at once
            for result in results:
                job = by_id[result.id]
                yield job, self._finish(job, result)
        if checkpoints is not None:
            checkpoints.close()
            self._remove_checkpoints(key)

    def _slots(self, jobs: Sequence[Job]) -> int:
        """The number of prompts that train in one step."""
        if self.single:
            return 1
        problem, settings = next(filter(None, map(self._problem, jobs)), None), jobs[0].settings
        if problem is None:
            return 1
        packing = Packing.of(problem.lengths, settings.training.batch_size)
        parts = 1 if self.mesh is None else row_parts(self.mesh)
        if settings.devices.parallel == "pmap":
            parts = jax.local_device_count()
        at_once = self.at_once
        if at_once is None:
            tokens = STEP_TOKENS.get(device.platform(), ACCELERATOR_STEP_TOKENS)
            enough = min(max(1, tokens // (packing.rows * packing.length)), ceil_div(len(jobs), parts))
            at_once = plan.prompts_at_once(
                self.model.config, settings, packing, self.mesh, most=parts * enough,
                teacher_head=self.teacher_head,
            )  # fmt: skip
        rounds = ceil_div(len(jobs), at_once)
        slots = ceil_div(len(jobs), rounds)  # as evenly filled as can be
        return ceil_div(slots, parts) * parts

    def _problem(self, job: Job) -> Problem | None:
        return self.problems.if_any(job, self.displays[job.id], self.display.say)

    def _driver(self, settings: Settings, slots: int) -> Driver:
        frozen = Frozen(self.model.params, self.preamble, self.teacher_head)
        chosen = UpdateSettings.of(self.model.config, settings)
        return DRIVERS[settings.devices.parallel](frozen, chosen, slots=slots, mesh=self.mesh)

    def _training_job(self, job: Job, *, fresh: bool = True) -> TrainingJob:
        """The job as training takes it, once the teacher has spoken; its folder is made ready."""
        problem = self.problems.of(job, self.displays[job.id])
        self.displays.setdefault(job.id, Display(visible=False))
        folder, settings = self._folder(job), job.settings
        if folder is not None and fresh and processes.is_first():
            if not self.single:
                folder.start(job.identity(self.model, self.teacher))
            folder.metrics.unlink(missing_ok=True)
        elif folder is not None and not fresh:
            folder.check_same(job.identity(self.model, self.teacher))
        with self.displays[job.id].phase("start", "Where σ starts"):
            state = jax.block_until_ready(start_state(self.model, problem, settings))
        metrics = folder and folder.metrics
        self.running[job.id] = problem, state.sigma
        packing = Packing.of(problem.lengths, settings.training.batch_size)
        asked, preamble = self.problems.asked, self.problems.teacher_preamble
        own = OnPolicyRows(self.model, asked, preamble, problem, settings, self.displays[job.id])
        if policy := own.as_training_takes_it():
            packing = packing.grown(np.array([policy.longest]))
        rows, patience = (problem.train, problem.held_out), settings.training.patience
        return TrainingJob(job.id, state, *rows, packing, patience, metrics, policy)

    # Teacher and evaluation

    def _finish(self, job: Job, trained: TrainingResult) -> Result:
        """The result of a job whose training has ended, saved if there is a folder."""
        (problem, initial), display = self.running.pop(job.id), self.displays.pop(job.id)
        settings, state = job.settings, trained.state
        kept = state.sigma if settings.training.keep == "last" else state.best_sigma
        steps, taught_by = trained.lines[-1]["step"], self.teacher and self.teacher.summary
        prompt = make_artifact(
            self.model, problem.job, settings, kept, job.context, steps=steps, teacher=taught_by
        )
        report = {
            "id": job.id,
            "error": trained.error,
            "settings": plain(settings),
            **reports.report_header(self.model, prompt),
        }
        tokens = None
        if trained.error is None:
            sigmas = {"prompt": prompt.sigma, "initial": initial}
            with display.phase("evaluate", "Evaluation"):
                measured = processes.on_first_process(
                    lambda: {
                        **self._measured(job, problem, sigmas),
                        "stored": brackets.storage_costs(self.model, problem, kept, settings),
                    }
                )
            tokens = measured.pop("tokens")
            prompt.manifest["held_out"] = {
                "gap_closed": measured["gap_closed"],
                **measured["held_out"]["brackets"]["prompt"],
            }
            prompt.manifest["fallback"] = measured["fallback"]
            report |= measured
        studied = self.problems.study(job)
        report["study"] = studied and studied.summary()
        models = [self.model] + ([self.teacher.model] if self.teacher else [])
        display.add("load", sum(model.load_seconds for model in models))
        display.add("compile", trained.compile_seconds)
        display.add("held_out", trained.held_out_seconds)
        display.add("train", sum(line.get("seconds", 0.0) for line in trained.lines))
        seconds = {name: display.seconds.get(name, 0.0) for name in PHASES}
        report |= {"seconds": {**seconds, "total": sum(seconds.values())}, "environment": environment()}
        result = Result(prompt, report, trained.lines, tokens)
        if (folder := self._folder(job)) is not None and processes.is_first():
            result.save(folder.directory)
        return result

    def _measured(self, job: Job, problem: Problem, sigmas: dict[str, PyTree]) -> dict[str, Any]:
        """The report's part on the queries: all brackets, the gap closed, the verdict; costs; the tokens.

        What σ has no part in is measured once for all jobs that have the same.
        """
        model, settings, sigma = self.model, job.settings, sigmas["prompt"]
        key = bracket_key(model, problem.job, settings, sigmas["initial"])
        measured = brackets.measure_all(model, problem, sigmas, settings, self.brackets.get(key) or {})
        self.brackets.keep(key, {name: m for name, m in measured.items() if name != "prompt"})
        context = problem.job.longest_part.ids.tobytes()
        prefill = brackets.prefill_seconds(model, problem, sigma, settings, self.prefills.get(context))
        self.prefills.keep(context, prefill["full_context"])
        return {
            **reports.summarise(model, problem, measured, job.context, settings, self.teacher),
            "prefill_seconds": prefill,
            "tokens": by_token(model, problem, measured),
            "by_length": brackets.length_curve(model, problem, sigma, settings),
        }


def _summary(result: Result) -> str:
    return result.error or f"gap closed: {gap_in_words(result.report['gap_closed'])}"
