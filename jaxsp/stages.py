"""The stages of a compression, in their order: encode, teach, start, train, measure, describe.

``api`` strings them together; each takes what the ones before it return.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxsp import processes as hosts
from jaxsp.artifact import FORMAT, SoftPrompt, tokenizer_fingerprint
from jaxsp.progress import Display
from jaxsp.models.chat import ChatSlots, encode
from jaxsp.data.documents import Query
from jaxsp.data.packing import Packing
from jaxsp.data.examples import Rows, make_rows
from jaxsp.evaluation import report as reports
from jaxsp.evaluation.brackets import CONDITIONS, bracket_prefixes, read_context, read_prompt
from jaxsp.evaluation.metrics import mean_kl_function
from jaxsp.evaluation.report import Measured
from jaxsp.losses import trainable
from jaxsp.models.config import DecoderConfig
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.sharding import as_mesh
from jaxsp.prompts import PROMPT_KINDS
from jaxsp.prompts.initializers import INITIALIZERS
from jaxsp.runs.folder import RunFolder
from jaxsp.settings import Settings
from jaxsp.teacher import store
from jaxsp.teacher.answers import answer_ids
from jaxsp.teacher.signals import hidden_states
from jaxsp.teacher.store import TeacherData
from jaxsp.training.checkpoint import Checkpoints
from jaxsp.training.loop import LoopSettings, Watcher, train
from jaxsp.training.optimizers import make_optimizer, make_pace, root_mean_square
from jaxsp.training.drivers import DRIVERS
from jaxsp.training.state import TrainState, initial_state
from jaxsp.training.update import Frozen, UpdateSettings
from jaxsp.typing import KeyValues, PyTree, UserError

LAYOUT = ("parallel", "mesh", "accumulate")
"""Settings that say where and in what parts it is computed, and not what."""

KIND = "embedding"
"""Of prompt: a key of ``jaxsp.prompts.PROMPT_KINDS``."""


@dataclasses.dataclass(frozen=True)
class Task:
    """The texts of a job as token ids; the queries to train on first, then those held out."""

    slots: ChatSlots
    before_ids: np.ndarray
    context_ids: np.ndarray
    queries: list[Query]
    train_count: int
    query_ids: list[list[int]]
    given_ids: list[list[int] | None]


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What the teacher said, and all else that training and evaluation need beside σ.

    Attributes:
      task: what was asked.
      settings: of the job.
      before: the prefix before the context, and before σ.
      teacher: its answers and its hidden states.
      packing: the shape of every batch.
    """

    task: Task
    settings: Settings
    before: KeyValues
    teacher: TeacherData
    packing: Packing

    @property
    def train_rows(self) -> Rows:
        return self.teacher.rows.take(range(self.task.train_count))

    @property
    def held_out_rows(self) -> Rows:
        return self.teacher.rows.take(range(self.task.train_count, len(self.teacher.rows)))


def encode_task(
    model: LanguageModel,
    context: str,
    train: list[Query],
    held_out: list[Query],
    settings: Settings,
) -> Task:
    """The job as token ids; raises ``UserError`` if it fits neither the model's window nor the prompt."""
    tokenizer = tokenizer_of(model)
    queries = [*train, *held_out]
    slots = ChatSlots.of(tokenizer)
    before_ids = np.array(slots.before_ids(tokenizer), np.int32)
    context_ids = np.array(encode(tokenizer, context, control=False), np.int32)
    query_ids = [slots.query_ids(tokenizer, query.text) for query in queries]
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    given_ids = [
        None if q.answer is None else [*encode(tokenizer, q.answer, control=False), *end]
        for q in queries
    ]
    for ids in (before_ids, context_ids, *query_ids, *filter(None, given_ids)):
        model.check_ids(ids)
    room = max(settings.max_answer_tokens, *(len(ids or ()) for ids in given_ids))
    longest = max(len(ids) for ids in query_ids)
    needed = len(before_ids) + len(context_ids) + longest + room
    if needed > model.config.window:
        raise UserError(
            f"The context has {len(context_ids)} tokens; with the chat's text ({len(before_ids)}),"
            f" the longest query ({longest}) and the answer ({room}) that is {needed}, more than the"
            f" model's window of {model.config.window}. Shorten the context."
        )
    if not settings.length < len(context_ids):
        raise UserError(
            f"The prompt must be shorter than the context: --length is {settings.length}, the context"
            f" has {len(context_ids)} tokens."
        )
    return Task(slots, before_ids, context_ids, queries, len(train), query_ids, given_ids)


