"""The shared part of the experiments: their list, a run, its results on disk, the tables drawn from these."""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxsp.settings import Options

HERE = Path(__file__).parent
NAMES = (
    "documents",
    "initialisation",
    "instructions",
    "study",
    "objectives",
    "peers",
    "precision",
    "decoder_speed",
    "serving",
    "loss_cost",
    "accelerator",
    "offline_distillation",
    "signals",
    "long_documents",
    "scale",
    "colab",
)
"""The experiments, each a folder with an ``experiment.py`` that has an ``EXPERIMENT``."""

Results = dict[str, dict[str, Any]]
"""By setting: date, commit and environment of its run, and what the run found."""

_MARKED = re.compile(r"(?<=<!-- results: )(\w+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)
_METADATA = b"experiment"


@dataclasses.dataclass(frozen=True)
class Run:
    """The way an experiment is run.

    Attributes:
      full: as its committed results were made; else small, to see that it works.
      out: folder of the results.
      torch_python: a Python with torch, for experiments that compare with it.
    """

    full: bool
    out: Path
    torch_python: str = sys.executable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question, and the run that answers it.

    Attributes:
      question: in a sentence or two.
      cost: of the full run: time, memory, and what it needs.
      run: measures a setting.
      table: the results in Markdown, for README.md.
      result: the results in one short line.
      settings: what can be measured apart from the rest.
      small: those that a small run measures; by default the first one.
      draw: the pictures, into a folder.
      file: of the results, JSON or Parquet.
      options: what a full run needs on its command line.
      missing: what has not been measured yet, and why.
    """

    question: str
    cost: str
    run: Callable[[str, Run], dict[str, Any]]
    table: Callable[[Results], str]
    result: Callable[[Results], str]
    settings: tuple[str, ...] = ("default",)
    small: tuple[str, ...] = ()
    draw: Callable[[Results, Path], object] | None = None
    file: str = "results.json"
    options: str = ""
    missing: str = ""


def load(name: str) -> Experiment:
    """The experiment of this name. Only its own module is imported: some need what others don't."""
    return importlib.import_module(f"experiments.{name}.experiment").EXPERIMENT


def committed(name: str) -> Results:
    """The results in the experiment's folder."""
    return read(HERE / name / load(name).file)


def measure(name: str, setting: str, run: Run) -> None:
    """Runs one setting of an experiment; the results of its other settings in ``run.out`` stay."""
    experiment, started = load(name), time.perf_counter()
    found = experiment.run(setting, run)
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "environment": environment(),
        "wall_seconds": time.perf_counter() - started,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    file = run.out / experiment.file
    results = {**read(file), setting: record | found}
    write(file, results)
    if experiment.draw:
        experiment.draw(results, run.out)


class KeptRows:
    """The rows of an experiment that takes hours, each kept as it comes: after a stop it goes on from them.

    A small run begins with none.

    Attributes:
      folder: where a full run that is not finished keeps what it has: ``NAME-out``.
      rows: those committed, and those kept.
    """

    def __init__(self, name: str, setting: str, run: Run, *, only: Path | None = None) -> None:
        """Reads the rows that there are; with ``only`` those of that folder, where further ones go, too."""
        self.folder = only or (Path(f"{name}-out") if run.full else run.out)
        self._file = self.folder / f"{setting}.jsonl"
        self.rows: list[dict[str, Any]] = []
        if run.full and only is None:
            self.rows += committed(name).get(setting, {}).get("rows", [])
        if self._file.is_file():
            self.rows += [json.loads(line) for line in self._file.read_text("utf-8").splitlines()]

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a further row, with the commit of the code."""
        row = {**row, "commit": commit()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        self.rows.append(row)


def environment() -> dict[str, Any]:
    """The machine and versions of a report, and the processor."""
    from jaxsp.artifact import environment

    return {**environment(), "processor": processor(), "cores": os.cpu_count()}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def commit() -> str:
    """The commit of the code, with ``-dirty`` if it was changed since.

    Where the code is a copy without git, the environment variable ``EXPERIMENTS_COMMIT`` says it.
    """
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("EXPERIMENTS_COMMIT", "unknown")


def write(file: Path, results: Results) -> None:
    """Writes results whole or not at all.

    In Parquet the ``rows`` of all settings are the table, with a column ``setting``; the rest is metadata.
    """
    from jaxsp.files import atomic_write

    if file.suffix == ".json":
        atomic_write(file, _json(results) + "\n")
        return
    import pyarrow
    from pyarrow import parquet

    rows = [{"setting": name, **row} for name, record in results.items() for row in record["rows"]]
    rest = {
        name: {key: value for key, value in record.items() if key != "rows"}
        for name, record in results.items()
    }
    columns = {
        key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)
    }
    table = pyarrow.table(columns).replace_schema_metadata({_METADATA: json.dumps(rest)})
    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(table, buffer, compression="zstd")
    atomic_write(file, buffer.getvalue().to_pybytes())


def read(file: Path) -> Results:
    """The results that ``write`` wrote; none if there is no file. Parquet's missing values are left out."""
    if not file.is_file():
        return {}
    if file.suffix == ".json":
        return json.loads(file.read_text("utf-8"))
    from pyarrow import parquet

    table = parquet.read_table(file)
    results = json.loads(table.schema.metadata[_METADATA])
    for row in map(_present, table.to_pylist()):
        results[row.pop("setting")].setdefault("rows", []).append(row)
    return results


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


def _json(value: Any, depth: int = 0) -> str:
    """JSON in which what fits on a line stands on one."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(line) + depth <= 110:
        return line
    items = value.items() if isinstance(value, dict) else [(None, item) for item in value]
    lines = [
        " " * (depth + 1) + (f"{json.dumps(key, ensure_ascii=False)}: " if isinstance(value, dict) else "")
        + _json(item, depth + 1)
        for key, item in items
    ]  # fmt: skip
    start, end = "{}" if isinstance(value, dict) else "[]"
    return start + "\n" + ",\n".join(lines) + "\n" + " " * depth + end


def in_turns(
    calls: Mapping[str, Callable[[], Any]], repeats: int, most: float = math.inf
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Times calls in turns, so that what else the machine does falls on all.

    Args:
      calls: by name.
      repeats: turns that count; one before them compiles and warms up.
      most: seconds after which no further turn begins, if one has counted.

    Returns:
      The seconds of each call, and what each gave last.
    """
    import jax

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    values, begun = {}, time.perf_counter()
    for turn in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            values[name] = jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - started)
        if turn and time.perf_counter() - begun > most:
            break
    return {name: times[1:] for name, times in seconds.items()}, values


