"""The few calls most people need: compress, ask, evaluate (and ``load_model``, from ``models``)."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsp.artifact import FORMAT, SoftPrompt, tokenizer_fingerprint
from jaxsp.console import Display
from jaxsp.data.chat import ChatSlots, encode
from jaxsp.data.documents import Query, as_queries, split_queries
from jaxsp.data.rows import Rows, make_rows
from jaxsp.evaluation import report as reports
from jaxsp.evaluation.conditions import condition_prefixes, read_context
from jaxsp.evaluation.metrics import prompt_kl_function
from jaxsp.losses import trainable
from jaxsp.models.generate import stream
from jaxsp.models.language_model import LanguageModel
from jaxsp.prompts import PROMPT_KINDS
from jaxsp.prompts.initial import INITIALIZERS
from jaxsp.run_folder import RunFolder, check_folder, open_run
from jaxsp.settings import Settings, make_settings
from jaxsp.teacher import store
from jaxsp.teacher.answers import answer_ids
from jaxsp.teacher.signals import hidden_states
from jaxsp.teacher.store import TeacherData
from jaxsp.training.checkpoint import Checkpoints
from jaxsp.training.loop import LoopSettings, NonFiniteLoss, Watcher, train
from jaxsp.training.optimizer import make_optimizer
from jaxsp.training.parallel import DRIVERS
from jaxsp.training.state import TrainState, initial_state
from jaxsp.training.update import Frozen, UpdateSettings
from jaxsp.typing import Interrupted, KeyValues, PyTree, UserError

Queries = Sequence[str | Query | Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Result:
    """What ``compress`` returns.

    Attributes:
      prompt: the trained soft prompt.
      report: what was measured (``report.json`` as a dict).
      lines: the training's metrics, a dict a step.
    """

    prompt: SoftPrompt
    report: dict[str, Any]
    lines: list[dict[str, Any]]

    def save(self, directory: str | Path) -> None:
        """Writes prompt, manifest, report and plots into ``directory``."""
        self.prompt.save(directory)
        reports.write(self.report, self.lines, Path(directory))


def compress(
    model: LanguageModel,
    context: str,
    queries: Queries,
    *,
    held_out: Queries | float = 0.2,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Result:
    """Learns a soft prompt that stands in for a context, and measures how well it does.

    Args:
      model: the frozen model, with its tokenizer.
      context: the text to fold into the prompt.
      queries: inputs z to train on: texts, or dicts ``{"query": ..., "answer": optional}``; a given
        answer replaces the teacher's as ŷ.
      held_out: queries to measure on, never trained on; or the fraction of ``queries`` to hold out.
      out: a folder for the artifact, the report and the checkpoints; without one nothing is written.
      resume: go on with the run in ``out``, which must have the same settings.
      overwrite: replace an earlier run in ``out``.
      progress: whether to show what is going on, on standard error.
      **settings: fields of ``Settings``, such as ``length=16``, ``objective="kl"``, ``steps=100``,
        ``batch_size=8``, ``learning_rate=0.02``, ``seed=0``.

    Returns:
      The prompt and the report.

    Raises:
      UserError: an input that can't be meant; nothing is then written.
      NonFiniteLoss: training diverged; the best prompt before that is saved in ``out``.

    Example:
      >>> import jaxsp
      >>> model = jaxsp.load_model("smollm2-135m-instruct")
      >>> result = jaxsp.compress(
      ...     model,
      ...     "The tank of the machine holds 1.2 litres. The cable is 90 centimetres long.",
      ...     ["How much does the tank hold?", "How long is the cable?"],
      ...     held_out=["What is the length of the cable?"],
      ...     length=4, steps=2, batch_size=2, max_answer_tokens=8, progress=False,
      ... )
      >>> result.prompt.length, sorted(result.report["gap_closed"])
      (4, ['high', 'low', 'value'])
    """
    display = Display(visible=progress)
    chosen = make_settings(settings)
    chosen.check()
    if out is not None:
        check_folder(out, resume=resume, overwrite=overwrite)
    elif resume or overwrite:
        raise UserError("resume and overwrite need a folder: pass out=....")
    train_queries, held_out_queries = split_queries(
        as_queries(queries),
        float(held_out) if isinstance(held_out, float | int) else as_queries(held_out),
        chosen.seed,
    )
    task = _encode(model, context, [*train_queries, *held_out_queries], chosen)
    if not chosen.length < len(task.context_ids):
        raise UserError(
            f"The prompt must be shorter than the context: --length is {chosen.length}, the context"
            f" has {len(task.context_ids)} tokens."
        )
    folder = None
    if out is not None:
        identity = _identity(model, task, chosen, len(train_queries))
        folder = open_run(out, identity, resume=resume, overwrite=overwrite)

    before = read_context(model, task.before_ids)
    teacher, full_context = _teach(model, task, chosen, before, folder, display)
    train_rows = teacher.rows.take(range(len(train_queries)))
    held_out_rows = teacher.rows.take(range(len(train_queries), len(teacher.rows)))
    initial = _initial_sigma(model, task.context_ids, chosen)

    def finished(state: TrainState) -> SoftPrompt:
        sigma = {name: np.asarray(array) for name, array in state.best_sigma.items()}
        return SoftPrompt(sigma, _manifest(model, task, chosen, int(state.step)), context)

    try:
        state, lines = _train(
            model, chosen, before, initial, train_rows, held_out_rows, folder, display
        )
    except NonFiniteLoss as error:
        if folder is None:
            raise
        finished(error.state).save(folder.directory)
        message = f"{error} The best prompt until then is saved in {folder.directory}."
        raise NonFiniteLoss(message, error.state) from None
    except Interrupted as error:
        if folder is None:
            raise
        raise Interrupted(
            f"{error} It is saved; go on with the same command and --resume."
        ) from None

    prompt = finished(state)
    measured = _measure(
        model,
        task,
        teacher,
        full_context,
        before,
        prompt,
        initial,
        len(train_queries),
        chosen,
        display,
    )
    prompt.manifest["held_out"] = {
        "gap_closed": measured["gap_closed"],
        **measured["held_out"]["conditions"]["prompt"],
    }
    report = {
        **_header(model, task, prompt, chosen.steps),
        **measured,
        "seconds": _seconds(model, display, lines),
        "environment": _environment(),
    }
    result = Result(prompt, report, lines)
    if folder is not None:
        result.save(folder.directory)
    return result


def ask(model: LanguageModel, prompt: SoftPrompt, question: str, *, max_tokens: int = 128) -> str:
    """The model's greedy answer to a question, reading the soft prompt in place of the context.

    Args:
      model: the model that the prompt was trained for.
      prompt: the soft prompt.
      question: the input z.
      max_tokens: longest answer.

    Raises:
      UserError: the prompt belongs to another model, or the question is too long.

    Example:
      >>> import jaxsp
      >>> model = jaxsp.load_model("smollm2-135m-instruct")
      >>> answer = jaxsp.ask(model, jaxsp.SoftPrompt.load(demo_folder), "How long is the cable?")
      >>> isinstance(answer, str)
      True
    """
    return "".join(stream_answer(model, prompt.prefix(model), prompt.slots, question, max_tokens))


def stream_answer(
    model: LanguageModel, prefix: KeyValues, slots: ChatSlots, question: str, max_tokens: int
) -> Iterator[str]:
    """The pieces of the greedy answer's text as they come."""
    tokenizer = _tokenizer(model)
    ids = slots.query_ids(tokenizer, question)
    room = model.config.window - int(prefix.next_position[0]) - len(ids)
    if room < 1:
        raise UserError(
            f"The question has {len(ids)} tokens, more than the model's window of"
            f" {model.config.window} leaves; ask a shorter one."
        )
    answer: list[int] = []
    shown = ""
    for token in stream(
        model.params,
        model.config,
        prefix,
        ids,
        stop_ids=model.stop_ids,
        max_tokens=min(max_tokens, room),
    ):
        answer.append(token)
        text = str(tokenizer.decode(answer, skip_special_tokens=True))
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: wait for the rest
            yield text[len(shown) :]
            shown = text


