"""The command line: compress · compress-many · plan · ask · evaluate · inspect · demo (tyro)."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import io
import itertools
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import tyro
from rich.console import Console
from rich.table import Table

from jaxsp.models.config import Weights
from jaxsp.settings import Settings
from jaxsp.typing import Interrupted, UserError

if TYPE_CHECKING:
    from jaxsp.api import Result
    from jaxsp.models.language_model import LanguageModel

EMBEDDED = "smollm2-135m-instruct"
_STARTED = time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Hosts:
    """How this process finds the others of a run; a TPU pod's find each other."""

    coordinator: str | None = None
    """host:port at which process 0 listens."""
    process_id: int | None = None
    """Of this process, from 0."""
    num_processes: int | None = None
    """How many there are."""

    def join(self) -> bool:
        """Whether there are others."""
        alone = self.coordinator is self.process_id is self.num_processes is None
        if alone and "," not in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
            return False  # and jax need not be imported yet
        from jaxsp import hosts

        return hosts.join(self.coordinator, self.process_id, self.num_processes)


@dataclasses.dataclass(frozen=True)
class Compress(Settings, Hosts):
    """Learn a soft prompt that stands in for a document, and measure how well it does."""

    context: tyro.conf.Positional[str] = tyro.MISSING
    """The document: a .txt or .md file, or - for standard input."""
    queries: str = tyro.MISSING
    """What will be asked: a file with one query per line, or JSONL {"query", "answer" (optional)}."""
    held_out: str = "0.2"
    """Queries to measure on, never trained on: a file, or a fraction of --queries."""
    model: str = EMBEDDED
    """A directory, a .gguf file, a hub id, or the name of the embedded model."""
    dtype: str | None = None
    """Of weights and activations; by default bfloat16 where the hardware computes it, else float32."""
    weights: Weights = "full"
    """Of the layers' matrices; int8 halves bfloat16's memory and rounds them."""
    out: str = "jaxsp-out"
    """Folder for the prompt, the report and the checkpoints."""
    resume: bool = False
    """Go on with the interrupted run in --out."""
    overwrite: bool = False
    """Replace an earlier run in --out."""

    def run(self) -> None:
        from jaxsp import api, hosts
        from jaxsp.data.documents import read_context, read_queries
        from jaxsp.runs.folder import check_folder

        several = self.join()  # before anything computes
        self.check()
        if not several:
            check_folder(self.out, resume=self.resume, overwrite=self.overwrite)
        context, queries = read_context(self.context), read_queries(self.queries)
        held_out = _fraction(self.held_out)
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(Settings)}
        result = api.compress(
            _load(self.model, self.dtype, self.weights, self),
            context,
            queries,
            held_out=read_queries(self.held_out) if held_out is None else held_out,
            out=self.out,
            resume=self.resume,
            overwrite=self.overwrite,
            progress=not several or hosts.is_first(),
            **settings,
        )
        if not several or hosts.is_first():
            _summary(result, self.out)


@dataclasses.dataclass(frozen=True)
class CompressMany(Settings, Hosts):
    """Learn a soft prompt for each of many contexts, many in one step; any run over many settings."""

    contexts: tyro.conf.Positional[str] = tyro.MISSING
    """JSONL {"id", "context", "queries", "held_out"}, and any setting below that is to differ in a row."""
    model: str = EMBEDDED
    """A directory, a .gguf file, a hub id, or the name of the embedded model."""
    dtype: str | None = None
    """Of weights and activations; by default bfloat16 where the hardware computes it, else float32."""
    weights: Weights = "full"
    """Of the layers' matrices; int8 halves bfloat16's memory and rounds them."""
    out: str = "jaxsp-many"
    """Folder for one folder a context, and the table results.parquet."""
    at_once: int | None = None
    """Prompts in one step; by default as many as suit the device."""
    keep_going: bool = False
    """Report rows that can't be meant, and do the others."""
    resume: bool = False
    """Go on with the interrupted run in --out."""
    overwrite: bool = False
    """Replace an earlier run in --out."""

    def run(self) -> None:
        from jaxsp import hosts
        from jaxsp.progress import Display
        from jaxsp.runs.job import read_rows
        from jaxsp.many import run_many
        from jaxsp.runs.folder import check_folder

        several = self.join()
        self.check()
        if not several:
            check_folder(self.out, resume=self.resume, overwrite=self.overwrite)
        leads = not several or hosts.is_first()
        rows = read_rows(self.contexts)
        results = run_many(
            _load(self.model, self.dtype, self.weights, self),
            rows,
            {f.name: getattr(self, f.name) for f in dataclasses.fields(Settings)},
            out=self.out,
            resume=self.resume,
            overwrite=self.overwrite,
            keep_going=self.keep_going,
            at_once=self.at_once,
            display=Display(visible=leads),
        )
        table = Table("id", "objective", "K", "tokens", "gap closed", "σ: KL", "none: KL", box=None)
        failed = []
        for result in results:
            table.add_row(*_many_row(result))
            failed += [result.report["id"]] if result.error else []
        if leads:
            Console(highlight=False).print(table)
        if failed:
            print(f"jaxsp: {len(failed)} failed: {', '.join(failed)}.", file=sys.stderr)
            raise SystemExit(1)


