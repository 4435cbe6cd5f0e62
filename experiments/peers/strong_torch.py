"""The strongest plain torch version of a page: nothing is read twice, nothing is padded.

The context is read once, and the template; the queries of a batch stand packed in one row behind one σ, which
all of them see through the mask; the teacher's last hidden states are kept, and the head reads answer
positions only.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from experiments.peers.job import Job

Cache = transformers.DynamicCache
Model = Any
"""A causal language model of transformers, whose own types know neither its parts nor its ``generate``."""


class Strong:
    def __init__(self, job: Job, model: Model) -> None:
        self._job, self._model = job, model
        self._embed = model.model.embed_tokens
        ids = torch.tensor(job.preamble + job.context)
        with torch.no_grad():
            self._preamble = self._read(ids[: len(job.preamble)])
            self._context = self._read(ids)
        self._sigma = self._embed(torch.tensor(job.context[: job.prompt_length])).float().requires_grad_()
        self.parameters = [self._sigma]

    def student(self, index: Sequence[int]) -> Tensor:
        """Logits ``[N, V]`` at all answer positions of these queries."""
        return self.logits(self._states(index, self._preamble, self._sigma))

    @torch.no_grad()
    def teacher(self, index: Sequence[int]) -> Tensor:
        """Last hidden states ``[N, D]`` there after the context."""
        return self._states(index, self._context, self._sigma[:0])

    def logits(self, states: Tensor) -> Tensor:
        return self._model.lm_head(states)

    def _read(self, ids: Tensor) -> Cache:
        return self._model.model(ids[None], use_cache=True).past_key_values

    def _states(self, index: Sequence[int], past: Cache, sigma: Tensor) -> Tensor:
        """Last hidden states at the answer positions of these queries, packed in a row after σ."""
        queries, answers = ([part[i] for i in index] for part in (self._job.queries, self._job.answers))
        rows = [torch.tensor([*z, *y[:-1]]) for z, y in zip(queries, answers, strict=True)]
        start, length = past.get_seq_length(), len(sigma)
        position = torch.cat([torch.arange(length), *(length + torch.arange(len(r)) for r in rows)])
        segment = torch.cat([torch.full((n,), s) for s, n in enumerate([length, *map(len, rows)])])
        sees = (position[:, None] >= position) & ((segment == 0) | (segment[:, None] == segment))
        sees = torch.cat([torch.ones(len(sees), start, dtype=torch.bool), sees], dim=1)
        tokens = self._embed(torch.cat(rows))
        states = self._model.model(
            inputs_embeds=torch.cat([sigma.to(tokens.dtype), tokens])[None],
            position_ids=start + position[None],
            attention_mask=sees[None, None],
            past_key_values=copy.deepcopy(past),
        ).last_hidden_state[0, length:]
        parts = zip(states.split([len(row) for row in rows]), queries, strict=True)
        return torch.cat([part[len(z) - 1 :] for part, z in parts])

    def answers(self) -> list[list[int]]:
        """All queries at once, after the context that was read once."""
        job, n = self._job, len(self._job.queries)
        past = copy.deepcopy(self._context)
        past.batch_repeat_interleave(n)
        return generate(self._model, job, range(n), past)


def generate(model: Model, job: Job, index: Sequence[int], past: Cache | None = None) -> list[list[int]]:
    """Greedy answers after the context, which ``past`` may hold already; padded in front of z."""
    shared = job.preamble + job.context
    longest = max(len(job.queries[i]) for i in index)
    pads = [longest - len(job.queries[i]) for i in index]
    pad = job.stop_ids[0]
    ids = [[*shared, *[pad] * n, *job.queries[i]] for n, i in zip(pads, index, strict=True)]
    live = [[1] * len(shared) + [0] * n + [1] * (longest - n) for n in pads]
    made = model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(live),
        past_key_values=past,
        do_sample=False,
        max_new_tokens=job.max_answer_tokens,
        eos_token_id=job.stop_ids,
        pad_token_id=pad,
    )[:, len(ids[0]) :]
    return [cut(row, job.stop_ids) for row in made.tolist()]


def cut(ids: list[int], stop_ids: list[int]) -> list[int]:
    """``ids`` up to the first stop id, included."""
    ends = [at for at, token in enumerate(ids) if token in stop_ids]
    return ids[: ends[0] + 1] if ends else ids
