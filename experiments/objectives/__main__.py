"""Prompts trained on seven objectives, each measured by all of them and by whole answers.

python -m experiments.objectives [--full] [--contexts N] [--out FOLDER]
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

import jaxsp
from experiments.objectives import analysis, plots
from experiments.objectives.narrativeqa import Passage, passages
from jaxsp.artifact import environment
from jaxsp.models.language_model import LanguageModel
from jaxsp.runs.folder import RunFolder
from jaxsp.typing import Interrupted, UserError

HERE = Path(__file__).parent

TRAINED_ON = {
    "kl": "kl",
    "reverse_kl": "reverse_kl",
    "js": "js",
    "topk_kl": "topk_kl",
    "nll": "nll",
    "mixture": "kl=0.5,nll=0.5",
    "cosine_similarity": "cosine_similarity",
}
Wanted = list[dict[tuple[str, int], dict[str, Any]]]
AT_A_TIME = 2  # contexts: a run that is stopped has every objective on the same ones


@dataclasses.dataclass(frozen=True)
class Setting:
    """The compressions and their settings."""

    contexts: int
    objectives: tuple[str, ...]
    seeds: tuple[int, ...]
    train: int
    held_out: int
    steps: int
    max_answer_tokens: int

    def options(self) -> dict[str, Any]:
        """The settings of all jobs."""
        return {
            "prompt_length": 16,
            "steps": self.steps,
            "keep": "last",  # the best by held-out KL would favour kl, and look at held-out questions
            "evaluate_every": self.steps,
            "max_answer_tokens": self.max_answer_tokens,
        }


SMALL = Setting(2, ("kl", "nll"), (0,), train=6, held_out=3, steps=6, max_answer_tokens=16)
FULL = Setting(20, tuple(TRAINED_ON), (0, 1), train=22, held_out=6, steps=24, max_answer_tokens=48)


@dataclasses.dataclass(frozen=True)
class Run:
    """Compress, measure, and write the tables and pictures; the same command goes on after a stop."""

    full: bool = False
    """Everything, instead of two contexts and two objectives."""
    contexts: int | None = None
    """Number of contexts; by default 2, or 20 with --full."""
    out: Path = Path("objectives-out")
    """Folder of the prompts and their reports."""
    results: Path | None = None
    """Folder of the results; by default that of the prompts, with --full that of this experiment."""


def jobs(setting: Setting, texts: Sequence[Passage]) -> Wanted:
    """For each context what ``compress_many`` takes, by objective and seed."""
    end = setting.train + setting.held_out
    return [
        {
            (objective, seed): {
                "id": f"{number:03}-{objective}-{seed}",
                "context": passage.text,
                "queries": passage.questions[: setting.train],
                "held_out": passage.questions[setting.train : end],
                "objective": TRAINED_ON[objective],
                "seed": seed,
            }
            for objective in setting.objectives
            for seed in setting.seeds
        }
        for number, passage in enumerate(texts)
    ]


def compress(model: LanguageModel, setting: Setting, wanted: Wanted, out: Path) -> None:
    """Does the jobs, a few contexts at a time; what is finished in ``out`` is not done again."""
    rows = [list(of_context.values()) for of_context in wanted]
    for end in range(AT_A_TIME, len(rows) + AT_A_TIME, AT_A_TIME):
        some = [row for of_context in rows[:end] for row in of_context]
        finished = all((out / row["id"] / analysis.REPORT).is_file() for row in some)
        if finished and end < len(rows):
            continue
        resume = RunFolder(out).settings.is_file()
        for _ in jaxsp.compress_many(model, some, out=out, resume=resume, **setting.options()):
            pass


def main(run: Run) -> None:
    setting = FULL if run.full else SMALL
    texts = passages()
    count = setting.contexts if run.contexts is None else run.contexts
    if not 1 <= count <= len(texts):
        raise UserError(f"--contexts must lie between 1 and {len(texts)}, not {count}.")
    out = run.out / ("full" if run.full else "small")
    results = run.results or (HERE if run.full else out / "results")
    wanted = jobs(setting, texts[:count])
    stopped = None
    try:
        compress(jaxsp.load_model(), setting, wanted, out)
    except Interrupted as error:
        stopped = error
    contexts, failed = analysis.finished(out, wanted)
    if contexts:
        found = {
            "command": f"python -m experiments.objectives{' --full' * run.full} --contexts {count}",
            "setting": dataclasses.asdict(setting),
            "failed": failed,
            **analysis.summary(contexts, setting.objectives),
            "machine": {"processor": platform.machine(), "cores": os.cpu_count(), **environment()},
        }
        results.mkdir(parents=True, exist_ok=True)
        (results / "results.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
        analysis.copy_numbers(out / "results.parquet", results / "results.parquet")
        plots.heat_map(found["table"], results / "table.png")
        plots.long_answers(found["long_answers"], results / "long_answers.png")
        print(analysis.markdown(found))
        print(f"\n{found['contexts']} of {count} contexts, {found['prompts']} prompts: {results}")
    if stopped:
        raise Interrupted("Interrupted; the same command goes on.") from stopped


if __name__ == "__main__":
    try:
        main(tyro.cli(Run, description=__doc__))
    except UserError as error:
        sys.exit(f"experiments.objectives: {error}")