def tokenizer_of(model: LanguageModel):
    """The model's tokenizer; raises ``UserError`` if it was loaded without one."""
    if model.tokenizer is None:
        raise UserError("The model was loaded without a tokenizer; load it with one.")
    return model.tokenizer


def teach(
    model: LanguageModel,
    task: Task,
    settings: Settings,
    before: KeyValues,
    file: Path | None,
    display: Display,
    packing: Callable[[Rows, Settings], Packing] | None = None,
) -> tuple[Lesson, KeyValues]:
    """The lesson, and the context's prefix that it was read from.

    What the teacher says is kept in ``file``, or read there. ``packing`` chooses the shape of the
    batches; ``packing_of`` if ``None``.
    """
    packing = packing or packing_of
    with display.phase("answers", f"Answers to {len(task.queries)} queries") as note:
        full_context = read_context(model, task.context_ids, before)
        if file is not None and file.is_file():
            data = store.load(file)
            return Lesson(task, settings, before, data, packing(data.rows, settings)), full_context
        count = len(task.queries)
        answers = answer_ids(
            model,
            full_context,
            [task.query_ids[i] for i in hosts.mine(count)],
            max_tokens=settings.max_answer_tokens,
            on_batch=lambda done: note(f"{done} done"),
        )
        answers = hosts.all_shares(answers, count)
    with display.phase("signals", "Teacher's distributions"):
        targets = [given or own for given, own in zip(task.given_ids, answers, strict=True)]
        rows = make_rows(task.query_ids, targets)
        shape = packing(rows, settings)
        hidden = hidden_states(model, full_context, rows.take(hosts.mine(count)), shape)
        hidden = hosts.all_shares(hidden, count)
        data = TeacherData(dataclasses.replace(rows, teacher_hidden=hidden), answers)
        if file is not None and hosts.is_first():
            store.save(data, file)
    return Lesson(task, settings, before, data, shape), full_context


def packing_of(rows: Rows, settings: Settings) -> Packing:
    """The shape of all batches, in training and in evaluation.

    Raises:
      UserError: ``settings.batch_shape`` has no room for the longest of these rows.
    """
    if settings.batch_shape is None:
        return Packing.of(rows.lengths, settings.batch_size)
    packing = Packing(*settings.batch_shape)
    if rows.lengths.max() > packing.length:
        raise UserError(
            f"--batch-shape has rows of {packing.length} tokens, and a query with its answer has"
            f" {rows.lengths.max()}; give it rows of at least so many."
        )
    return packing


def initial_state_of(model: LanguageModel, lesson: Lesson) -> TrainState:
    """The state before the first step: σ by ``settings.initial``."""
    settings = lesson.settings
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    vectors = INITIALIZERS[settings.initial](
        key, lesson.task.context_ids, settings.length, model.embed, model.config.vocab_size
    )
    sigma = PROMPT_KINDS[KIND].initial(vectors)
    return initial_state(
        sigma,
        make_optimizer(settings),
        key=jax.random.key(settings.seed),
        pace=make_pace(settings, settings.steps, root_mean_square(sigma)),
    )


def update_settings(config: DecoderConfig, settings: Settings) -> UpdateSettings:
    """What of the settings is compiled into the update of a model with these hyper-parameters."""
    return UpdateSettings(
        config,
        KIND,
        trainable(settings.objective),
        make_optimizer(settings),
        settings.accumulate,
    )


