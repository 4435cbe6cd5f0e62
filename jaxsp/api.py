"""The few calls most people need: compress, compress_many, ask, evaluate, export, import_peft, push."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

from jaxsp import exports, hub, processes
from jaxsp.artifact import FILES, SoftPrompt, check_decoder, named_model
from jaxsp.data.documents import Query, as_queries
from jaxsp.errors import check_text
from jaxsp.evaluation import asking, brackets, report as reports
from jaxsp.evaluation.asking import AskOptions
from jaxsp.exports import Exported, push as pushing
from jaxsp.exports.from_peft import Adapter
from jaxsp.files import as_path
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.load import as_model, load_model
from jaxsp.progress import Display
from jaxsp.runs.folder import REPORT, Result, read_report
from jaxsp.runs.start import Start, open_run, run_one
from jaxsp.settings import Options, make_settings, plain
from jaxsp.study import Study, study_alone
from jaxsp.teacher.another import Teacher
from jaxsp.teacher.problem import read_preamble, run_teacher, tokenize
from jaxsp.teacher.store import Store
from jaxsp.training.slots import Callback
from jaxsp.typing import NonFiniteLoss, UserError

Queries = Sequence[str | Query | Mapping[str, Any]]
Saved = SoftPrompt | str | Path


@processes.peer_failure_as_user_error()
def compress(
    model: LanguageModel | str | Path,
    context: str,
    queries: Queries = (),
    *,
    teacher: LanguageModel | str | Path | None = None,
    held_out: Queries | float = 0.2,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    **settings: Unpack[Options],
) -> Result:
    """Learns a soft prompt that stands in for a context, and measures how well it does.

    Args:
      model: the frozen model, with its tokenizer; or a name, as ``load_model`` takes it.
      context: the text to fold into the prompt.
      queries: inputs z to train on: texts, or dicts ``{"query": ..., "answer": optional}``, or rows of
        another data set, as ``read_queries`` in ``jaxsp.data.documents`` takes them; a given answer replaces
        the teacher's as ŷ. Without any the document gives them. To them it adds a quote of each sentence
        that none asks for, or with ``study="on"`` queries of all forms; with ``study="off"`` nothing.
      teacher: another model, or its name: it reads the whole context, gives the answers, and their
        distributions by its own head. Of another vocabulary it gives the answers alone, for
        ``objective="nll"``. By default the model itself.
      held_out: queries to measure on, never trained on; or the fraction of ``queries`` to hold out.
      out: a folder for the artifact, the report and the checkpoints; without one nothing is written.
      resume: go on with the run in ``out``, which must have the same settings.
      overwrite: replace an earlier run in ``out``.
      progress: whether to show what is going on, on standard error.
      callbacks: functions called with every ``Step``, such as ``lambda step: print(step.metrics)``; one that
        returns ``True`` stops the training at the next evaluation. A method ``on_end`` of one is called with
        the id when the training has ended.
      **settings: fields of ``Settings``, such as ``prompt_length=16``, ``steps=100``, ``seed=0``.
        ``objective`` is a name, a text such as ``"js(beta=0.3)"`` or ``"kl=0.7,nll=0.3"``, or a
        ``jaxsp.Objective``; ``optimizer`` a name, or an ``optax.GradientTransformation``, used as it is.

    Returns:
      The prompt and the report.

    Raises:
      UserError: an input that is invalid; nothing is then written.
      NonFiniteLoss: training diverged; the best prompt before that is saved in ``out``.
      Interrupted: on Ctrl-C.

    Example:
      >>> import jaxsp, optax
      >>> losses = []
      >>> result = jaxsp.compress(
      ...     jaxsp.load_model("smollm2-135m-instruct"),
      ...     "The tank of the machine holds 1.2 litres. The cable is 90 centimetres long.",
      ...     ["How much does the tank hold?", "How long is the cable?"],
      ...     held_out=["What is the length of the cable?"],
      ...     prompt_length=4, steps=2, batch_size=2, max_answer_tokens=8, progress=False,
      ...     optimizer=optax.adamw(0.01),
      ...     callbacks=[lambda step: losses.append(step.metrics.get("loss"))],
      ... )
      >>> result.prompt.prompt_length, sorted(result.report["gap_closed"]), len(losses)
      (4, ['high', 'low', 'value'], 3)
    """
    row = {"id": "prompt", "context": context, "queries": queries, "held_out": held_out}
    start = Start(out, resume, overwrite, Display(visible=progress), callbacks)
    result = run_one(as_model(model), row, settings, start, _optional(teacher))
    if result.error:
        where = "" if out is None else f" The best prompt until then is saved in {out}."
        raise NonFiniteLoss(f"{result.error}{where}", result)
    return result


def compress_many(
    model: LanguageModel | str | Path,
    jobs: Iterable[Mapping[str, Any]],
    *,
    teacher: LanguageModel | str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    keep_going: bool = False,
    at_once: int | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    **settings: Unpack[Options],
) -> Iterator[Result]:
    """Compresses every context as ``compress`` would, many prompts in one step.

    Prompts of one length, with one objective and optimizer, train side by side; seeds, learning rates, steps
    and starts may differ. Contexts may be of any lengths. Each draws the same batches as alone: σ is that of
    a run alone but for the rounding of sums.

    Args:
      model: as in ``compress``.
      jobs: dicts ``{"id", "context", "queries", "held_out"}``, with ``held_out`` as in ``compress``, and
        any field of ``Settings`` that is to differ from the run's.
      teacher: as in ``compress``, for all jobs.
      out: a folder: one folder a job, and ``results.parquet`` with a row each. Several processes need one
        that all can reach; each does a part of the list, and gives all results.
      resume: go on with the run in ``out``; what is finished there is not done again.
      overwrite: replace an earlier run in ``out``.
      keep_going: report jobs that are invalid or whose document gives nothing to train on, and do the others.
      at_once: prompts in one step; by default as many as suit the device and its memory.
      progress: whether to show what is going on, on standard error.
      callbacks: as in ``compress``; ``step.job`` is the id.
      **settings: fields of ``Settings``, for all jobs.

    Returns:
      An iterator over the results, in the order of the jobs; each is there as soon as it and all before
      it are finished. The report of one whose loss was not finite has ``error`` and no measurements, and its
      prompt is the best until then.

    Raises:
      UserError: a job or a setting that is invalid (nothing is then done), or a folder of another run.
      Interrupted: on Ctrl-C.

    Example:
      >>> import jaxsp
      >>> model = jaxsp.load_model("smollm2-135m-instruct")
      >>> text, queries = "The tank holds 1.2 litres.", ["How much does it hold?", "What holds it?"]
      >>> jobs = [
      ...     {"id": "a", "context": text, "queries": queries, "held_out": 0.5},
      ...     {"id": "b", "context": f"{text} It is red.", "queries": queries, "held_out": 0.5, "seed": 1},
      ... ]
      >>> options = dict(prompt_length=2, steps=1, batch_size=1, max_answer_tokens=4, progress=False)
      >>> [r.report["id"] for r in jaxsp.compress_many(model, jobs, **options)]
      ['a', 'b']
    """
    rows = [(f"job {i}", row) for i, row in enumerate(jobs, start=1)]
    start = Start(out, resume, overwrite, Display(visible=progress), callbacks, keep_going, at_once)
    return open_run(as_model(model), rows, settings, start, _optional(teacher))


@overload
def ask(prompt: Saved, question: str, /, **options: Unpack[AskOptions]) -> str: ...
@overload
def ask(
    model: LanguageModel | str | Path, prompt: Saved, question: str, **options: Unpack[AskOptions]
) -> str: ...
def ask(model: Any, prompt: Any, question: Any = None, **options: Unpack[AskOptions]) -> str:
    """The model's greedy answer to a question, reading the soft prompt in place of the context.

    ``ask(prompt, question)`` or ``ask(model, prompt, question)``.

    Args:
      model: the model that the prompt was trained for; by default the one of that name.
      prompt: the soft prompt, or its folder.
      question: the input z.
      **options: ``max_tokens``, the longest answer (128), and ``context_fallback``, the fraction of questions
        that the whole document answers: those on which the soft prompt is least sure, by what is kept in it
        (``jaxsp evaluate --calibrate``). A warning of the logger ``jaxsp`` says so each time. By default the
        soft prompt answers all.

    Raises:
      UserError: the prompt belongs to another model, or the question is too long; with ``context_fallback``,
        the prompt is not calibrated, its document is not there, or the window has no room for it.

    Example:
      >>> import jaxsp
      >>> answer = jaxsp.ask(demo_folder, "How long is the cable?")
      >>> model = jaxsp.load_model("smollm2-135m-instruct")
      >>> answer == jaxsp.ask(model, jaxsp.SoftPrompt.load(demo_folder), "How long is the cable?")
      True
    """
    if question is None:
        model, prompt, question = None, model, prompt
    prompt = prompt if isinstance(prompt, SoftPrompt) else SoftPrompt.load(prompt)
    return asking.ask(prompt, question, model=model, **options)


def questions(
    model: LanguageModel | str | Path,
    context: str,
    *,
    count: int | None = None,
    progress: bool = True,
    **settings: Unpack[Options],
) -> Study:
    """The queries that a document itself gives, as ``compress`` would make them.

    Args:
      model: writes them, and answers them with the document before it.
      context: the document.
      count: number of queries; by default four a sentence.
      progress: whether to show what is going on, on standard error.
      **settings: fields of ``Settings`` that decide them: ``seed`` and ``max_answer_tokens``.

    Returns:
      The study: ``train`` are queries that ``compress`` takes, ``uncovered`` sentences that none asks for.

    Raises:
      UserError: an input is invalid, or the document gives nothing to train on.

    Example:
      >>> import jaxsp
      >>> text = "The tank holds 1.2 litres. It is made of steel. The cable is long."
      >>> study = jaxsp.questions("smollm2-135m-instruct", text, count=3, progress=False)
      >>> len(study.train), all(query.seed for query in study.train)
      (3, True)
    """
    check_text(context, "The context")
    checked = make_settings({**settings, "study_queries": count, "prompt_length": 1})
    model, display = as_model(model), Display(visible=progress)
    return study_alone(model, context, checked, display, Store.of_run(None, display.say))


def evaluate(
    model: LanguageModel | str | Path,
    prompt: SoftPrompt | str | Path,
    queries: Queries,
    *,
    context: str | None = None,
    teacher: LanguageModel | str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures a saved prompt between its brackets, on queries of your choice.

    What the teacher says is kept for the next time, and read where it is known, as ``compress`` does.

    Args:
      model: the model that the prompt was trained for, or its name.
      prompt: the soft prompt, or its folder.
      queries: inputs z, preferably none that it was trained on.
      context: the text that the prompt stands for; by default the one saved with it.
      teacher: the model that taught it, or its name; by default the one of the name it had then, of most
        prompts the model itself.
      progress: whether to show what is going on, on standard error.

    Returns:
      The part of ``report.json`` that concerns held-out queries.

    Raises:
      UserError: the prompt belongs to another model, or was taught by another teacher; or its context is
        not known.
    """
    prompt = prompt if isinstance(prompt, SoftPrompt) else SoftPrompt.load(prompt)
    model = as_model(model, prompt.quantization)
    prompt.check(model)
    model = model.with_chat(prompt.chat)
    context = prompt.context if context is None else context
    if context is None:
        raise UserError("The prompt was saved without its context; pass it to measure against it.")
    check_text(context, "The context")
    asked = as_queries(queries)
    if not asked:
        raise UserError("There is no query to evaluate on; give at least one.")
    display = Display(visible=progress)
    trained = prompt.manifest["training"]
    known = {name: value for name, value in trained.items() if name in plain(make_settings({}))}
    settings = make_settings({**known, "kind": prompt.kind, "prompt_length": prompt.prompt_length})
    other = _teacher_of(prompt, model, teacher)
    texts = context, [], asked, settings
    store = Store.of_run(None, display.say)
    who = other.model if other else model
    job = tokenize(who, *texts)
    said = run_teacher(who, job, settings.teacher, read_preamble(who), display, store)
    if other is None:
        problem = said
    else:
        model = other.student
        own = tokenize(model, *texts)
        problem = other.problem(said, own, read_preamble(model), settings)
    with display.phase("evaluate", "Evaluation"):
        measured = brackets.measure_all(model, problem, {"prompt": prompt.sigma}, settings, known={})
        summary = reports.summarise(model, problem, measured, context, settings, other)
    reports.mark_trained_on(summary, prompt)
    return {**reports.report_header(model, prompt), "taught_by": other and other.summary, **summary}


