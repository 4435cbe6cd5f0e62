"""Speed of a Llama of a billion parameters in bfloat16: beside the card's own matrix products, and torch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from experiments.accelerator.checks import Check, Goal, NotRun, seconds
from experiments.decoder_speed.jobs import Torch, has_torch, matmul, our_jobs
from experiments.decoder_speed.workload import SHAPES, flops
from experiments.suite import Run

DTYPE = "bfloat16"
JOBS = ("prefill", "decode", "prompt gradient")
UTILISATION = 0.5
"""Goal of the prompt's gradient, as a part of the card's own rate."""


def checks(run: Run) -> list[Check]:
    """The rate of matrix products, our jobs, and the same by torch."""
    bench = Bench(run)
    found = [Check("matrix products", "the card's own rate, a square product", "TFLOP/s", bench.own_rate)]
    for job in JOBS:
        of_rate = job == "prompt gradient"
        found.append(
            Check(
                job,
                "FLOPs that it can't do without, of the card's own rate" if of_rate else "speed",
                "of the rate" if of_rate else "tokens/s",
                functools.partial(bench.ours, job, of_rate=of_rate),
                Goal(least=UTILISATION) if of_rate and run.full else None,
            )
        )
    return found + [
        Check(
            f"{job}, beside torch",
            "seconds of Hugging Face's model with SDPA, as a multiple of ours",
            "×",
            functools.partial(bench.beside_torch, job),
        )
        for job in JOBS
    ]


class Bench:
    """Things that several checks need, each made once."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._name = "llama-1b" if run.full else "tiny"
        self._shape = SHAPES[self._name]
        self._repeats = 7 if run.full else 1
        self._seconds: dict[str, float] = {}
        self._jobs: dict[str, Callable[[], Any]] = {}
        self._torch: Torch | None = None  # ends with this process

    def own_rate(self) -> float:
        """TFLOP/s of a square product; many in a row, as one takes a millisecond."""
        if "matmul" not in self._seconds:
            call = matmul(DTYPE, self._shape.matmul)
            self._seconds["matmul"] = seconds(call, self._repeats, calls=20 if self._run.full else 1)
        return 2 * self._shape.matmul**3 / self._seconds["matmul"] / 1e12

    def ours(self, job: str, *, of_rate: bool) -> tuple[float, dict[str, Any]]:
        """Tokens a second of a job, or the part of the rate."""
        work, tokens = flops(self._shape, job)
        took = self._of(job)
        speed, share = tokens / took, work / took / 1e12 / self.own_rate()
        told = {"shape": self._name, "tokens": tokens, "seconds_of_it": took}
        return share if of_rate else speed, {**told, "tokens_per_second": speed, "of_rate": share}

    def beside_torch(self, job: str) -> tuple[float, dict[str, Any]]:
        """torch's seconds over ours. Its process waits for the device before it answers."""
        if not has_torch(self._run.torch_python):
            raise NotRun(f"{self._run.torch_python} has no torch")
        ours = self._of(job)
        torch = self._torch = self._torch or Torch(self._run.torch_python, self._name, DTYPE)
        try:
            took = seconds(functools.partial(torch.do, job), self._repeats)
        except Exception:
            self._torch = None  # the next job has a new one
            with contextlib.suppress(OSError):
                torch.close()
            raise
        share = flops(self._shape, job)[0] / took / 1e12 / self.own_rate()
        return took / ours, {"torch_seconds": took, "torch_of_rate": share, "versions": torch.versions}

    def _of(self, job: str) -> float:
        if job not in self._seconds:
            self._jobs = self._jobs or our_jobs(self._shape, DTYPE)
            self._seconds[job] = seconds(self._jobs[job], self._repeats)
        return self._seconds[job]