def mesh_of(settings: Settings) -> Mesh | None:
    """The mesh that the settings ask for; raises ``UserError`` if these devices can't be laid out so."""
    if settings.parallel == "mesh":
        return as_mesh(settings.mesh)
    if jax.process_count() > 1:
        raise UserError(f"Several processes need --parallel mesh, not {settings.parallel}.")
    return None


def train_prompt(
    model: LanguageModel,
    lesson: Lesson,
    state: TrainState,
    folder: RunFolder | None,
    display: Display,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """The trained state and a dict of metrics a step; goes on from the newest checkpoint, if any."""
    settings, before, packing = lesson.settings, lesson.before, lesson.packing
    frozen = Frozen(model.params, before)
    driver = DRIVERS[settings.parallel](
        frozen, update_settings(model.config, settings), mesh_of(settings)
    )
    checkpoints = None
    if folder is not None:
        checkpoints = Checkpoints(folder.checkpoints)
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(state)
            display.say(f"Resuming after step {int(state.step)}.")
    mean_kl = mean_kl_function(model, before, KIND)
    held_out = lesson.held_out_rows
    batches = [one(packing.pack(held_out, index)) for index in packing.in_order(held_out)]
    with display.training(settings.steps) as on_step:
        return train(
            driver,
            state,
            lesson.train_rows,
            LoopSettings(
                settings.steps,
                packing,
                settings.evaluate_every,
                settings.checkpoint_every,
                settings.patience,
            ),
            evaluate=lambda sigma: float(mean_kl(one(sigma), batches)[0]),
            watcher=Watcher(folder.metrics if folder else None, checkpoints, on_step),
        )


def one(tree: PyTree) -> PyTree:
    """What stands for a single prompt where several are expected: with a leading axis of size 1."""
    return jax.tree.map(lambda leaf: leaf[None], tree)


def measure_full_context(
    model: LanguageModel, lesson: Lesson, full_context: KeyValues, display: Display
) -> Measured:
    """The condition that σ is to equal."""
    with display.phase("evaluate", "Evaluation of the full context"):
        return _measure(model, lesson, full_context, lesson.teacher.answers)


def measure_brackets(
    model: LanguageModel, lesson: Lesson, initial: PyTree, display: Display
) -> dict[str, Measured]:
    """The conditions that depend on neither the whole context nor the trained prompt."""
    with display.phase("evaluate", "Evaluation of the brackets") as note:
        prefixes = bracket_prefixes(model, lesson.before, lesson.task.context_ids, initial, KIND)
        done: dict[int, Measured] = {}
        for name, prefix in prefixes.items():
            if id(prefix) not in done:
                note(name.replace("_", " "))
                done[id(prefix)] = _measure(model, lesson, prefix)
        return {name: done[id(prefix)] for name, prefix in prefixes.items()}


def measure(
    model: LanguageModel,
    lesson: Lesson,
    sigma: PyTree,
    brackets: dict[str, Measured],
    display: Display,
) -> dict[str, Any]:
    """What the report says of the queries: all conditions, the gap closed, the verdict."""
    with display.phase("evaluate", "Evaluation"):
        prefix = read_prompt(model, sigma, lesson.before, KIND)
        found = {**brackets, "prompt": _measure(model, lesson, prefix)}
        return reports.summarise(
            model,
            {name: found[name] for name in CONDITIONS},
            lesson.teacher.rows,
            [query.text for query in lesson.task.queries],
            lesson.task.train_count,
            lesson.settings.seed,
        )


def _measure(
    model: LanguageModel,
    lesson: Lesson,
    prefix: KeyValues,
    answers: list[list[int]] | None = None,
) -> Measured:
    return reports.measure(
        model,
        prefix,
        lesson.teacher,
        lesson.task.query_ids,
        lesson.packing,
        max_tokens=lesson.settings.max_answer_tokens,
        answers=answers,
    )


def finished_prompt(
    model: LanguageModel, lesson: Lesson, state: TrainState, context: str
) -> SoftPrompt:
    """The prompt that ``settings.keep`` asks for."""
    kept = state.sigma if lesson.settings.keep == "last" else state.best_sigma
    sigma = {name: np.asarray(array) for name, array in kept.items()}
    told = manifest(model, lesson.task, lesson.settings, int(state.step))
    return SoftPrompt(sigma, told, context)


def described(
    model: LanguageModel, task: Task, prompt: SoftPrompt, measured: dict[str, Any]
) -> dict[str, Any]:
    """The report but for seconds and environment; the prompt's manifest gets its held-out figures."""
    prompt.manifest["held_out"] = {
        "gap_closed": measured["gap_closed"],
        **measured["held_out"]["conditions"]["prompt"],
    }
    return {**header(model, task, prompt), **measured}


def header(model: LanguageModel, task: Task, prompt: SoftPrompt) -> dict[str, Any]:
    """The report's first fields: what stands for what."""
    return {
        "model": model.name,
        "dtype": model.config.dtype,
        "weights": model.config.weights,
        "context_tokens": len(task.context_ids),
        "prompt_length": prompt.length,
        "compression": len(task.context_ids) / prompt.length,
        "objective": prompt.manifest["training"]["objective"],
        "steps": prompt.manifest["training"]["steps"],
        "kept": prompt.manifest["training"].get("keep", "best"),
    }


def manifest(model: LanguageModel, task: Task, settings: Settings, steps: int) -> dict[str, Any]:
    """What ``manifest.json`` says of the prompt, but for its held-out figures."""
    return {
        "format": FORMAT,
        "kind": KIND,
        "length": settings.length,
        "model": {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "weights": model.config.weights,
        },
        "tokenizer": {"fingerprint": tokenizer_fingerprint(model.tokenizer)},
        "slots": {
            **dataclasses.asdict(task.slots),
            "before_ids": task.before_ids.tolist(),
            "position_offset": len(task.before_ids),
        },
        "dtype": "float32",
        "model_dtype": model.config.dtype,
        "context_tokens": len(task.context_ids),
        "training": {**dataclasses.asdict(settings), "steps": steps},
        "versions": environment()["versions"],
    }


def identity(model: LanguageModel, task: Task, settings: Settings) -> dict[str, Any]:
    """Everything that decides the result of a run: a resumed one must have the same.

    Not the layout of devices: it changes rounding alone.
    """
    count = task.train_count
    chosen = {k: v for k, v in dataclasses.asdict(settings).items() if k not in LAYOUT}
    texts = [[query.text, query.answer] for query in task.queries]
    return {
        **chosen,
        "model": model.name,
        "weights": model.fingerprint,
        "dtype": model.config.dtype,
        "context": hashlib.sha256(task.context_ids.tobytes()).hexdigest()[:16],
        "queries": hashlib.sha256(repr(texts[:count]).encode()).hexdigest()[:16],
        "held_out": hashlib.sha256(repr(texts[count:]).encode()).hexdigest()[:16],
    }


def seconds_by_phase(
    model: LanguageModel, display: Display, lines: list[dict[str, Any]]
) -> dict[str, float]:
    """Seconds by phase; ``compile`` is what the first step took beyond a usual one."""
    phases = {name: display.seconds.get(name, 0.0) for name in ("answers", "signals")}
    steps = [line["seconds"] for line in lines if "seconds" in line]
    compiling = max(0.0, steps[0] - statistics.median(steps)) if steps else 0.0
    training = max(0.0, display.seconds["train"] - compiling)
    seconds = {
        "load": model.load_seconds,
        **phases,
        "compile": compiling,
        "train": training,
        "evaluate": display.seconds.get("evaluate", 0.0),  # the first process alone does
    }
    return {**seconds, "total": sum(seconds.values())}


def environment() -> dict[str, Any]:
    """Python, device and package versions."""
    packages = ("jaxsp", "jax", "flax", "optax", "transformers")
    return {
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.local_device_count(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
