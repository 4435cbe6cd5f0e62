"""The stages of a compression, in their order: encode, teach, start, train, measure, describe.

``api`` strings them together; each takes what the ones before it return.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
import statistics
from typing import Any

import jax
import numpy as np

from jaxsp.artifact import FORMAT, SoftPrompt, tokenizer_fingerprint
from jaxsp.console import Display
from jaxsp.data.chat import ChatSlots, encode
from jaxsp.data.documents import Query
from jaxsp.data.rows import Rows, make_rows
from jaxsp.evaluation import report as reports
from jaxsp.evaluation.conditions import condition_prefixes, read_context
from jaxsp.evaluation.metrics import prompt_kl_function
from jaxsp.losses import trainable
from jaxsp.models.language_model import LanguageModel
from jaxsp.prompts import PROMPT_KINDS
from jaxsp.prompts.initial import INITIALIZERS
from jaxsp.run_folder import RunFolder
from jaxsp.settings import Settings
from jaxsp.teacher import store
from jaxsp.teacher.answers import answer_ids
from jaxsp.teacher.signals import hidden_states
from jaxsp.teacher.store import TeacherData
from jaxsp.training.checkpoint import Checkpoints
from jaxsp.training.loop import LoopSettings, Watcher, train
from jaxsp.training.optimizer import make_optimizer, root_mean_square
from jaxsp.training.parallel import DRIVERS
from jaxsp.training.state import TrainState, initial_state
from jaxsp.training.update import Frozen, UpdateSettings
from jaxsp.typing import KeyValues, PyTree, UserError


@dataclasses.dataclass(frozen=True)
class Task:
    """The texts of a job as token ids."""

    slots: ChatSlots
    before_ids: np.ndarray
    context_ids: np.ndarray
    queries: list[Query]
    query_ids: list[list[int]]
    given_ids: list[list[int] | None]


def encode_task(
    model: LanguageModel, context: str, queries: list[Query], settings: Settings
) -> Task:
    """The job as token ids; raises ``UserError`` if it does not fit the model's window."""
    tokenizer = tokenizer_of(model)
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
    return Task(slots, before_ids, context_ids, queries, query_ids, given_ids)


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
    folder: RunFolder | None,
    display: Display,
) -> tuple[TeacherData, KeyValues]:
    """The teacher's answers and hidden states, and the context's prefix that they were read from."""
    with display.phase("answers", f"Answers to {len(task.queries)} queries") as note:
        full_context = read_context(model, task.context_ids, before)
        if folder is not None and folder.teacher.is_file():
            return store.load(folder.teacher), full_context
        answers = answer_ids(
            model,
            full_context,
            task.query_ids,
            max_tokens=settings.max_answer_tokens,
            on_batch=lambda done: note(f"{done} done"),
        )
    with display.phase("signals", "Teacher's distributions"):
        targets = [given or own for given, own in zip(task.given_ids, answers, strict=True)]
        rows = make_rows(task.query_ids, targets)
        rows = dataclasses.replace(rows, teacher_hidden=hidden_states(model, full_context, rows))
        data = TeacherData(rows, answers)
        if folder is not None:
            store.save(data, folder.teacher)
    return data, full_context


def initial_sigma(model: LanguageModel, context_ids: np.ndarray, settings: Settings) -> PyTree:
    """σ before training, by ``settings.initial``."""
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    vectors = INITIALIZERS[settings.initial](
        key, context_ids, settings.length, model.embed, model.config.vocab_size
    )
    return PROMPT_KINDS["embedding"].initial(vectors)


def train_prompt(
    model: LanguageModel,
    settings: Settings,
    before: KeyValues,
    initial: PyTree,
    train_rows: Rows,
    held_out_rows: Rows,
    folder: RunFolder | None,
    display: Display,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """The trained state and a dict of metrics a step; goes on from the newest checkpoint, if any."""
    optimizer, schedule = make_optimizer(settings, settings.steps, root_mean_square(initial))
    kind = "embedding"
    driver = DRIVERS[settings.parallel](
        Frozen(model.params, before),
        UpdateSettings(model.config, kind, trainable(settings.objective), optimizer),
    )
    state = initial_state(initial, optimizer, key=jax.random.key(settings.seed))
    checkpoints = None
    if folder is not None:
        checkpoints = Checkpoints(folder.checkpoints)
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(state)
            display.say(f"Resuming after step {int(state.step)}.")
    with display.training(settings.steps) as on_step:
        return train(
            driver,
            state,
            train_rows,
            LoopSettings(
                settings.steps,
                settings.batch_size,
                settings.evaluate_every,
                settings.checkpoint_every,
            ),
            evaluate=prompt_kl_function(model, held_out_rows, before, kind),
            schedule=schedule,
            watcher=Watcher(folder.metrics if folder else None, checkpoints, on_step),
        )


def measure(
    model: LanguageModel,
    task: Task,
    teacher: TeacherData,
    full_context: KeyValues,
    before: KeyValues,
    prompt: SoftPrompt,
    initial: PyTree,
    train_count: int,
    settings: Settings,
    display: Display,
) -> dict[str, Any]:
    """What the report says of the queries: all conditions, the gap closed, the verdict."""
    with display.phase("evaluate", "Evaluation") as note:
        prefixes = condition_prefixes(
            model,
            before=before,
            full_context=full_context,
            context=task.context_ids,
            sigma=prompt.sigma,
            initial=initial,
            kind=prompt.kind,
            length=prompt.length,
        )
        return reports.measure(
            model,
            prefixes,
            teacher.rows,
            [query.text for query in task.queries],
            task.query_ids,
            teacher.answers,
            train_count,
            max_tokens=settings.max_answer_tokens,
            seed=settings.seed,
            on_condition=lambda name: note(name.replace("_", " ")),
        )


def header(model: LanguageModel, task: Task, prompt: SoftPrompt, steps: int) -> dict[str, Any]:
    """The report's first fields: what stands for what."""
    return {
        "model": model.name,
        "dtype": model.config.dtype,
        "weights": model.config.weights,
        "context_tokens": len(task.context_ids),
        "prompt_length": prompt.length,
        "compression": len(task.context_ids) / prompt.length,
        "objective": prompt.manifest["training"]["objective"],
        "steps": steps,
    }


def manifest(model: LanguageModel, task: Task, settings: Settings, steps: int) -> dict[str, Any]:
    """What ``manifest.json`` says of the prompt, but for its held-out figures."""
    return {
        "format": FORMAT,
        "kind": "embedding",
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


def identity(
    model: LanguageModel, task: Task, settings: Settings, train_count: int
) -> dict[str, Any]:
    """Everything that decides the result of a run: a resumed one must have the same."""
    texts = [[query.text, query.answer] for query in task.queries]
    return {
        **dataclasses.asdict(settings),
        "model": model.name,
        "weights": model.fingerprint,
        "dtype": model.config.dtype,
        "context": hashlib.sha256(task.context_ids.tobytes()).hexdigest()[:16],
        "queries": hashlib.sha256(repr(texts[:train_count]).encode()).hexdigest()[:16],
        "held_out": hashlib.sha256(repr(texts[train_count:]).encode()).hexdigest()[:16],
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
        "evaluate": display.seconds["evaluate"],
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