DEMO: Options = {"steps": 30, "evaluate_every": 20, "max_answer_tokens": 32, "study": "off"}
"""The settings of ``jaxsp demo``."""


def own_document(name: str) -> tuple[str, list[Any], list[Any]]:
    """A text in ``experiments/documents``, its training queries, and the held-out ones."""
    from jaxsp.data.documents import read_context, read_queries

    folder = HERE / "documents" / name
    queries, held_out = (read_queries(folder / name) for name in ("queries.txt", "held_out.jsonl"))
    return read_context(folder / "context.md"), queries, held_out


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table of Markdown whose first ``texts`` columns are texts, the others numbers."""
    first, *others = (f"| {' | '.join(line)} |" for line in (head, *rows))
    align = "|" + "---|" * texts + "---:|" * (len(head) - texts)
    return "\n".join([first, align, *others])


def spread(found: Mapping[str, float]) -> str:
    """A value with its interval."""
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def summary(name: str) -> dict[str, str]:
    """The experiment as a row of the list."""
    experiment, results = load(name), committed(name)
    left = f": {experiment.missing}" if experiment.missing else ""
    newest = max(results.values(), key=lambda record: record["date"], default={})
    return {
        "name": name,
        "question": experiment.question,
        "cost": experiment.cost,
        "command": f"python -m experiments {name} --full{' ' * bool(experiment.options)}{experiment.options}",
        "result": f"{experiment.result(results) if results else 'none yet'}{left}",
        "date": newest.get("date", "–"),
        "commit": newest.get("commit", "–"),
    }


def drawn(text: str) -> str:
    """Markdown with what stands between ``<!-- results: NAME -->`` and ``<!-- end -->`` drawn anew.

    NAME is an experiment, or ``list`` for the list of all.
    """

    def block(found: re.Match[str]) -> str:
        name = found[1]
        table = _list() if name == "list" else load(name).table(committed(name))
        return f"{name}{found[2]}{table}\n"

    return _MARKED.sub(block, text)


def _list() -> str:
    rows, keys = [summary(name) for name in NAMES], ("question", "result", "cost", "date", "commit")
    return markdown(
        ["experiment", "question", "result", "cost of the full run", "date", "commit"],
        [
            [f"[{row['name']}]({row['name']})", *(row[key] for key in keys)]
            for row in rows
        ],
        texts=6,
    )  # fmt: skip


def readmes() -> list[Path]:
    """The files with marked tables, or with room for them."""
    return [HERE.parent / "README.md", HERE / "README.md", *sorted(HERE.glob("*/README.md"))]


def redraw() -> None:
    """Draws tables and pictures anew from the committed results."""
    for name in NAMES:
        if (draw := load(name).draw) and (results := committed(name)):
            draw(results, HERE / name)
    fill()


def fill() -> None:
    """Draws the marked tables anew."""
    from jaxsp.files import atomic_write

    for file in readmes():
        text = file.read_text("utf-8")
        if drawn(text) != text:
            atomic_write(file, drawn(text))