@dataclasses.dataclass(frozen=True)
class Plan(Settings):
    """Say beforehand what memory and time a compression will take; loads no weights."""

    model: tyro.conf.Positional[str] = EMBEDDED
    """A directory (config.json is enough), a .gguf file, a hub id, or the name of the embedded model."""
    context_tokens: int = 1000
    """Tokens of the context, about."""
    query_tokens: int = 64
    """Tokens of a query with its answer, about; half of them are taken to be the answer's."""
    dtype: str | None = None
    """Of weights and activations; by default bfloat16 where the hardware computes it, else float32."""
    weights: Weights = "full"
    """Of the layers' matrices; int8 halves bfloat16's memory and rounds them."""
    json: bool = False
    """Print everything as JSON on standard output."""

    def run(self) -> None:
        from jaxsp import plan
        from jaxsp.models.language_model import model_config

        found = plan.plan(
            model_config(self.model, self.dtype, self.weights),
            self,
            context_tokens=self.context_tokens,
            query_tokens=self.query_tokens,
        )
        if self.json:
            memory = {**dataclasses.asdict(found.memory), "total": found.memory.total}
            print(json.dumps({**dataclasses.asdict(found), "memory": memory}, indent=2))
            return
        memory, largest = found.memory, found.largest_rows
        fits = "" if found.fits else ": does not fit"
        queries = largest * found.row_tokens // self.query_tokens
        rows = {
            "devices": f"{found.devices} ({found.device})",
            "batch": f"{found.rows} rows of {found.row_tokens} tokens",
            "memory of a device": f"{_size(memory.total)} of {_size(found.memory_limit)}{fits}",
            "  weights, batch, σ": _size(memory.arguments),
            "  temporaries": _size(memory.temporaries),
            "  output": _size(memory.output),
            "  the context": _size(memory.context),
            "a step": f"{found.flops / 1e9:,.1f} GFLOP, {found.step_seconds:,.3g} s",
            "  matrix products": f"{found.matmul_rate / 1e9:,.0f} GFLOP/s, measured",
            "  of which used": f"{found.utilisation:g}, assumed (SmolLM2's on a CPU)",
            f"{self.steps} steps": f"{self.steps * found.step_seconds / 60:,.1f} min, without teacher"
            " and evaluation",
            "largest batch": f"--batch-shape {largest} {found.row_tokens} (about {queries} queries)"
            if largest
            else f"none fits; {_lighter(self)}",
        }
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in rows.items():
            table.add_row(name, value)
        Console(highlight=False).print(table)


