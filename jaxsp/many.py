"""Many contexts in one run: ``compress_many``."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp import plan, stages
from jaxsp import processes as hosts
from jaxsp.api import Result
from jaxsp.artifact import SoftPrompt
from jaxsp.progress import Display
from jaxsp.data.packing import Packing
from jaxsp.data.examples import Rows
from jaxsp.evaluation import table
from jaxsp.evaluation.brackets import read_context
from jaxsp.evaluation.metrics import mean_kl_function
from jaxsp.evaluation.report import Measured
from jaxsp.runs.job import Job, check_jobs
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.sharding import DATA, local
from jaxsp.runs.folder import RunFolder, check_folder, open_run
from jaxsp.settings import Settings
from jaxsp.training.many import Trained, Trainee, train_many
from jaxsp.training.update import Frozen
from jaxsp.typing import Interrupted, UserError

RESULTS, REPORT = "results.parquet", "report.json"
SHAPES, TEACHERS = "run/batch_shapes.json", "run/teachers"

STEP_TOKENS = {"cpu": 2048}
"""Tokens of one step, of all prompts together; a CPU gains nothing from more."""
ACCELERATOR_STEP_TOKENS = 32768

KEPT = 128
"""Contexts whose teacher and brackets are kept in memory, for other jobs on the same."""


def compress_many(
    model: LanguageModel,
    jobs: Iterable[Mapping[str, Any]],
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    keep_going: bool = False,
    at_once: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> Iterator[Result]:
    """Compresses every context as ``compress`` would, many prompts in one step.

    Prompts with the same objective, length and optimizer train side by side; seeds, learning rates, steps and
    starts may differ. Contexts may be of any lengths.

    σ is that of a run alone but for the rounding of sums, which training amplifies. For SmolLM2 in float32,
    after 12 steps on two contexts, entries of root mean square 0.26 differed by 3e-6 and 3e-5 in root mean
    square, by 2e-5 and 2e-4 at most.

    Args:
      model: the frozen model, with its tokenizer.
      jobs: dicts ``{"id", "context", "queries", "held_out"}``, with ``held_out`` as in ``compress``, and
        any field of ``Settings`` that is to differ from the run's.
      out: a folder: one folder a job, and ``results.parquet`` with a row each. Several processes need one
        that all can reach; each does a piece of the list, and gives all results.
      resume: go on with the run in ``out``; what is finished there is not done again.
      overwrite: replace an earlier run in ``out``.
      keep_going: report jobs that can't be meant, and do the others.
      at_once: prompts in one step; by default as many as suit the device and its memory.
      progress: whether to show what is going on, on standard error.
      **settings: fields of ``Settings``, for all jobs. ``batch_shape``, if not given, is one that suits all
        jobs; reports have it, and given to ``compress`` it makes a run alone train on the same batches.

    Returns:
      An iterator over the results, in the order of the jobs; each is there as soon as it and all before
      it are finished. The report of a job has its ``id`` and ``settings``; that of one whose loss was not
      finite has ``error`` and no measurements, and its prompt is the best until then.

    Raises:
      UserError: a job or a setting that can't be meant (nothing is then done), or a folder of another run.

    Example:
      >>> import jaxsp
      >>> model = jaxsp.load_model("smollm2-135m-instruct")
      >>> text, queries = "The tank holds 1.2 litres.", ["How much does it hold?", "What holds it?"]
      >>> jobs = [
      ...     {"id": "a", "context": text, "queries": queries, "held_out": 0.5},
      ...     {"id": "b", "context": f"{text} It is red.", "queries": queries, "held_out": 0.5, "seed": 1},
      ... ]
      >>> options = dict(length=2, steps=1, batch_size=1, max_answer_tokens=4, progress=False)
      >>> [r.report["id"] for r in jaxsp.compress_many(model, jobs, **options)]
      ['a', 'b']
    """
    rows = [(f"job {i}", row) for i, row in enumerate(jobs, start=1)]
    return run_many(
        model,
        rows,
        settings,
        out=out,
        resume=resume,
        overwrite=overwrite,
        keep_going=keep_going,
        at_once=at_once,
        display=Display(visible=progress),
    )


def run_many(
    model: LanguageModel,
    rows: list[tuple[str, Any]],
    settings: Mapping[str, Any],
    *,
    out: str | Path | None,
    resume: bool,
    overwrite: bool,
    keep_going: bool,
    at_once: int | None,
    display: Display,
) -> Iterator[Result]:
    """``compress_many`` of rows that say where they come from."""
    if at_once is not None and at_once < 1:
        raise UserError(f"--at-once must be at least 1, not {at_once}.")
    if out is not None:
        hosts.first(lambda: check_folder(out, resume=resume, overwrite=overwrite))
    elif resume or overwrite or hosts.are_several():
        raise UserError("resume, overwrite and several processes need a folder: pass out=....")
    if not rows:
        raise UserError("There is no context to compress; give at least one.")
    jobs, problems = check_jobs(model, rows, settings)
    if problems and not keep_going:
        more = f" ({len(problems) - 1} more are wrong)" if problems[1:] else ""
        raise UserError(f"{problems[0]} Mend it{more}, or do the others alone with --keep-going.")
    for problem in problems:
        display.say(f"Skipped: {problem}")
    if not jobs:
        raise UserError("None of the jobs can be done.")
    identity = {
        "model": model.name,
        "weights": model.fingerprint,
        "dtype": model.config.dtype,
        "settings": {k: v for k, v in settings.items() if v is not None and k not in stages.LAYOUT},
    }
    hosts.agree({**identity, "jobs": hashlib.sha256(repr(jobs).encode()).hexdigest()[:16]})
    folder = None if out is None else Path(out)

    def open_folder() -> None:
        assert folder is not None
        open_run(folder, identity, resume=resume, overwrite=overwrite)
        for job in jobs if overwrite else []:
            (folder / job.id / REPORT).unlink(missing_ok=True)  # no longer finished

    if folder is not None:
        hosts.first(open_folder)
    return _Run(model, jobs, folder, at_once, display).results()


class _Taught(NamedTuple):
    """What all jobs on the same context and queries share."""

    lesson: stages.Lesson
    full_context: Measured


class _Run:
    """A run of many jobs; ``results`` does them."""

    def __init__(
        self,
        model: LanguageModel,
        jobs: list[Job],
        folder: Path | None,
        at_once: int | None,
        display: Display,
    ) -> None:
        mesh = stages.mesh_of(jobs[0].settings)
        self.mesh = mesh and local(mesh)  # processes have nothing to tell each other
        self.model = model = model if self.mesh is None else model.on(self.mesh)
        self.jobs, self.folder = jobs, folder
        self.at_once, self.display = at_once, display
        self.before = read_context(model, jobs[0].encoded(model).before_ids)
        self.mean_kl = mean_kl_function(model, self.before, stages.KIND, self.mesh)
        self.lessons: OrderedDict[tuple, _Taught] = OrderedDict()
        self.brackets: OrderedDict[tuple, dict[str, Measured]] = OrderedDict()
        self.running: dict[str, _Taught] = {}
        self.shapes = _read_shapes(folder)
        longest = max(jobs, key=lambda job: job.longest)
        for _, length in self.shapes.values():
            if longest.longest > length:
                raise UserError(
                    f"The run in {folder} has batches with rows of {length} tokens, and a query of"
                    f" {longest.id} may take {longest.longest} with its answer; do it in a run of its"
                    " own."
                )
        # They keep the seconds of the jobs under way.
        self.displays = collections.defaultdict[str, Display](lambda: Display(visible=False))

    def results(self) -> Iterator[Result]:
        """Every job's result, in order."""
        unfinished = set(hosts.first(self.unfinished))  # as the first sees the folder
        rows = {j.id: table.row(self.load(j).report) for j in self.jobs if j.id not in unfinished}
        to_do = [job for job in self.jobs if job.id in unfinished]
        if hosts.are_several():
            self.shapes = hosts.first(lambda: self.settled_shapes(to_do))
        groups: dict[tuple, list[Job]] = {}
        for job in hosts.piece(to_do):
            groups.setdefault(_alike(job.settings), []).append(job)
        waiting = collections.deque(self.jobs)
        early: dict[str, Result] = {}  # finished before one that comes first; not kept if on disk

        def next_ones() -> Iterator[Result]:
            while waiting and waiting[0].id in rows:
                job = waiting.popleft()
                yield early.pop(job.id) if job.id in early else self.load(job)

        try:
            with hosts.noticing_loss(), self.display.jobs(len(self.jobs), len(rows)) as progress:
                yield from next_ones()
                for group in groups.values():
                    for job, result in self.trained(group, progress):
                        rows[job.id] = table.row(result.report)
                        self.write_table(rows)
                        progress(1, f"{job.id}: {_told(result)}")
                        if self.folder is None or waiting[0].id == job.id:
                            early[job.id] = result
                        yield from next_ones()
                for job in to_do:
                    if job.id not in rows:
                        rows[job.id] = table.row(self.made_elsewhere(job).report)
                        progress(1, f"{job.id}: from another process")
                        yield from next_ones()
        except KeyboardInterrupt:
            saved = " They are saved; go on with --resume." if self.folder else ""
            raise Interrupted(
                f"Interrupted with {len(rows)} of {len(self.jobs)} prompts finished.{saved}"
            ) from None
        self.write_table(rows)
        if self.folder and hosts.is_first():
            self.display.say(f"Results: {self.folder / RESULTS}")

    def unfinished(self) -> list[str]:
        """The ids of jobs that are not saved; a report of an earlier trial goes."""
        left = [job.id for job in self.jobs if not self.is_saved(job)]
        if self.folder is not None:
            for name in left:
                (self.folder / name / REPORT).unlink(missing_ok=True)
        return left

    def settled_shapes(self, jobs: list[Job]) -> dict[str, tuple[int, int]]:
        """The shapes of all batches, before the jobs are divided among processes."""
        for job in jobs:
            if job.settings.batch_shape is None and str(job.settings.batch_size) not in self.shapes:
                self.taught(job)
        return self.shapes

    def made_elsewhere(self, job: Job) -> Result:
        """The result of another process's job, waited for; jax ends this process if the other dies."""
        while not self.is_saved(job):
            time.sleep(1)
        return self.load(job)

    def trained(
        self, jobs: list[Job], progress: Callable[[int, str], None]
    ) -> Iterator[tuple[Job, Result]]:
        """The results of jobs that can train side by side, as they finish."""
        settings = jobs[0].settings
        packing = self.taught(jobs[0]).lesson.packing
        parts = 1 if self.mesh is None else self.mesh.shape[DATA]
        at_once = self.at_once
        if at_once is None:
            tokens = STEP_TOKENS.get(jax.default_backend(), ACCELERATOR_STEP_TOKENS)
            enough = min(max(1, tokens // (packing.rows * packing.length)), -(-len(jobs) // parts))
            at_once = plan.prompts_at_once(
                self.model.config, settings, packing, self.mesh, most=parts * enough
            )
        rounds = -(-len(jobs) // at_once)
        slots = -(-len(jobs) // rounds)  # as evenly filled as can be

        def shown(lines: list[dict[str, Any]]) -> None:
            told = ", ".join(f"{line['held_out_kl']:.3f}" for line in lines[:3])
            progress(0, f"{len(lines)} in training, held-out KL {told}{' …' if lines[3:] else ''}")

        for trained in train_many(
            map(self.trainee, jobs),
            Frozen(self.model.params, self.before),
            stages.update_settings(self.model.config, settings),
            packing,
            self.mean_kl,
            slots=-(-slots // parts) * parts,
            evaluate_every=settings.evaluate_every,
            mesh=self.mesh,
            on_round=shown,
        ):
            job = jobs[trained.index]
            yield job, self.finished(job, trained)

    def trainee(self, job: Job) -> Trainee:
        """The job as training takes it: the teacher has spoken."""
        self.running[job.id] = self.taught(job)
        lesson = self.running[job.id].lesson
        return Trainee(
            stages.initial_state_of(self.model, lesson),
            lesson.train_rows,
            lesson.held_out_rows,
            job.settings.patience,
        )

    def taught(self, job: Job) -> _Taught:
        """The teacher's answers and signals, kept for other jobs that ask the same."""
        display = self.displays[job.id]

        def make() -> _Taught:
            with hosts.alone():
                lesson, full_context = stages.teach(
                    self.model, job.encoded(self.model), job.settings, self.before,
                    self.teacher_file(job), display, self.packing,
                )  # fmt: skip
            measured = stages.measure_full_context(self.model, lesson, full_context, display)
            return _Taught(lesson, measured)

        lesson, measured = _kept(self.lessons, _asks(job), make)
        shape = lesson.packing.rows, lesson.packing.length
        settings = dataclasses.replace(job.settings, batch_shape=shape)
        return _Taught(dataclasses.replace(lesson, settings=settings), measured)

    def teacher_file(self, job: Job) -> Path | None:
        """Where the teacher's answers and signals are kept when memory has no room for them."""
        if self.folder is None:
            return None
        folder = self.folder / TEACHERS
        folder.mkdir(exist_ok=True)
        asked = repr((job.context, job.train, job.held_out, job.settings.max_answer_tokens))
        return folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.safetensors"

    def packing(self, rows: Rows, settings: Settings) -> Packing:
        """The shape of all batches of so many queries: one that suits all jobs.

        Their queries are known, and their answers taken to be as long as those of the first job.
        """
        if settings.batch_shape is not None:
            return Packing(*settings.batch_shape)
        size = str(settings.batch_size)
        if size not in self.shapes:
            alike = [job for job in self.jobs if job.settings.batch_size == settings.batch_size]
            answer = round(float(rows.mask.sum(axis=1).mean()))
            lengths = [np.array(job.query_lengths) + answer - 1 for job in alike]
            longest = max(job.longest for job in alike)
            packing = Packing.of(lengths, settings.batch_size, longest)
            self.shapes[size] = packing.rows, packing.length
            _write_shapes(self.folder, self.shapes)
        return Packing(*self.shapes[size])

    def finished(self, job: Job, trained: Trained) -> Result:
        """The result of a job whose training has ended, written if there is a folder."""
        model, display = self.model, self.displays[job.id]
        lesson, full_context = self.running.pop(job.id)
        state = trained.state
        if trained.error is not None:  # its σ may not be finite
            last = jnp.int32(trained.lines[-1]["step"])
            state = dataclasses.replace(state, sigma=state.best_sigma, step=last)
        prompt = stages.finished_prompt(model, lesson, state, job.context)
        report = {
            "id": job.id,
            "error": trained.error,
            "settings": dataclasses.asdict(lesson.settings),
        }
        if trained.error is None:
            initial = stages.initial_state_of(model, lesson).sigma
            start = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(initial))
            brackets = _kept(
                self.brackets,
                (*_asks(job), start),
                lambda: stages.measure_brackets(model, lesson, initial, display),
            )
            brackets = {"full_context": full_context, **brackets}
            measured = stages.measure(model, lesson, prompt.sigma, brackets, display)
            report |= stages.described(model, lesson.task, prompt, measured)
        else:
            report |= stages.header(model, lesson.task, prompt)
        spent = dict.fromkeys(("load", "answers", "signals", "compile", "train", "evaluate"), 0.0)
        spent |= display.seconds
        spent["train"] = sum(line.get("seconds", 0.0) for line in trained.lines)
        report |= {"seconds": {**spent, "total": sum(spent.values())}}
        report |= {"environment": stages.environment()}
        result = Result(prompt, report, trained.lines)
        self.save(job, result)
        del self.displays[job.id]
        return result

    def save(self, job: Job, result: Result) -> None:
        """Writes a job's folder; its report last, as the sign that it is whole."""
        if self.folder is None:
            return
        folder = open_run(self.folder / job.id, self.identity(job), resume=False, overwrite=True)
        result.prompt.save(folder.directory)
        lines = "".join(json.dumps(line) + "\n" for line in result.lines)
        folder.metrics.write_text(lines, "utf-8")
        _write_json(folder.directory / REPORT, result.report)

    def is_saved(self, job: Job) -> bool:
        """Whether an earlier run finished the job; raises ``UserError`` if that was another job."""
        if self.folder is None or not (self.folder / job.id / REPORT).is_file():
            return False
        try:
            open_run(self.folder / job.id, self.identity(job), resume=True, overwrite=False)
        except UserError:
            if self.load(job).error:
                return False  # it failed, and is to be tried with other settings
            raise
        return True

    def load(self, job: Job) -> Result:
        """The result of a job that is saved."""
        assert self.folder is not None
        folder = RunFolder(self.folder / job.id)
        report = json.loads((folder.directory / REPORT).read_text("utf-8"))
        lines = [json.loads(line) for line in folder.metrics.read_text("utf-8").splitlines()]
        return Result(SoftPrompt.load(folder.directory), report, lines)

    def identity(self, job: Job) -> dict[str, Any]:
        return stages.identity(self.model, job.encoded(self.model), job.settings)

    def write_table(self, rows: dict[str, dict[str, Any]]) -> None:
        if self.folder is not None and hosts.is_first():
            ordered = [rows[job.id] for job in self.jobs if job.id in rows]
            table.write(ordered, self.folder / RESULTS)


def _alike(settings: Settings) -> tuple:
    """Equal for jobs that one compiled update serves."""
    own = (
        "seed", "steps", "learning_rate", "warmup", "initial", "patience", "keep",
        "checkpoint_every",
    )  # fmt: skip
    return tuple(v for name, v in dataclasses.asdict(settings).items() if name not in own)


def _asks(job: Job) -> tuple:
    """Equal for jobs to which the teacher says the same."""
    shape = job.settings.batch_size, job.settings.batch_shape
    return job.context, tuple(job.train), tuple(job.held_out), job.settings.max_answer_tokens, shape


def _kept(cache: OrderedDict[tuple, Any], key: tuple, make: Callable[[], Any]) -> Any:
    """The cache's value, made if it is not there; the ones not used for longest go."""
    if key not in cache:
        cache[key] = make()
    cache.move_to_end(key)
    while len(cache) > KEPT:
        cache.popitem(last=False)
    return cache[key]


def _told(result: Result) -> str:
    if result.error:
        return result.error
    return f"{result.report['gap_closed']['value']:.1%} of the gap closed"


def _read_shapes(folder: Path | None) -> dict[str, tuple[int, int]]:
    if folder is None or not (folder / SHAPES).is_file():
        return {}
    return json.loads((folder / SHAPES).read_text("utf-8"))


def _write_shapes(folder: Path | None, shapes: dict[str, tuple[int, int]]) -> None:
    if folder is not None:
        _write_json(folder / SHAPES, shapes)


def _write_json(file: Path, value: Any) -> None:
    scratch = file.with_suffix(".part")
    scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
    scratch.replace(file)