def export(
    prompt: SoftPrompt | str | Path,
    to: str,
    *,
    out: str | Path,
    model: LanguageModel | str | Path | None = None,
    length: int | None = None,
    overwrite: bool = False,
    with_model: bool = False,
) -> Exported:
    """Writes a saved prompt for another program, and measures there that it is the same.

    Args:
      prompt: the soft prompt, or its folder.
      to: ``"peft"``, ``"transformers"``, ``"vllm"`` or ``"llama.cpp"``.
      out: the folder to write.
      model: that it was trained for, in float32, or its name; by default the one of the name it had then.
      length: number of slots, of a nested prompt; by default all.
      overwrite: replace an earlier export in ``out``.
      with_model: copy the model's weights, as safetensors, and its tokenizer, too.

    Returns:
      What was measured, if torch and the other program are installed: the KL and the largest difference of a
      logit.

    Raises:
      UserError: the format can't hold this prompt, the prompt belongs to another model, or the other program
        makes something else of it; nothing is then written.

    Example:
      >>> import jaxsp
      >>> jaxsp.export(demo_folder, "pfet", out=demo_folder / "peft")
      Traceback (most recent call last):
      jaxsp.errors.UserError: There is no format 'pfet'; did you mean peft?
    """
    source, report = None, None
    if not isinstance(prompt, SoftPrompt):
        folder = hub.local(prompt, FILES)
        source = prompt if hub.is_remote(prompt) else folder
        prompt = SoftPrompt.load(folder)
        report = Result.load(folder).report if (folder / REPORT).is_file() else None
    if length is not None:
        prompt = prompt.cut(length)
    folder = as_path(out, "The folder")
    exports.check_beforehand(prompt, to, folder, overwrite=overwrite)
    if not isinstance(model, LanguageModel):
        name = named_model(prompt.manifest["model"]) if model is None else model
        model = load_model(name, dtype="float32")
    options = {"length": length, "overwrite": overwrite, "with_model": with_model}
    return exports.export(prompt, model, to, folder, source=source, report=report, **options)


