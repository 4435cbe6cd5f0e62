"""The few calls most people need: compress, ask, evaluate (and ``load_model``, from ``models``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsp import stages
from jaxsp import processes as hosts
from jaxsp.artifact import SoftPrompt
from jaxsp.progress import Display
from jaxsp.models.chat import ChatSlots
from jaxsp.data.documents import Query, as_queries, split_queries
from jaxsp.evaluation import report as reports
from jaxsp.evaluation.brackets import read_context
from jaxsp.models.generation.engine import Sampling, stream
from jaxsp.models.language_model import LanguageModel
from jaxsp.runs.folder import RunFolder, check_folder, open_run
from jaxsp.settings import make_settings
from jaxsp.training.loop import NonFiniteLoss
from jaxsp.typing import Interrupted, KeyValues, UserError

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

    @property
    def error(self) -> str | None:
        """Why training failed (``compress_many``): the prompt is the best until then, nothing is measured."""
        return self.report.get("error")

    def save(self, directory: str | Path) -> None:
        """Writes prompt, manifest, report and plots into ``directory``."""
        self.prompt.save(directory)
        reports.write(self.report, self.lines, Path(directory))


@hosts.noticing_loss()
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
        ``batch_size=8``, ``learning_rate=0.5``, ``seed=0``.

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
    mesh = stages.mesh_of(chosen)
    model = model if mesh is None else model.on(mesh)
    if out is not None:
        directory = Path(out)
        hosts.first(lambda: check_folder(directory, resume=resume, overwrite=overwrite))
    elif resume or overwrite:
        raise UserError("resume and overwrite need a folder: pass out=....")
    train_queries, held_out_queries = split_queries(
        as_queries(queries),
        float(held_out) if isinstance(held_out, float | int) else as_queries(held_out),
        chosen.seed,
    )
    task = stages.encode_task(model, context, train_queries, held_out_queries, chosen)
    identity = stages.identity(model, task, chosen)
    hosts.agree(identity)
    folder = None
    if out is not None:
        folder = RunFolder(Path(out))

        def open_folder() -> None:
            open_run(folder.directory, identity, resume=resume, overwrite=overwrite)

        hosts.first(open_folder)

    before = read_context(model, task.before_ids)
    file = folder.teacher if folder else None
    lesson, full_context = stages.teach(model, task, chosen, before, file, display)
    start = stages.initial_state_of(model, lesson)
    try:
        state, lines = stages.train_prompt(model, lesson, start, folder, display)
    except NonFiniteLoss as error:
        if folder is None:
            raise
        if hosts.is_first():
            stages.finished_prompt(model, lesson, error.state, context).save(folder.directory)
        message = f"{error} The best prompt until then is saved in {folder.directory}."
        raise NonFiniteLoss(message, error.state) from None
    except Interrupted as error:
        if folder is None:
            raise
        raise Interrupted(
            f"{error} It is saved; go on with the same command and --resume."
        ) from None

    prompt = stages.finished_prompt(model, lesson, state, context)

    def measure() -> dict[str, Any]:
        brackets = {
            "full_context": stages.measure_full_context(model, lesson, full_context, display),
            **stages.measure_brackets(model, lesson, start.sigma, display),
        }
        return stages.measure(model, lesson, prompt.sigma, brackets, display)

    measured = hosts.first(measure)
    report = {
        **stages.described(model, task, prompt, measured),
        "seconds": stages.seconds_by_phase(model, display, lines),
        "environment": stages.environment(),
    }
    result = Result(prompt, report, lines)
    if folder is not None and hosts.is_first():
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
    tokenizer = stages.tokenizer_of(model)
    ids = slots.query_ids(tokenizer, question)
    room = model.config.window - int(prefix.next_position[0]) - len(ids)
    if room < 1:
        raise UserError(
            f"The question has {len(ids)} tokens, more than the model's window of"
            f" {model.config.window} leaves; ask a shorter one."
        )
    answer: list[int] = []
    shown = ""
    sampling = Sampling(stop_ids=model.stop_ids, max_tokens=min(max_tokens, room))
    for token in stream(model.params, model.config, prefix, ids, sampling):
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
    settings = dataclasses.replace(make_settings(trained), batch_shape=None)  # these queries' own
    task = stages.encode_task(model, context, [], asked, settings)
    before = read_context(model, task.before_ids)
    lesson, full_context = stages.teach(model, task, settings, before, None, display)
    initial = stages.initial_state_of(model, lesson).sigma
    brackets = {
        "full_context": stages.measure_full_context(model, lesson, full_context, display),
        **stages.measure_brackets(model, lesson, initial, display),
    }
    measured = stages.measure(model, lesson, prompt.sigma, brackets, display)
    return {**stages.header(model, task, prompt), **measured}