@dataclasses.dataclass(frozen=True)
class Ask:
    """Ask the model a question, with a soft prompt in place of the document."""

    directory: tyro.conf.Positional[str]
    """The folder that compress wrote."""
    question: tyro.conf.Positional[str | None] = None
    """The question; without one, a chat loop."""
    model: str | None = None
    """Where the model is now, if not where it was."""
    dtype: str | None = None
    """Of weights and activations."""
    max_tokens: int = 128
    """Longest answer."""

    def run(self) -> None:
        from jaxsp.api import stream_answer
        from jaxsp.artifact import SoftPrompt

        prompt = SoftPrompt.load(self.directory)
        if self.question is not None and not self.question.strip():
            raise UserError("The question is empty; leave it away for a chat loop.")
        model = _load(self.model or prompt.manifest["model"]["name"], self.dtype, prompt.weights)
        prefix = prompt.prefix(model)

        def answer(question: str) -> None:
            for piece in stream_answer(model, prefix, prompt.slots, question, self.max_tokens):
                print(piece, end="", flush=True)
            print(flush=True)

        if self.question is not None:
            answer(self.question)
            return
        print("Each question is answered on its own. An empty line ends.", file=sys.stderr)
        while question := _line("> "):
            try:
                answer(question)
            except UserError as error:
                print(error, file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure a soft prompt between its brackets, on queries of your choice."""

    directory: tyro.conf.Positional[str]
    """The folder that compress wrote."""
    queries: str
    """A file with one query per line, or JSONL."""
    model: str | None = None
    """Where the model is now, if not where it was."""
    dtype: str | None = None
    """Of weights and activations."""
    json: bool = False
    """Print everything as JSON on standard output."""

    def run(self) -> None:
        from jaxsp import api
        from jaxsp.artifact import SoftPrompt
        from jaxsp.data.documents import read_queries

        prompt = SoftPrompt.load(self.directory)
        queries = read_queries(self.queries)
        model = _load(self.model or prompt.manifest["model"]["name"], self.dtype, prompt.weights)
        report = api.evaluate(model, prompt, queries)
        if self.json:
            print(json.dumps(report, indent=2, ensure_ascii=False))
            return
        console = Console()
        console.print(_conditions(report))
        console.print(report["verdict"]["text"], highlight=False)


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show what a saved soft prompt is, without loading a model."""

    directory: tyro.conf.Positional[str]
    """The folder that compress wrote."""

    def run(self) -> None:
        from jaxsp.artifact import SoftPrompt

        prompt = SoftPrompt.load(self.directory)
        manifest = prompt.manifest
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        training = manifest["training"]
        rows: dict[str, Any] = {
            "kind": f"{prompt.kind}, {prompt.length} vectors, {manifest['dtype']}",
            "stands for": f"{manifest['context_tokens']} tokens"
            f" ({manifest['context_tokens'] / prompt.length:.1f}×)",
            "model": f"{manifest['model']['name']} ({manifest['model']['fingerprint'][:12]})",
            "tokenizer": manifest["tokenizer"]["fingerprint"][:12],
            "position": manifest["slots"]["position_offset"],
            "text before": repr(manifest["slots"]["before"]),
            "trained by": f"{training['objective']}, {training['steps']} steps,"
            f" learning rate {training['learning_rate']:g}, seed {training['seed']}",
            "versions": ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()),
        }
        for name, value in manifest.get("held_out", {}).items():
            number = value["value"] if isinstance(value, dict) else value
            rows[f"held-out {name}"] = f"{number:.3f}"
        for name, value in rows.items():
            table.add_row(name, str(value))
        Console(highlight=False).print(table)


@dataclasses.dataclass(frozen=True)
class Demo:
    """Compress the manual that jaxsp ships, and answer held-out questions with it."""

    out: str = "jaxsp-demo"
    """Folder for the prompt, the report and the checkpoints."""
    model: str = EMBEDDED
    """The model to use."""
    dtype: str | None = None
    """Of weights and activations; by default the fastest here."""
    weights: Weights = "full"
    """Of the layers' matrices; int8 halves bfloat16's memory and rounds them."""
    steps: int = 60
    """Updates of the prompt."""
    resume: bool = False
    """Go on with the interrupted run in --out."""

    def run(self) -> None:
        from jaxsp import api
        from jaxsp.data.documents import read_context, read_queries

        with importlib.resources.as_file(importlib.resources.files("jaxsp.demo")) as sample:
            context = read_context(sample / "manual.md")
            queries = read_queries(sample / "questions.txt")
            held_out = read_queries(sample / "held_out.txt")
        dtype = self.dtype
        if dtype is None and _slow_bfloat16():
            dtype = "float32"
        result = api.compress(
            _load(self.model, dtype, self.weights),
            context,
            queries,
            held_out=held_out,
            out=self.out,
            resume=self.resume,
            overwrite=not self.resume,
            steps=self.steps,
            batch_size=4,
            # No worse over so few steps than the default, and rounding moves a float32 run little: other
            # machines end nearly the same (experiments/precision).
            learning_rate=0.1,
            evaluate_every=20,
            max_answer_tokens=32,
        )
        table = Table("question", "full context", "soft prompt σ", "no context", title="Held-out")
        held = [q for q in result.report["queries"] if q["split"] == "held_out"]
        for query in held[:3]:
            table.add_row(
                query["query"],
                *(query[f"answer_{name}"] for name in ("full_context", "prompt", "no_context")),
            )
        Console().print(table)
        _summary(result, self.out)
        print(f'Ask it yourself:  jaxsp ask {shlex.quote(self.out)} "How long is the cable?"')


