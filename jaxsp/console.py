"""Tables that the commands print on standard output (rich)."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from jaxsp import prompts
from jaxsp.arguments import program
from jaxsp.artifact import MANIFEST, SoftPrompt
from jaxsp.errors import Damaged, in_a_line
from jaxsp.evaluation.compare import Comparison, in_words
from jaxsp.evaluation.page import number
from jaxsp.evaluation.report import bracket_names, bracket_rows
from jaxsp.evaluation.verdict import gap_in_words
from jaxsp.exports import Exported
from jaxsp.files import size
from jaxsp.plan import Memory, Plan
from jaxsp.prompts import storage
from jaxsp.runs.folder import PAGE, Result
from jaxsp.study import Study
from jaxsp.teacher.another import name_of_kl
from jaxsp.teacher.store import Entry
from jaxsp.terminal import duration, visible


def print_plan(plan: Plan, steps: int, advice: str) -> None:
    """Prints what a compression will need.

    Args:
      plan: its needs.
      steps: updates to be done.
      advice: a way to need less memory, said if no batch fits.
    """
    memory, largest = plan.memory, plan.largest_batch_size
    described, limit = plan.compiled_for is not None, size(plan.memory_limit)
    if plan.room_elsewhere is not None:
        advice = f"the weights take most of the memory, and {plan.room_elsewhere}"
    speed = f"{plan.matmul_rate / 1e9:,.0f} GFLOP/s, {'at most' if described else 'measured'}"
    rows = {
        **({"compiled for": plan.compiled_for} if described else {}),
        "devices": f"{plan.devices} ({plan.device})",
        "batch": f"{plan.rows} rows of {plan.row_tokens} tokens",
        **_memory_rows(memory, limit, fits=plan.fits),
        "a step": f"{plan.flops / 1e9:,.1f} GFLOP, {plan.step_seconds:,.3g} s",
        "  matrix products": speed,
        "  of which used": f"{plan.utilisation:g}, assumed (SmolLM2's on a CPU)",
        f"{steps} steps": f"{duration(steps * plan.step_seconds)}, without teacher and evaluation",
        "largest batch": f"--batch-size {largest}" if largest else f"none fits; {advice}",
    }
    _print_pairs(rows)


def _memory_rows(memory: Memory | None, limit: str, *, fits: bool) -> dict[str, str]:
    if memory is None:
        return {"memory of a device": f"{limit}, less than the update takes: does not fit"}
    return {
        "memory of a device": f"{size(memory.total)} of {limit}{'' if fits else ': does not fit'}",
        "  weights, batch, σ": size(memory.arguments),
        "  temporaries": size(memory.temporaries),
        "  output": size(memory.output),
        "  the context": size(memory.context),
    }


def print_prompt(prompt: SoftPrompt) -> None:
    """Prints what a saved prompt is, and what was measured of it.

    Raises:
      Damaged: something of it is missing in its manifest, or is odd there.
    """
    try:
        rows = _about(prompt)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {in_a_line(error, 60)}"
        raise Damaged(f"The prompt's {MANIFEST} is damaged ({reason})") from error
    _print_pairs(rows)


def _about(prompt: SoftPrompt) -> dict[str, object]:
    manifest = prompt.manifest
    model, training, tokens = manifest["model"], manifest["training"], manifest["context_tokens"]
    lengths = prompts.lengths(prompt.kind, prompt.sigma)
    rows: dict[str, object] = {
        "kind": f"{prompt.kind}, {prompt.prompt_length} slots, {manifest['dtype']}",
        "file": size(storage.size(storage.pack(prompt.sigma, manifest["dtype"]))),
        **({"read at": f"{', '.join(map(str, lengths))} slots (--length)"} if lengths[1:] else {}),
        "stands for": f"{tokens} tokens ({tokens / prompt.prompt_length:.1f}×)" if tokens else "not known",
        "model": f"{model['name']} ({model['fingerprint'][:12]})",
        **_taught_by(prompt.teacher),
        "tokenizer": manifest["tokenizer"]["fingerprint"][:12],
        "position": manifest["slots"]["position_offset"],
        "text before": repr(manifest["slots"]["before"]),
        "trained by": _trained_by(manifest.get("imported"), training),
        "versions": ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()),
    }
    for name, value in manifest.get("held_out", {}).items():
        number = value["value"] if isinstance(value, dict) else value
        rows[f"held-out {name}"] = "no gap to close" if number is None else f"{number:.3f}"
    return rows


def _trained_by(imported: Mapping[str, str] | None, training: Mapping[str, Any]) -> str:
    if imported is not None:
        return f"{imported['from']}, {imported['type']}"
    return (
        f"{training['objective']}, {training['steps']} steps, learning rate {training['learning_rate']:g},"
        f" seed {training['seed']}"
    )


def _taught_by(teacher: Mapping[str, Any] | None) -> dict[str, str]:
    """A row on the teacher, if it is another model."""
    if teacher is None:
        return {}
    tokens_only = ", tokens only" if teacher["signal"] == "answers" else ""
    return {"taught by": f"{teacher['name']} ({teacher['fingerprint'][:12]}{tokens_only})"}


def print_brackets(report: Mapping[str, Any]) -> None:
    """Prints the held-out figures of every bracket, what the model itself can, and the verdict."""
    brackets = report["held_out"]["brackets"]
    columns = {
        "kl": name_of_kl(report.get("taught_by")),
        "decisive_agreement": "decisive",
        "facts_right": "facts",
        "accuracy": "accuracy",
    }
    columns = {metric: title for metric, title in columns.items() if metric in brackets["prompt"]}
    columns |= {"zero_one": "0/1", "rouge_l": "ROUGE-L"}
    table = Table("held-out queries", *columns.values(), box=None, padding=(0, 2, 0, 0))
    for _, words, row in bracket_rows(brackets, bracket_names(report)):
        table.add_row(words, *(f"{row[metric]:.3f}" for metric in columns))
    _print(table, *filter(None, [report["teacher"]["text"]]), report["verdict"]["text"])


def print_summary(result: Result, out: str, started: float) -> None:
    """Prints what a run gave, where it lies and how long it took since ``started`` (``perf_counter``)."""
    report, folder = result.report, Path(out)
    print_brackets(report)
    _print(
        f"{report['prompt_length']} slots for {report['context_tokens']} tokens"
        f" ({report['compression']:.1f}×), {time.perf_counter() - started:.0f} s in all.",
        f"Report: {folder / PAGE} (as text: report.md)   Prompt: {folder / 'prompt.safetensors'}"
        " (how to use it: README.md)",
    )


def print_answers(report: Mapping[str, Any], most: int) -> None:
    """Prints the answers to some held-out queries beside each other."""
    held_out = [query for query in report["queries"] if query["split"] == "held_out"]
    names = "query", "answer_full_context", "answer_prompt", "answer_no_context"
    rows = ([query[name] for name in names] for query in held_out[:most])
    _print(_table(rows, "question", "full context", "soft prompt σ", "no context", title="Held-out"))


def print_export(found: Exported) -> None:
    """Prints where an export lies, and what was measured in its consumer or how it can be."""
    if found.missing is None:
        figures = f"KL {found.kl:.2g} from jaxsp's own distributions, largest difference of a logit"
        lines = [
            f"{found.folder}: checked on {found.queries} question{'s' * (found.queries != 1)}, {figures}"
            f" {found.logit_difference:.2g}."
        ]
    else:
        missing = f"{found.missing} is not installed. To check it:"
        lines = [f"{found.folder} is written, and unchecked: {missing}", *found.check.splitlines()]
    lines.append(f"How to use it: {found.folder / 'README.md'}; the model: {found.model}")
    for line in lines:  # commands and paths, to be copied: they are not cut at the terminal's width
        print(visible(line))


def print_import(prompt: SoftPrompt, folder: Path) -> None:
    """Prints where an imported prompt lies, and how a question is put behind it."""
    chat = prompt.chat
    read = [repr(chat.before), "σ", repr(chat.between), "QUESTION", repr(chat.after)]
    lines = [
        f"{folder}: {prompt.prompt_length} slots of kind {prompt.kind}, σ.",
        f"It is read as {' '.join(part for part in read if part != repr(''))}.",
        f'Ask it:  {program()} ask {shlex.quote(str(folder))} "How long is the cable?"',
    ]
    for line in lines:
        print(visible(line))


def print_files(files: Mapping[str, bytes], repository: str, *, public: bool) -> None:
    """Prints what is to be uploaded, and who may read it."""
    print(f"To {repository}, {'for everyone to read if it is new or public' if public else 'private'}:")
    for name, data in files.items():
        print(f"  {name} ({len(data):,} bytes)")


def print_study(study: Study, file: Path | None) -> None:
    """Prints what a document gave, on standard error: the questions themselves may go to standard output."""
    rows = [(name, row["drafted"], row["kept"]) for name, row in study.summary()["seeds"].items()]
    left = [visible(f"No question asks for: {text}") for text in study.uncovered]
    covered = f"{len(study.asked)} of {len(study.sentences)} sentences are asked for."
    where = [f"Questions: {file}"] if file else []
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    console.print(_table(rows, "seed", "drafted", "kept", box=None), covered, *left, *where, sep="\n")


def result_row(result: Result) -> list[str]:
    """A row of ``print_results``: light, so that the result itself need not be kept."""
    report = result.report
    row = [str(report[name]) for name in ("id", "objective", "prompt_length", "context_tokens")]
    if result.error:
        return [*row, result.error]
    held_out = report["held_out"]["brackets"]
    kl = [f"{held_out[name]['kl']:.3f}" for name in ("prompt", "no_context")]
    return [*row, gap_in_words(report["gap_closed"]), *kl]


def print_results(rows: Iterable[list[str]]) -> None:
    """Prints the rows of many prompts."""
    _print(_table(rows, "id", "objective", "K", "tokens", "gap closed", "σ: KL", "none: KL", box=None))


def print_comparison(found: Comparison, left_out: Sequence[str], file: Path) -> None:
    """Prints several runs side by side, what differs between them, and where their page lies."""
    rows = []
    for run in found.runs:
        own, gap = run.figures, {"value": run.figures["gap"]}
        kl = [number(own[name]) for name in ("prompt", "no_context", "decisive")]
        rows.append([run.name, gap_in_words(gap), *kl, "{} of {}".format(*own["captured"]), own["slots"]])
    for i, values in enumerate(zip(*found.differing.values(), strict=True)):
        rows[i] += map(in_words, values)
    columns = "run", "gap closed", "σ: KL", "none: KL", "decisive", "captured", "K"
    names = [name.replace("_", " ") for name in found.differing]
    _print(_table(rows, *columns, *names, box=None), found.text, *left_out, f"Page: {file}")


def print_entries(entries: Sequence[Entry], folder: Path, now: float) -> None:
    """Prints what a store holds, and when each was last used, seen from ``now`` (``time.time``)."""
    rows = []
    for entry in entries:
        names = "kind", "model", "document", "queries", "tokens"
        kind, model, document, *counts = (entry.about.get(name, "") for name in names)
        texts = kind or "damaged", Path(model).name, " ".join(document.split())
        age = f"{(now - entry.used) / 86400:.1f} days"
        rows.append([entry.path.name, *texts, *counts, size(entry.size), age])
    columns = Column("key", no_wrap=True), "kind", "model", "document", "queries", "tokens", "size", "used"
    total = size(sum(entry.size for entry in entries))
    _print(_table(rows, *columns, box=None), f"{len(rows)} entries, {total}: {folder}")


def _print_pairs(rows: Mapping[str, object]) -> None:
    _print(_table(rows.items(), show_header=False, box=None, padding=(0, 2, 0, 0)))


def _table(rows: Iterable[Iterable[object]], *columns: str | Column, **options: Any) -> Table:
    table = Table(*columns, **options)
    for row in rows:
        table.add_row(*(visible(str(thing)) for thing in row))
    return table


def _print(*things: Table | str) -> None:
    console = Console(highlight=False, markup=False, emoji=False)  # a model's [text] is shown as it is
    console.print(*(visible(thing) if isinstance(thing, str) else thing for thing in things), sep="\n")
