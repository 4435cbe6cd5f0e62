"""The same compression by jaxsp, by PEFT and by a page of plain torch, in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

import jaxsp
from experiments.peers.job import Job
from experiments.suite import Experiment, Results, Run, markdown
from jaxsp import demo
from jaxsp.data.examples import batch_indices
from jaxsp.settings import Settings
from jaxsp.teacher.problem import tokenize
from jaxsp.typing import UserError

OURS = ("jaxsp", "jaxsp, vectors", "jaxsp, template too", "jaxsp, adam")
PEERS = ("prompt tuning, cached", "cartridge, cached", "strong torch")
ONLINE = ("prompt tuning, online", "cartridge, online")
ANSWERS = {"jaxsp": "answers", "torch": "answers", "strong torch": "answers, strong"}
ONLINE_EVERY = 10
"""Rounds from one in which the online peers take part to the next: only their seconds a step are wanted, as
they compute what the cached ones do."""


STEPS, EVERY, BATCH = 100, 5, 8
"""Updates of everyone; steps of a turn, after which the held-out KL is measured; queries a step."""


class Side:
    """A process of its own that waits between its turns."""

    def __init__(self, name: str, python: str, module: str, job: Path, variant: str) -> None:
        self.name = name
        self.turns: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            [python, "-m", f"experiments.peers.{module}", str(job), variant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._wait()

    def turn(self) -> dict[str, Any]:
        """The record of the side's turn."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._wait()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _wait(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"The side {self.name!r} ended early; its own message stands above.")
        self.turns.append(json.loads(line))
        return self.turns[-1]


def make_job(steps: int) -> Job:
    """The demo's manual and questions as token ids, without answers."""
    model = jaxsp.load_model()
    settings = Settings()
    context, train, held_out = demo.read()
    job = tokenize(model, context, train, held_out, settings)
    key = jax.random.key_data(jax.random.key(settings.training.seed)).tolist()  # as in jaxsp's own loop
    return Job(
        model=str(model.directory),
        dtype=model.config.dtype,
        preamble=job.preamble_ids.tolist(),
        context=job.context_ids.tolist(),
        queries=job.query_ids,
        answers=[],
        train=len(train),
        prompt_length=settings.prompt.prompt_length,
        steps=steps,
        evaluate_every=min(EVERY, steps),
        batches=[batch_indices(len(train), BATCH * step, BATCH, key).tolist() for step in range(steps)],
        stop_ids=list(model.stop_ids),
        max_answer_tokens=settings.teacher.max_answer_tokens,
    )


