"""A side in torch: PEFT's prompt tuning or cartridge, a page of plain torch; training, or the answers.

python -m experiments.peers.torch_side JOB VARIANT, started by experiment.py. VARIANT: a key of ``VARIANTS``.
"""

# pyright: reportMissingImports=false
# PEFT is only where --torch-python points to.

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import peft
import torch
import transformers
from torch import Tensor
from torch.nn.functional import kl_div
from torch.nn.utils.rnn import pad_sequence

from experiments.peers.job import Job, end_turn
from experiments.peers.strong_torch import Model, Strong, generate

LEARNING_RATE = 1e-2
BATCH = 8
"""Queries at a time where no gradient is taken."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Peer(Protocol):
    parameters: list[Tensor]

    def student(self, index: Sequence[int]) -> Tensor: ...

    def teacher(self, index: Sequence[int]) -> Tensor: ...

    def logits(self, signal: Tensor, /) -> Tensor: ...


class Peft:
    """σ by PEFT; the teacher is the same model with its adapter disabled, after the full context."""

    def __init__(self, job: Job, model: peft.PeftModel) -> None:
        self._job, self._model = job, model
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]

    def student(self, index: Sequence[int]) -> Tensor:
        """Logits ``[N, V]`` at all answer positions of these queries."""
        return self._logits(index, [])

    @torch.no_grad()
    def teacher(self, index: Sequence[int]) -> Tensor:
        """The same after the context."""
        with self._model.disable_adapter():
            return self._logits(index, self._job.preamble + self._job.context)

    def logits(self, signal: Tensor) -> Tensor:
        return signal

    def _logits(self, index: Sequence[int], prefix: list[int]) -> Tensor:
        queries, answers = ([part[i] for i in index] for part in (self._job.queries, self._job.answers))
        rows = [torch.tensor([*prefix, *z, *y[:-1]]) for z, y in zip(queries, answers, strict=True)]
        tokens = pad_sequence(rows, batch_first=True)
        live = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        kept = tokens.shape[1] - len(prefix)  # z and ŷ: the head reads no other columns
        logits = self._model(
            input_ids=tokens, attention_mask=live, use_cache=False, logits_to_keep=kept
        ).logits
        parts = zip(logits, queries, answers, strict=True)
        return torch.cat([row[len(z) - 1 : len(z) - 1 + len(y)] for row, z, y in parts])


def load(job: Job) -> Model:
    dtype = getattr(torch, job.dtype)
    model: Model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype)
    return model.to(DEVICE).eval().requires_grad_(False)


def prompt_tuning(job: Job, base: Model) -> Peft:
    """Virtual tokens come before everything: those of the chat template are among them, and trained."""
    first = torch.tensor(job.preamble + job.context[: job.prompt_length])
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(first))
    model = peft.get_peft_model(base, config)
    vectors = base.get_input_embeddings()(first)
    encoder: Any = model.prompt_encoder["default"]
    encoder.embedding.weight.data.copy_(vectors)
    return Peft(job, model)


def cartridge(job: Job, base: Model) -> Peft:
    """Keys and values of the same tokens; those of the chat template stay as they are."""
    first = torch.tensor(job.preamble + job.context[: job.prompt_length])
    config = peft.CartridgeConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=len(first), num_frozen_tokens=len(job.preamble)
    )
    with torch.no_grad():
        past = base(first[None], use_cache=True).past_key_values
    model = peft.get_peft_model(base, config)
    peft.initialize_kv_prefix_from_past_key_values(model, past_key_values=past)
    return Peft(job, model)


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over positions, of logits ``[N, V]``, in float32."""
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def train(build: Callable[[Job, Model], Peer], job: Job, *, cached: bool) -> None:
    """The first turn readies everything; every other takes some steps and measures."""
    model = load(job)
    started = time.perf_counter()
    peer = build(job, model)

    def teachers(index: Sequence[int]) -> list[Tensor]:
        """The part of the teacher that is kept for each query."""
        parts: list[Tensor] = []
        for start in range(0, len(index), BATCH):
            some = index[start : start + BATCH]
            parts += peer.teacher(some).split([len(job.answers[i]) for i in some])
        return parts

    kept = teachers(range(job.train)) if cached else None
    setup = time.perf_counter() - started
    held_out = range(job.train, len(job.queries))
    target = torch.cat(teachers(held_out))
    optimizer = torch.optim.Adam(peer.parameters, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.steps)

    @torch.no_grad()
    def measured() -> float:
        return kl_divergence(peer.logits(target), peer.student(held_out)).item()

    def step(index: Sequence[int]) -> dict[str, float]:
        started = time.perf_counter()
        with torch.no_grad():
            signal = torch.cat([kept[i] for i in index]) if kept else peer.teacher(index)
            teacher = peer.logits(signal)
        teacher_ended = time.perf_counter()
        loss = kl_divergence(teacher, peer.student(index))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        value = loss.item()  # waits for the device
        seconds = time.perf_counter() - started
        return {"loss": value, "seconds": seconds, "teacher": teacher_ended - started}

    versions = {package.__name__: package.__version__ for package in (torch, transformers, peft)}
    end_turn(setup=setup, setup_warm=setup, kl=measured(), versions=versions)
    for start in range(0, job.steps, job.evaluate_every):
        steps = [step(index) for index in job.batches[start : start + job.evaluate_every]]
        end_turn(steps=steps, kl=measured())


def answers(job: Job, *, at_once: bool) -> None:
    """Each turn answers all queries: eight at a time with their context, or all after one context."""
    model = load(job)
    count = len(job.queries)
    batches = [range(i, min(i + BATCH, count)) for i in range(0, count, BATCH)]
    end_turn()
    while True:
        started = time.perf_counter()
        if at_once:
            made = Strong(job, model).answers()
        else:
            made = [ids for index in batches for ids in generate(model, job, index)]
        end_turn(seconds=time.perf_counter() - started, answers=made)


VARIANTS: dict[str, Callable[[Job], None]] = {
    "prompt tuning, online": functools.partial(train, prompt_tuning, cached=False),
    "prompt tuning, cached": functools.partial(train, prompt_tuning, cached=True),
    "cartridge, online": functools.partial(train, cartridge, cached=False),
    "cartridge, cached": functools.partial(train, cartridge, cached=True),
    "strong torch": functools.partial(train, Strong, cached=True),
    "answers": functools.partial(answers, at_once=False),
    "answers, strong": functools.partial(answers, at_once=True),
}


if __name__ == "__main__":
    torch.set_default_device(DEVICE)
    VARIANTS[sys.argv[2]](Job.read(Path(sys.argv[1])))