def evaluate(
    model: LanguageModel,
    prompt: SoftPrompt,
    queries: Queries,
    *,
    context: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures a saved prompt between its brackets, on queries of your choice.

    Args:
      model: the model that the prompt was trained for.
      prompt: the soft prompt.
      queries: inputs z, preferably none that it was trained on.
      context: the text that the prompt stands for; by default the one saved with it.
      progress: whether to show what is going on, on standard error.

    Returns:
      The part of ``report.json`` that concerns held-out queries.

    Raises:
      UserError: the prompt belongs to another model, or its context is not known.
    """
    prompt.check(model)
    context = prompt.context if context is None else context
    if context is None:
        raise UserError("The prompt was saved without its context; pass it to measure against it.")
    asked = as_queries(queries)
    if not asked:
        raise UserError("There is no query to evaluate on; give at least one.")
    display = Display(visible=progress)
    trained = prompt.manifest["training"]
    settings = make_settings(trained)
    task = _encode(model, context, asked, settings)
    before = read_context(model, task.before_ids)
    teacher, full_context = _teach(model, task, settings, before, None, display)
    initial = _initial_sigma(model, task.context_ids, settings)
    measured = _measure(
        model, task, teacher, full_context, before, prompt, initial, 0, settings, display
    )
    return {**_header(model, task, prompt, settings.steps), **measured}


@dataclasses.dataclass(frozen=True)
class _Task:
    """The texts of a job as token ids."""

    slots: ChatSlots
    before_ids: np.ndarray
    context_ids: np.ndarray
    queries: list[Query]
    query_ids: list[list[int]]
    given_ids: list[list[int] | None]


def _encode(model: LanguageModel, context: str, queries: list[Query], settings: Settings) -> _Task:
    tokenizer = _tokenizer(model)
    slots = ChatSlots.of(tokenizer)
    before_ids = np.array(slots.before_ids(tokenizer), np.int32)
    context_ids = np.array(encode(tokenizer, context, control=False), np.int32)
    query_ids = [slots.query_ids(tokenizer, query.text) for query in queries]
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    given_ids = [
        None if q.answer is None else [*encode(tokenizer, q.answer, control=False), *end]
        for q in queries
    ]
    room = max(settings.max_answer_tokens, *(len(ids or ()) for ids in given_ids))
    longest = max(len(ids) for ids in query_ids)
    needed = len(before_ids) + len(context_ids) + longest + room
    if needed > model.config.window:
        raise UserError(
            f"The context has {len(context_ids)} tokens; with the chat's text ({len(before_ids)}),"
            f" the longest query ({longest}) and the answer ({room}) that is {needed}, more than the"
            f" model's window of {model.config.window}. Shorten the context."
        )
    return _Task(slots, before_ids, context_ids, queries, query_ids, given_ids)


def _tokenizer(model: LanguageModel):
    if model.tokenizer is None:
        raise UserError("The model was loaded without a tokenizer; load it with one.")
    return model.tokenizer


def _teach(
    model: LanguageModel,
    task: _Task,
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


def _initial_sigma(model: LanguageModel, context_ids: np.ndarray, settings: Settings) -> PyTree:
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    vectors = INITIALIZERS[settings.initial](
        key, context_ids, settings.length, model.embed, model.config.vocab_size
    )
    return PROMPT_KINDS["embedding"].initial(vectors)


def _train(
    model: LanguageModel,
    settings: Settings,
    before: KeyValues,
    initial: PyTree,
    train_rows: Rows,
    held_out_rows: Rows,
    folder: RunFolder | None,
    display: Display,
) -> tuple[TrainState, list[dict[str, Any]]]:
    optimizer, schedule = make_optimizer(settings, settings.steps)
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


def _measure(
    model: LanguageModel,
    task: _Task,
    teacher: TeacherData,
    full_context: KeyValues,
    before: KeyValues,
    prompt: SoftPrompt,
    initial: PyTree,
    train_count: int,
    settings: Settings,
    display: Display,
) -> dict[str, Any]:
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


def _header(model: LanguageModel, task: _Task, prompt: SoftPrompt, steps: int) -> dict[str, Any]:
    return {
        "model": model.name,
        "dtype": model.config.dtype,
        "context_tokens": len(task.context_ids),
        "prompt_length": prompt.length,
        "compression": len(task.context_ids) / prompt.length,
        "objective": prompt.manifest["training"]["objective"],
        "steps": steps,
    }


def _manifest(model: LanguageModel, task: _Task, settings: Settings, steps: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kind": "embedding",
        "length": settings.length,
        "model": {"name": model.name, "fingerprint": model.fingerprint},
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
        "versions": _environment()["versions"],
    }


def _identity(
    model: LanguageModel, task: _Task, settings: Settings, train_count: int
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


def _seconds(
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


def _environment() -> dict[str, Any]:
    packages = ("jaxsp", "jax", "flax", "optax", "transformers")
    return {
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.local_device_count(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