Command = (
    Annotated[Compress, tyro.conf.subcommand("compress")]
    | Annotated[CompressMany, tyro.conf.subcommand("compress-many")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Ask, tyro.conf.subcommand("ask")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


def main() -> None:
    """Entry point of the console script ``jaxsp``."""
    try:
        _run(_parsed())
    except UserError as error:
        print(f"jaxsp: {error}", file=sys.stderr)
        if not isinstance(error, Interrupted):
            _leave(2)
        arguments = [a for a in sys.argv[1:] if a not in ("--overwrite", "--resume")]
        print(f"  jaxsp {shlex.join([*arguments, '--resume'])}", file=sys.stderr)
        _leave(130)
    except KeyboardInterrupt:
        print("jaxsp: interrupted.", file=sys.stderr)
        _leave(130)


def _leave(code: int) -> NoReturn:
    if "jaxsp.processes" in sys.modules:
        sys.modules["jaxsp.processes"].leave(code)
    raise SystemExit(code) from None


def _run(command: Compress | CompressMany | Plan | Ask | Evaluate | Inspect | Demo) -> None:
    """Runs the command; a device without memory is a mistake that the user can mend."""
    try:
        command.run()
    except RuntimeError as error:  # jax's own kinds are
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        told = str(error).splitlines()[0]
        raise UserError(
            f"The device has not enough memory ({told:.120}); {_lighter(command)};"
            " `jaxsp plan` says beforehand what fits."
        ) from None


def _lighter(command: object) -> str:
    """How to need less memory, by the options that a command has."""
    ways = {
        "batch_size": "lower --batch-size",
        "at_once": "lower --at-once",
        "accumulate": "raise --accumulate",
        "dtype": "take --dtype bfloat16",
        "weights": "take --weights int8",
        "parallel": "use more devices with --parallel mesh",
    }
    *most, last = [way for option, way in ways.items() if hasattr(command, option)]
    return f"{', '.join(most)} or {last}" if most else last


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _parsed() -> Compress | CompressMany | Plan | Ask | Evaluate | Inspect | Demo:
    """The command that the arguments ask for.

    Raises:
      UserError: they can't be parsed; tyro's box of several lines becomes one sentence.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                Command,  # type: ignore[arg-type]  # a union of commands is no `type` to pyright
                prog="jaxsp",
                description="Soft prompts that stand in for long contexts.",
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        # The box: a title, then what is wrong, then a rule and advice.
        lines = [line.strip("│ ") for line in box.getvalue().splitlines()[1:]]
        told = itertools.takewhile(lambda line: line and not set(line) <= set("─╰╯"), lines)
        message = " ".join(told).replace(". (required)", "").rstrip(".")
        raise UserError(f"{message}; see --help.") from None


def _load(
    name: str, dtype: str | None, weights: Weights, settings: Settings | None = None
) -> LanguageModel:
    from jaxsp.models.language_model import load_model

    mesh = settings.mesh if settings is not None and settings.parallel == "mesh" else None
    return load_model(name, dtype=dtype, weights=weights, mesh=mesh)


def _slow_bfloat16() -> bool:
    """Before 0.11 jax multiplies bfloat16 on CPU by way of float32: slower than float32 itself."""
    import jax

    version = tuple(int(part) for part in jax.__version__.split(".")[:2])
    return jax.default_backend() == "cpu" and version < (0, 11)


def _fraction(text: str) -> float | None:
    """``held_out`` as a number, or ``None`` if it names a file."""
    try:
        return float(text)
    except ValueError:
        return None


def _line(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


def _summary(result: Result, out: str) -> None:
    console = Console(highlight=False)
    console.print(_conditions(result.report))
    console.print(result.report["verdict"]["text"])
    console.print(
        f"{result.report['prompt_length']} vectors for {result.report['context_tokens']} tokens"
        f" ({result.report['compression']:.1f}×), {time.perf_counter() - _STARTED:.0f} s in all."
    )
    console.print(f"Report: {Path(out) / 'report.md'}   Prompt: {Path(out) / 'prompt.safetensors'}")


def _many_row(result: Result) -> list[str]:
    report = result.report
    row = [report["id"], report["objective"], str(report["prompt_length"])]
    row.append(str(report["context_tokens"]))
    if result.error:
        return [*row, result.error]
    held_out = report["held_out"]["conditions"]
    kl = [f"{held_out[name]['kl']:.3f}" for name in ("prompt", "no_context")]
    return [*row, f"{report['gap_closed']['value']:.1%}", *kl]


def _conditions(report: dict[str, Any]) -> Table:
    from jaxsp.evaluation.brackets import CONDITIONS

    columns = {"kl": "KL", "nll": "NLL", "zero_one": "0/1", "rouge_l": "ROUGE-L"}
    table = Table("held-out queries", *columns.values(), box=None, padding=(0, 2, 0, 0))
    for name, row in report["held_out"]["conditions"].items():
        table.add_row(CONDITIONS[name], *(f"{row[metric]:.3f}" for metric in columns))
    return table