def import_peft(
    directory: str | Path,
    *,
    model: LanguageModel | str | Path | None = None,
    context: str | None = None,
    plain: bool = False,
) -> SoftPrompt:
    """Reads an adapter of PEFT as a soft prompt: ``PROMPT_TUNING``, ``CARTRIDGE`` or ``PREFIX_TUNING``.

    One that ``export`` has written becomes the prompt that it was. Of others, virtual tokens that are the
    chat template's become the text before the prompt; else all of them are the prompt, in front of the whole
    chat, as PEFT has them.

    Args:
      directory: the folder that PEFT wrote.
      model: that it was made for, in float32, or its name; by default the one that the adapter names.
      context: the text that it stands for, to evaluate it against; an adapter doesn't have it.
      plain: questions stand behind it as they are, without the texts of the model's chat template.

    Raises:
      UserError: the folder holds no such adapter, a damaged one, or one of another model.

    Example:
      >>> import jaxsp
      >>> jaxsp.import_peft(demo_folder)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      jaxsp.errors.UserError: ... holds no adapter of PEFT (no adapter_config.json).
    """
    if context is not None:
        check_text(context, "The context")
    adapter = Adapter.load(directory)
    if not isinstance(model, LanguageModel):
        model = load_model(adapter.model_name if model is None else model, dtype="float32")
    return adapter.soft_prompt(model, context, plain=plain)


