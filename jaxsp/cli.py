"""The command line (tyro): a class a command."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from jaxsp.arguments import parse, program
from jaxsp.ask_command import Ask
from jaxsp.cache import Cache
from jaxsp.compare_command import Compare
from jaxsp.errors import Interrupted, UserError
from jaxsp.export_command import Export
from jaxsp.files import os_errors_as_user_errors
from jaxsp.import_command import ImportPeft
from jaxsp.options import (
    EMBEDDED,
    AllOptions,
    Document,
    File,
    Folder,
    ModelOptions,
    Output,
    Processes,
    QueryColumn,
    Saved,
    WithChat,
    WithTeacher,
    ways_to_need_less,
)
from jaxsp.push_command import Push
from jaxsp.serve.command import Serve
from jaxsp.settings import Options, Settings, check_limits, make_settings, plain
from jaxsp.terminal import flush, prepare, visible
from jaxsp.watch_command import Watch

# What computes is imported where a command runs: --help and a misspelt option need not wait for it.
if TYPE_CHECKING:
    from jaxsp.models.language_model import LanguageModel

_STARTED = time.perf_counter()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run(AllOptions):
    model: WithTeacher = WithTeacher()
    output: Output
    processes: Processes = Processes()

    def begin(self) -> Settings:
        """Joins the other processes and checks options and folder, before any file is read."""
        from jaxsp.runs.folder import RunFolder

        several = self.processes.join()
        settings, output = _checked(self), self.output
        if not several:  # otherwise the first may have begun in it, and checks for all
            RunFolder(output.out).check(resume=output.resume, overwrite=output.overwrite)
        return settings

    def load(self, settings: Settings) -> tuple[LanguageModel, LanguageModel | None]:
        """The model and, if one is given, its teacher."""
        from jaxsp.training.drivers import mesh_of

        mesh = mesh_of(settings)
        model = self.model.load(mesh)
        return model, self.model.load_teacher(model, mesh)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compress(_Run):
    """Learn a soft prompt that stands in for a document, and measure how well it does."""

    examples: ClassVar[str] = """
      jaxsp compress manual.md
      jaxsp compress manual.md --queries questions.txt --out prompt/
      jaxsp compress manual.md --queries questions.txt --prompt-length 32 --objective 'kl=0.7,nll=0.3'
      cat manual.md | jaxsp compress - --queries questions.jsonl --held-out other_questions.txt
      jaxsp compress manual.md --teacher HuggingFaceTB/SmolLM2-1.7B-Instruct --out prompt/
      jaxsp compress manual.md --out prompt/ --resume
    """
    context: Document
    queries: File | None = None
    """Queries that will be asked: one per line, or .jsonl, .json, .csv, .tsv or .parquet with a column query
    and, if known, answer and expect; without it the document gives them."""
    query_column: QueryColumn = None
    held_out: Annotated[float | str, tyro.conf.arg(metavar="FILE|FRACTION")] = 0.2
    """Queries to measure on, never trained on: a file, or a fraction of --queries."""
    output: Output = Output("jaxsp-out")

    def run(self) -> None:
        from jaxsp import api, console, processes
        from jaxsp.data.documents import read_context, read_queries

        settings = self.begin()
        context = read_context(self.context)
        column, held_out = self.query_column, self.held_out
        queries = [] if self.queries is None else read_queries(self.queries, column)
        held_out = read_queries(held_out, column) if isinstance(held_out, str) else held_out
        (model, teacher), leads = self.load(settings), processes.is_first()
        options = {"teacher": teacher, **vars(self.output), **plain(settings)}
        result = api.compress(model, context, queries, held_out=held_out, progress=leads, **options)
        if leads:
            console.print_summary(result, self.output.out, _STARTED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressMany(_Run):
    """Learn a soft prompt for each of many contexts, many in one step; any run over many settings."""

    examples: ClassVar[str] = """
      jaxsp compress-many contexts.jsonl --out many/
      jaxsp compress-many contexts.jsonl --objective nll --steps 200 --at-once 8 --keep-going
    """
    contexts: tyro.conf.Positional[File]
    """JSONL {"id", "context", "queries", "held_out"}, and any setting below that is to differ in a row."""
    at_once: int | None = None
    """Prompts in one step; by default as many as suit the device."""
    keep_going: bool = False
    """Report rows that are invalid or whose document gives nothing to train on, and do the others."""
    output: Output = Output("jaxsp-many")

    def run(self) -> None:
        from jaxsp import console, processes
        from jaxsp.progress import Display
        from jaxsp.runs.job import read_rows
        from jaxsp.runs.start import Start, open_run

        if self.at_once is not None:
            check_limits("at_once", self.at_once, at_least=1)
        settings = self.begin()
        jobs = read_rows(self.contexts)
        model, teacher = self.load(settings)
        start = Start(
            **vars(self.output),
            display=Display(visible=processes.is_first()),
            keep_going=self.keep_going,
            at_once=self.at_once,
        )
        rows, failed = [], []
        for result in open_run(model, jobs, plain(settings), start, teacher):
            rows.append(console.result_row(result))
            failed += [result.report["id"]] if result.error else []
        if processes.is_first():
            console.print_results(rows)
        if failed:
            print(f"jaxsp: {len(failed)} failed: {', '.join(failed)}.", file=sys.stderr)
            raise SystemExit(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """Write the questions that a document itself gives, to look at and edit before compress."""

    examples: ClassVar[str] = """
      jaxsp questions manual.md --out questions.jsonl
      jaxsp questions manual.md --count 50 --seed 1
    """
    context: Document
    count: int | None = None
    """Number of questions; by default four a sentence."""
    out: File = "-"
    """JSONL file to write, or - for standard output."""
    seed: int = 0
    """Seed of the model's writing."""
    overwrite: bool = False
    """Replace the file."""
    model: WithChat = WithChat()

    def run(self) -> None:
        from jaxsp import api, console
        from jaxsp.data.documents import read_context
        from jaxsp.files import as_path, atomic_write

        if self.count is not None:
            check_limits("count", self.count, at_least=1)
        make_settings({"seed": self.seed})  # a mistake is found before the model is loaded
        file = None if self.out == "-" else as_path(self.out, "--out")
        if file is not None and file.exists() and not self.overwrite:
            raise UserError(f"{file} is there already; replace it with --overwrite, or choose another --out.")
        context = read_context(self.context)
        found = api.questions(self.model.load(), context, count=self.count, seed=self.seed)
        lines = "".join(json.dumps(query.as_row(), ensure_ascii=False) + "\n" for query in found.train)
        if file is None:
            print(lines, end="")
        else:
            atomic_write(file, lines)
        console.print_study(found, file)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(AllOptions, ModelOptions):
    """Say beforehand what memory and time a compression will take; loads no weights."""

    examples: ClassVar[str] = """
      jaxsp plan --context-tokens 4000 --prompt-length 32
      jaxsp plan HuggingFaceTB/SmolLM2-360M-Instruct --batch-size 16 --grad-accumulation 2
      jaxsp plan --device v5e-1
      jaxsp plan meta-llama/Llama-3.1-8B-Instruct --device v5e-8 --parallel mesh --mesh model=8
    """
    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]] = EMBEDDED
    """A directory (config.json is enough), a .gguf file, a hub id, or the name of the embedded model."""
    context_tokens: int = 1000
    """Tokens of the context, about."""
    query_tokens: int = 64
    """Tokens of a query with its answer, about; half of them are taken to be the answer's."""
    device: str | None = None
    """TPUs to plan for, which need not be here: v5e-1, v5e-4, v5e-8 ... v5e-256, or v6e-1 ... v6e-256. Needs
    jaxsp[tpu], whose compiler runs on any machine. By default this machine."""
    json: bool = False
    """Print everything as JSON on standard output."""

    def run(self) -> None:
        from jaxsp import console, device, plan
        from jaxsp.models.load import model_config
        from jaxsp.progress import Display
        from jaxsp.prompts import with_defaults

        settings = with_defaults(_checked(self))
        sizes = {"context_tokens": self.context_tokens, "query_tokens": self.query_tokens}
        system = None if self.device is None else device.describe(self.device)
        with Display().phase("plan", "Planning") as tell, device.programs_for(system):
            config = model_config(self.model, self.dtype, self.quantization)
            found = plan.plan(config, settings, **sizes, system=system, on_progress=tell)
        if self.json:
            memory = found.memory and {**dataclasses.asdict(found.memory), "total": found.memory.total}
            print(json.dumps({**dataclasses.asdict(found), "memory": memory}, indent=2))
            return
        console.print_plan(found, settings.training.updates, ways_to_need_less(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Saved):
    """Measure a soft prompt between its brackets, on queries of your choice."""

    examples: ClassVar[str] = """
      jaxsp evaluate prompt/ --queries other_questions.txt
      jaxsp evaluate prompt/ --queries other_questions.txt --json
      jaxsp evaluate prompt/ --queries other_questions.txt --calibrate
    """
    queries: File
    """Queries in a file, as compress takes them."""
    query_column: QueryColumn = None
    teacher: str | None = None
    """The teacher, if that was another model and is not where it was."""
    calibrate: bool = False
    """Keep in the prompt how sure it is of its answers to these queries, for --context-fallback."""
    json: bool = False
    """Print everything as JSON on standard output."""

    def run(self) -> None:
        from jaxsp import api, console, hub
        from jaxsp.data.documents import read_queries
        from jaxsp.evaluation import certainty

        if self.calibrate and self.length is not None:
            raise UserError("--calibrate is for all slots of a prompt: leave --length away.")
        if self.calibrate and hub.is_remote(self.directory):
            raise UserError(f"--calibrate writes into the prompt's folder, which {self.directory} is not.")
        prompt, queries = self.prompt(), read_queries(self.queries, self.query_column)
        report = api.evaluate(self.load(prompt), prompt, queries, teacher=self.teacher)
        if self.json:
            print(json.dumps(report, indent=2, ensure_ascii=False))
        else:
            console.print_brackets(report)
        if self.calibrate:
            certainty.calibrate(self.directory, report)


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show what a saved soft prompt is, without loading a model."""

    examples: ClassVar[str] = """
      jaxsp inspect prompt/
    """
    directory: tyro.conf.Positional[Folder]
    """The folder that compress wrote, or hf://OWNER/NAME."""

    def run(self) -> None:
        from jaxsp import console
        from jaxsp.artifact import SoftPrompt

        console.print_prompt(SoftPrompt.load(self.directory))


@dataclasses.dataclass(frozen=True)
class Report:
    """Write report.html, report.md, README.md and the plots of a run anew, from what was measured."""

    examples: ClassVar[str] = """
      jaxsp report prompt/
      jaxsp report many/
    """
    directory: tyro.conf.Positional[Folder]
    """The folder that compress or compress-many wrote."""

    def run(self) -> None:
        from jaxsp.runs.folder import write_reports

        written, problems = write_reports(self.directory)
        print("".join(f"{file}\n" for file in written), end="")
        if problems:
            raise UserError("; ".join(problems) + ".")


@dataclasses.dataclass(frozen=True)
class Demo:
    """Compress the manual that jaxsp ships, and answer held-out questions with it."""

    examples: ClassVar[str] = """
      jaxsp demo
      jaxsp demo --steps 20 --out try/
    """
    model: ModelOptions = ModelOptions()
    out: Folder = "jaxsp-demo"
    """Folder for the prompt, the report and the checkpoints."""
    steps: int = 30
    """Updates of the prompt."""
    resume: bool = False
    """Go on with the interrupted run in --out."""

    def run(self) -> None:
        from jaxsp import api, console, demo

        settings: Options = {"steps": self.steps, "evaluate_every": 20, "max_answer_tokens": 32}
        settings["study"] = "off"  # its questions ask for everything in several ways
        make_settings(settings)  # a mistake is found before the model is loaded
        context, queries, held_out = demo.read()
        output = {"out": self.out, "resume": self.resume, "overwrite": not self.resume}
        model = self.model.load()
        result = api.compress(model, context, queries, held_out=held_out, **output, **settings)
        console.print_answers(result.report, most=3)
        console.print_summary(result, self.out, _STARTED)
        print(f'Ask it yourself:  {program()} ask {shlex.quote(self.out)} "How much does it weigh?"')


Command = (
    Compress | CompressMany | Questions | Plan | Ask | Serve | Evaluate | Export | ImportPeft | Push | Inspect
    | Report | Compare | Watch | Cache | Demo
)  # fmt: skip
COMMANDS: dict[str, type[Command]] = {
    "compress": Compress,
    "compress-many": CompressMany,
    "questions": Questions,
    "plan": Plan,
    "ask": Ask,
    "serve": Serve,
    "evaluate": Evaluate,
    "export": Export,
    "import-peft": ImportPeft,
    "push": Push,
    "inspect": Inspect,
    "report": Report,
    "compare": Compare,
    "watch": Watch,
    "cache": Cache,
    "demo": Demo,
}


def main(before_running: Callable[[], None] = lambda: None) -> None:
    """Runs the command that ``sys.argv`` names; when it is known, ``before_running`` comes first."""
    prepare()
    try:
        with os_errors_as_user_errors():
            try:
                command = parse(COMMANDS, sys.argv[1:])
                before_running()
                _run(command)
            finally:
                flush()
    except BrokenPipeError:
        pass  # who read it has gone (| head)
    except (UserError, KeyboardInterrupt) as error:
        print(visible(f"jaxsp: {str(error) or 'interrupted.'}"), file=sys.stderr)
        if isinstance(error, Interrupted):
            arguments = [a for a in sys.argv[1:] if a not in ("--overwrite", "--resume")]
            print(f"  {program()} {shlex.join([*arguments, '--resume'])}", file=sys.stderr)
        code = 130 if isinstance(error, Interrupted | KeyboardInterrupt) else 2
        if joined := sys.modules.get("jaxsp.processes"):
            joined.shutdown(code)
        raise SystemExit(code) from None


def _run(command: Command) -> None:
    """Runs the command; a device without memory is a mistake that the user can mend."""
    try:
        command.run()
    except (RuntimeError, MemoryError, OverflowError) as error:  # jax's own kinds are of the first
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        message, ways = (str(error) or type(error).__name__).splitlines()[0], ways_to_need_less(command)
        raise UserError(
            f"The device has not enough memory ({message:.120}); {ways}{ways and '; '}"
            "`jaxsp plan` says beforehand what fits."
        ) from None


def _checked(given: Settings) -> Settings:
    """The same settings, of a command; raises ``UserError`` if they are invalid."""
    from jaxsp.runs.job import check_settings

    parts = {part.name: getattr(given, part.name) for part in dataclasses.fields(Settings)}
    settings = make_settings(plain(Settings(**parts)))
    check_settings(settings)
    return settings
