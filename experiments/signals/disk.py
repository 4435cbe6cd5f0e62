"""Steps whose signals are read from the disk, each time anew, beside the same steps from memory."""

from __future__ import annotations

import mmap
import os
import resource
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxsp
from experiments.suite import DEMO, Run, markdown
from jaxsp import demo
from jaxsp.data.examples import Rows
from jaxsp.data.packing import Packing
from jaxsp.data.ragged import Ragged
from jaxsp.evaluation.metrics import mean_kl_function
from jaxsp.models.language_model import LanguageModel
from jaxsp.progress import Display
from jaxsp.prompts import with_defaults
from jaxsp.settings import Settings, make_settings
from jaxsp.teacher.problem import Problem, read_preamble, run_teacher, tokenize
from jaxsp.teacher.store import Store
from jaxsp.training import Frozen, JitDriver, UpdateSettings
from jaxsp.training.loop import Block
from jaxsp.training.slots import Step, TrainingJob
from jaxsp.training.start import start_state

MEMORY, DISK = "memory", "disk"
STEPS, TURNS = 9, 6
"""Steps of a turn, of which the first is not counted: nothing has been read ahead for it."""


def measure(run: Run) -> dict[str, Any]:
    """A row for each turn from memory and from disk, one after the other in one compiled program."""
    model, (context, queries, held_out) = jaxsp.load_model(dtype="bfloat16"), demo.read()
    steps, turns = (STEPS, TURNS) if run.full else (3, 1)
    settings = with_defaults(make_settings({**DEMO, "steps": steps, "evaluate_every": steps}))
    if not run.full:
        settings = with_defaults(make_settings({"max_answer_tokens": 8}, base=settings))
        queries, held_out = queries[:8], held_out[:2]
    with tempfile.TemporaryDirectory(dir=run.out) as folder:  # not in memory, as other folders may be
        job = tokenize(model, context, queries, held_out, settings)
        asked = model, job, settings.teacher, read_preamble(model), Display(visible=False)
        problem = run_teacher(*asked, Store(Path(folder)))
        rows = in_turns(model, problem, settings, turns, sorted(Path(folder).rglob("*.bin")))
    return {
        "model": model.name, "dtype": model.config.dtype, "steps": steps,
        "bytes_a_step": _bytes(problem.train) * settings.training.batch_size / len(problem.train),
        "rows": rows,
    }  # fmt: skip


def in_turns(
    model: LanguageModel, problem: Problem, settings: Settings, turns: int, files: Sequence[Path]
) -> list[dict[str, Any]]:
    """Trains the same prompt again and again, in turns from memory and from the files that the rows map."""
    state = start_state(model, problem, settings)
    frozen, chosen = Frozen(model.params, problem.preamble), UpdateSettings.of(model.config, settings)
    packing = Packing.of(problem.lengths, settings.training.batch_size)
    train = {MEMORY: in_memory(problem.train), DISK: problem.train}
    jobs = [
        TrainingJob(f"{turn} {name}", state, own, problem.held_out, packing)
        for turn in range(turns)
        for name, own in train.items()
    ]
    maps, faults = [mapped(row) for row in train[DISK].targets["hidden"].rows], dict[str, int]()

    def after(step: Step) -> None:
        faults.setdefault(step.job, resource.getrusage(resource.RUSAGE_SELF).ru_majflt)
        if step.job.endswith(DISK):
            forget(maps, files)

    block = Block(
        iter(jobs),
        lambda slots: JitDriver(frozen, chosen, slots=slots),
        mean_kl_function(model, problem.preamble, settings.prompt.kind),
        slots=1,
        evaluate_every=settings.training.updates,
        callbacks=[after],
    )
    rows = []
    for result in block.run():
        turn, name = result.id.split()
        now = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        seconds = [line["seconds"] for line in result.lines[2:]]
        rows.append({
            "turn": int(turn), "signals": name, "step_seconds": statistics.median(seconds),
            "last_loss": result.lines[-1]["loss"], "faults": now - faults[result.id],
        })  # fmt: skip
    return rows


def in_memory(rows: Rows) -> Rows:
    """The same rows with their signals in memory."""
    hidden = rows.targets["hidden"]
    return rows.with_targets(hidden=Ragged([np.array(row) for row in hidden.rows], hidden.blank))


def mapped(row: Any) -> mmap.mmap:
    """The mapped file that a row is in."""
    while not isinstance(row, mmap.mmap):
        row = row.base
    return row


def forget(maps: Sequence[mmap.mmap], files: Sequence[Path]) -> None:
    """Lets the system drop what it has read of these files: who reads them next, waits for the disk."""
    for one in maps:
        one.madvise(mmap.MADV_DONTNEED)
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes(rows: Rows) -> int:
    return sum(row.nbytes for row in rows.targets["hidden"].rows)


def speed(rows: Sequence[dict[str, Any]]) -> float:
    """The speed from disk as a part of that from memory, the median over turns."""
    seconds = {(row["turn"], row["signals"]): row["step_seconds"] for row in rows}
    turns = sorted({row["turn"] for row in rows})
    return statistics.median(seconds[turn, MEMORY] / seconds[turn, DISK] for turn in turns)


def table(found: dict[str, Any]) -> str:
    head = ["signals", "turns", "a step (s)", "reads that waited for the disk, a step"]
    lines = []
    for name in (MEMORY, DISK):
        own = [row for row in found["rows"] if row["signals"] == name]
        waits = statistics.mean(row["faults"] for row in own) / found["steps"]
        seconds = statistics.median(row["step_seconds"] for row in own)
        lines.append([f"from {name}", f"{len(own)}", f"{seconds:.3f}", f"{waits:.0f}"])
    from_disk = f"From disk at {speed(found['rows']):.1%} of the speed from memory, turn by turn"
    return f"{markdown(head, lines)}\n\n{from_disk}; {found['bytes_a_step'] / 2**10:,.0f} KiB a step."