def push(directory: str | Path, repository: str, *, public: bool = False, with_document: bool = False) -> str:
    """Uploads a saved prompt to a repository of the model hub, as ``hf://OWNER/NAME`` reads it again.

    Its arrays, its manifest and a README with what was measured go, in one commit; nothing else of a run's
    folder. The token is that of ``hf auth login``, or ``HF_TOKEN``.

    Args:
      directory: the prompt's folder.
      repository: ``OWNER/NAME``; it is made if there is none, for you alone to read.
      public: whether everyone may read it.
      with_document: whether the document goes, too; it is needed to evaluate.

    Returns:
      The repository's address.

    Raises:
      UserError: the folder holds no prompt, there is no token, the hub refuses or can't be reached; or the
        repository is public and ``public`` wasn't given.

    Example:
      >>> import jaxsp
      >>> jaxsp.push(demo_folder, "my-prompt")
      Traceback (most recent call last):
      jaxsp.errors.UserError: A repository of the hub is named OWNER/NAME, not 'my-prompt'.
    """
    files = files_to_push(directory, repository, with_document=with_document)
    return hub.upload(repository, files, public=public, gone=pushing.FILES)


def files_to_push(directory: str | Path, repository: str, *, with_document: bool = False) -> dict[str, bytes]:
    """The files that ``push`` uploads, by their names; arguments and errors as there."""
    folder = hub.local(directory, FILES)
    prompt = SoftPrompt.load(folder)
    report = read_report(folder) if (folder / REPORT).is_file() else None
    return pushing.files_of(folder, prompt, repository, report, with_document=with_document)


def _optional(model: LanguageModel | str | Path | None) -> LanguageModel | None:
    return None if model is None else as_model(model)


def _teacher_of(
    prompt: SoftPrompt, model: LanguageModel, given: LanguageModel | str | Path | None
) -> Teacher | None:
    """The teacher of a saved prompt, if that is another model, or else the one that is given."""
    known = prompt.teacher
    if known is None:
        if other := Teacher.of(model, _optional(given)):
            raise UserError(
                f"This prompt was taught by its own model, not by {other.model.name}; leave the teacher out."
            )
        return None
    found = as_model(named_model(known) if given is None else given, known["quantization"])
    if not found.has_weights(known["fingerprint"]):
        raise UserError(
            f"This prompt was taught by {known['name']} ({known['fingerprint'][:12]}); {found.name} has other"
            f" weights ({found.fingerprint[:12]}). Give the teacher that it was."
        )
    check_decoder(known, found)
    return Teacher.of(model, found)
