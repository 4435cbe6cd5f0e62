"""A training step beside PEFT's cartridge: SmolLM2's sizes, random weights, as only its speed counts."""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments import random_llama
from experiments.accelerator.checks import Check, Goal, NotRun
from experiments.peers.experiment import BATCH, Side, check_torch, training_row
from experiments.peers.job import Job
from experiments.suite import Run
from jaxsp.data.examples import batch_indices
from jaxsp.errors import UserError

SIZES: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
}  # fmt: skip
"""Those of SmolLM2-135M; its head is not the table of its embeddings here."""
SIDES = {"jaxsp": "jaxsp_side", "cartridge, cached": "torch_side", "cartridge, online": "torch_side"}
KEPT = ("setup_seconds", "setup_seconds_warm", "seconds_a_step", "initial_kl", "final_kl", "peak_mib")


def checks(run: Run) -> list[Check]:
    """One: all sides take their turns together."""
    return [
        Check(
            "a step, beside PEFT's cartridge",
            "seconds of a step of PEFT's cartridge with cached logits, as a multiple of jaxsp's",
            "×",
            functools.partial(beside_peft, run),
            Goal(least=1.0) if run.full else None,
        )
    ]


def beside_peft(run: Run) -> tuple[float, dict[str, Any]]:
    """The ratio, and each side's seconds."""
    try:
        check_torch(run.torch_python)
    except UserError as reason:
        raise NotRun(str(reason)) from reason
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = random_llama.write(folder / "model", **(SIZES if run.full else {}))
        job = make_job(model, *((SIZES["vocab_size"], 20, 5) if run.full else (random_llama.VOCAB, 2, 1)))
        job.write(folder / "job.json")
        rows = {}
        for name, module in SIDES.items():  # each is gone, with its memory, before the next one
            python = sys.executable if module == "jaxsp_side" else run.torch_python
            side = Side(name, python, module, folder / "job.json", name)
            try:
                for _ in range(0, job.steps, job.evaluate_every):
                    side.turn()
            finally:
                side.close()
            row = training_row(name, side.turns, job.steps)
            rows[name] = {key: row[key] for key in KEPT}
    ours, theirs = (rows[name]["seconds_a_step"] for name in ("jaxsp", "cartridge, cached"))
    return theirs / ours, {"sides": rows, "batch_size": BATCH, "dtype": job.dtype}


def make_job(model: Path, vocabulary: int, steps: int, every: int) -> Job:
    """The demo's sizes with random tokens; a small one where the vocabulary is small."""
    random = np.random.default_rng(0)
    small = vocabulary == random_llama.VOCAB
    train, held_out, context, slots = (8, 2, 40, 4) if small else (48, 10, 354, 16)

    def ids(*shape: int) -> list[Any]:
        return random.integers(3, vocabulary, shape).tolist()

    count = train + held_out
    return Job(
        model=str(model),
        dtype="bfloat16",
        preamble=ids(32),
        context=ids(context),
        queries=ids(count, 24),
        answers=ids(count, 32),
        train=train,
        prompt_length=slots,
        steps=steps,
        evaluate_every=every,
        batches=[batch_indices(train, BATCH * step, BATCH, [0]).tolist() for step in range(steps)],
        stop_ids=[2],
        max_answer_tokens=32,
    )
