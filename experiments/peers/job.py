"""Shared by both sides: the job as token ids, and the turns they take. Needs neither jax nor torch."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Job:
    """A compression as token ids: the sequence is ``preamble · context or σ · query · answer``.

    Attributes:
      model: folder of the weights, as Hugging Face's.
      dtype: dtype of weights and activations.
      preamble: ids in front of the context.
      context: ids of c.
      queries: ids of z, each up to where the answer starts; those trained on come first.
      answers: ids of ŷ, the end-of-turn id included.
      train: number of queries trained on; the others are held out.
      prompt_length: K.
      steps: updates.
      evaluate_every: steps of a turn; the held-out KL is measured after each.
      batches: indices of the queries of every step.
      stop_ids: ids that end an answer.
      max_answer_tokens: longest answer.
    """

    model: str
    dtype: str
    preamble: list[int]
    context: list[int]
    queries: list[list[int]]
    answers: list[list[int]]
    train: int
    prompt_length: int
    steps: int
    evaluate_every: int
    batches: list[list[int]]
    stop_ids: list[int]
    max_answer_tokens: int

    @classmethod
    def read(cls, file: Path) -> Job:
        return cls(**json.loads(file.read_text("utf-8")))

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(dataclasses.asdict(self)), "utf-8")


def end_turn(**result: Any) -> None:
    """Tells what this process did in its turn and waits for the next one; with no next one it ends."""
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps(result), flush=True)
    if not sys.stdin.readline():
        sys.exit()