def measure(_: str, run: Run) -> dict[str, Any]:
    check_torch(run.torch_python)
    steps = STEPS if run.full else 2
    job = make_job(steps)
    with contextlib.ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "job.json"

        def start(name: str, variant: str, ours: bool) -> Side:
            say(f"{name}: getting ready")
            python, module = (sys.executable, "jaxsp_side") if ours else (run.torch_python, "torch_side")
            side = Side(name, python, module, file, variant)
            stack.callback(side.close)
            return side

        job.write(file)
        sides = [start(name, variant, name == "jaxsp") for name, variant in ANSWERS.items()]
        for _turn in range(2):  # jaxsp compiles in the first
            for side in sides:
                say(f"{side.name}: {side.turn()['seconds']:.1f} s for the answers")
        answered = [answers_row(side, sides[0]) for side in sides]
        job = dataclasses.replace(job, answers=sides[0].turns[1]["answers"])
        for side in sides:
            side.close()

        job.write(file)
        sides = [start(name, name, name in OURS) for name in (*OURS, *PEERS, *ONLINE)]
        for number in range(-(-steps // EVERY)):
            for side in sides:
                if side.name not in ONLINE or number % ONLINE_EVERY == 0:
                    side.turn()
            kl = ", ".join(f"{s.name} {s.turns[-1]['kl']:.3f}" for s in sides[: -len(ONLINE)])
            say(f"step {min(steps, (number + 1) * EVERY)}: {kl}")
        rows = [training_row(side.name, side.turns, steps) for side in sides]
    return {
        "rows": compared(rows),
        "answers": answered,
        "no_context_kl": sides[0].turns[0]["no_context_kl"],
        "job": {
            "context_tokens": len(job.context),
            "template_tokens": len(job.preamble),
            "prompt_length": job.prompt_length,
            "train": job.train,
            "held_out": len(job.queries) - job.train,
            "answer_tokens": sum(map(len, job.answers)),
            "answer_tokens_a_step": statistics.mean(
                sum(len(job.answers[i]) for i in batch) for batch in job.batches
            ),
            "batch_size": BATCH,
            "steps": steps,
            "dtype": job.dtype,
        },
        "torch": sides[len(OURS)].turns[0]["versions"],
    }


def check_torch(python: str) -> None:
    """Raises ``UserError`` if this Python can't play the peers."""
    packages = "torch", "transformers", "peft"
    code = f"import importlib.util as u; print([p for p in {packages} if u.find_spec(p) is None])"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--torch-python {python} can't be run ({error}).") from error
    if missing := json.loads(found.stdout.replace("'", '"')):
        raise UserError(
            f"{python} has no {' and no '.join(missing)}; pass --torch-python a Python that has"
            f" {', '.join(packages)}."
        )


def answers_row(side: Side, ours: Side) -> dict[str, Any]:
    """Seconds of both turns, and how many answers are token by token jaxsp's."""
    made = side.turns[1]["answers"]
    same = sum(a == b for a, b in zip(made, ours.turns[1]["answers"], strict=True))
    return {
        "side": side.name,
        "seconds": [turn["seconds"] for turn in side.turns[1:]],
        "tokens": sum(map(len, made)),
        "same": same,
        "of": len(made),
        "peak_mib": side.turns[-1]["peak_mib"],
    }


def training_row(name: str, told: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """The sum of a side's turns; an online peer's seconds are those of all its steps at its median."""
    first, *turns = told
    taken = [step for turn in turns for step in turn["steps"]]
    seconds = [step["seconds"] for step in taken]
    median = statistics.median(seconds)
    whole = len(taken) == steps
    return {
        "side": name,
        "steps_measured": len(taken),
        "setup_seconds": first["setup"],
        "setup_seconds_warm": first["setup_warm"],
        "seconds_a_step": median,
        "teacher_seconds_a_step": statistics.median(step.get("teacher", 0.0) for step in taken),
        "seconds": first["setup"] + (sum(seconds) if whole else steps * median),
        "seconds_warm": first["setup_warm"] + steps * median,
        "initial_kl": first["kl"],
        "final_kl": turns[-1]["kl"] if whole else None,
        "peak_mib": told[-1]["peak_mib"],
        "losses": [step["loss"] for step in taken],
        "curve": curve(told),
    }


def curve(turns: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Held-out KL and training seconds so far after every turn, and warm: without compilation."""
    first, *others = turns
    median = statistics.median(step["seconds"] for turn in others for step in turn["steps"])
    point = {"step": 0, "kl": first["kl"], "seconds": first["setup"], "seconds_warm": first["setup_warm"]}
    points = [point]
    for turn in others:
        count = len(turn["steps"])
        point = {
            "step": point["step"] + count,
            "kl": turn["kl"],
            "seconds": point["seconds"] + sum(step["seconds"] for step in turn["steps"]),
            "seconds_warm": point["seconds_warm"] + count * median,
        }
        points.append(point)
    return points


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, the peers' with how soon each of ours first had a held-out KL as low as their last."""
    by_name = {row["side"]: row for row in rows}

    def final_kl(row: dict[str, Any]) -> float:
        cached = by_name[row["side"].replace("online", "cached")]
        return cached["final_kl"]

    def reached(ours: str, row: dict[str, Any]) -> dict[str, float] | None:
        point = next((p for p in by_name[ours]["curve"] if p["kl"] <= final_kl(row)), None)
        return point and {
            **point,
            "faster": row["seconds"] / point["seconds"],
            "faster_warm": row["seconds_warm"] / point["seconds_warm"],
        }

    def loss_difference(row: dict[str, Any]) -> float:
        """Between an online peer and the cached one, the largest over the steps that both took."""
        cached = by_name[row["side"].replace("online", "cached")]
        return max(abs(a - b) for a, b in zip(row["losses"], cached["losses"], strict=False))

    return [
        row
        if row["side"] in OURS
        else {
            **row,
            "final_kl": final_kl(row),
            "loss_difference": loss_difference(row),
            "reached": {ours: reached(ours, row) for ours in OURS},
        }
        for row in rows
    ]


def table(results: Results) -> str:
    result = results["default"]
    peers = [row for row in result["rows"] if "reached" in row]
    ours = [row["side"] for row in result["rows"] if row["side"] in OURS]
    return "\n\n".join(
        [
            markdown(
                ["side", "set-up (s)", "a step (s)", "of it teacher", "all (s)", "held-out KL", "peak (MiB)"],
                [
                    [row["side"], f"{row['setup_seconds']:.1f}", f"{row['seconds_a_step']:.2f}",
                     seconds_or_none(row["teacher_seconds_a_step"]), f"{row['seconds']:.0f}",
                     f"{row['final_kl']:.3f}", f"{row['peak_mib']:,.0f}"]
                    for row in result["rows"]
                ],
            ),
            markdown(
                ["to the last KL of", *ours],
                [[row["side"], *(there(row["reached"].get(name)) for name in ours)] for row in peers],
            ),
            markdown(
                ["answers", "s", "again", "tokens/s, again", "same as jaxsp's", "peak (MiB)"],
                [
                    [row["side"], *(f"{second:.1f}" for second in row["seconds"]),
                     f"{row['tokens'] / row['seconds'][1]:.0f}", f"{row['same']} of {row['of']}",
                     f"{row['peak_mib']:,.0f}"]
                    for row in result["answers"]
                ],
            ),
        ]
    )  # fmt: skip


def seconds_or_none(value: float) -> str:
    return f"{value:.2f}" if value >= 0.005 else "–"


def there(point: dict[str, float] | None) -> str:
    if point is None:
        return "not reached"
    faster, warm = f"{point['faster']:.1f}×", f"{point['faster_warm']:.1f}×"
    return f"{point['seconds']:.0f} s, step {point['step']}: {faster} ({warm})"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def result(results: Results) -> str:
    rows = {row["side"]: row for row in results["default"]["rows"]}
    ours, faster = "jaxsp" if "jaxsp" in rows else "jaxsp, template too", []
    for kind in ("online", "cached"):
        point = rows[f"cartridge, {kind}"]["reached"].get(ours)
        faster.append(f"{point['faster']:.1f}×" if point else "not reached")
    peers = ("prompt tuning, cached", "cartridge, cached", "strong torch")
    ends = (f"{name.removesuffix(', cached')} {rows[name]['final_kl']:.3f}" for name in peers)
    return (
        f"to the last KL of PEFT's cartridge {faster[0]} as fast with the teacher online, {faster[1]} with"
        f" cached logits; ends at {rows[ours]['final_kl']:.3f} ({', '.join(ends)})"
    )


EXPERIMENT = Experiment(
    question="How long do jaxsp, PEFT and a page of plain torch take for the same compression, and what does"
    " each reach? How much of the difference is the optimizer, how much the speed of a step?",
    cost="14 to 25 minutes on two cores; needs torch, transformers and peft",
    run=measure,
    table=table,
    result=result,
    file="results.parquet",
    options="--torch-python PATH",
)
