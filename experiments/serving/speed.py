"""Tokens a second and seconds to the first token: σ, the document cached, the document read; and torch."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jaxsp
from experiments import random_llama
from experiments.decoder_speed.experiment import has_torch
from experiments.serving.client import Load, load
from experiments.serving.prompts import compressed, read
from experiments.suite import KeptRows, Run, commit
from jaxsp.artifact import make_artifact
from jaxsp.data.documents import as_queries
from jaxsp.evaluation.report import report_header
from jaxsp.settings import make_settings
from jaxsp.teacher.problem import tokenize

USERS = (1, 8, 32)
REQUESTS = {1: 6, 8: 16, 32: 48}
"""Requests of a turn, by the number of users."""

TURNS = 3
"""Turns that count; all sides take turns, and one before them, a request a user, compiles and warms up."""

MOST_TOKENS = 32

CONTEXTS = {"sigma": "σ", "cached": "document, cached", "read": "document, read for each request"}
"""The forms that the document has in front of a question."""

SMALL_CONTEXT = "The tank holds 1.2 litres. The cable is 90 cm long. The lid is made of steel and of glass."
SMALL_QUERIES = [f"What is fact {n}?" for n in range(4)]

Kept = Sequence[Mapping[str, Any]]
"""Loads of an earlier run, as ``turns`` gives them."""

Measure = Callable[[str, Sequence[str], int], Load]
"""A function from one of ``CONTEXTS``, questions and a number of users to the load."""


class Sizes(NamedTuple):
    """The size of a run."""

    users: tuple[int, ...]
    requests: dict[int, int]
    turns: int
    max_tokens: int
    query_tokens: int


FULL = Sizes(USERS, REQUESTS, TURNS, MOST_TOKENS, 512)
SMALL = Sizes((1, 2), {1: 2, 2: 4}, 1, 8, 200)


def measure(run: Run) -> dict[str, Any]:
    """All sides in turns, on the demo's manual and its questions; a small run is of a random model.

    Each load is kept as it is measured: after a stop a run of the same code goes on with those that are left.
    """
    sizes, kept = FULL if run.full else SMALL, KeptRows("serving", "speed", run)
    loads = [row for row in kept.rows if "turn" in row and row["commit"] == commit()]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        model, questions, context, folder = _compressed(kept.folder, run.full)
        sides: dict[str, Measure] = {}
        url = stack.enter_context(serving(folder, model, sizes))
        sides["jaxsp"] = _asked_of(url, folder.name, context, sizes)
        versions = None
        if has_torch(run.torch_python):
            job = _job(model, context, sizes)
            torch = stack.enter_context(_torch(run.torch_python, Path(scratch) / "job.json", job))
            versions = torch.versions
            sides["torch"] = _asked_of_torch(torch, model)
        for one in turns(sides, questions, sizes, list(loads)):
            kept.add(one)
            loads.append(one)
        header = report_header(model, jaxsp.SoftPrompt.load(folder))
        return {
            "model": model.name,
            "dtype": model.config.dtype,
            **{key: header[key] for key in ("context_tokens", "prompt_length", "prefix_bytes")},
            "file_bytes": (folder / "prompt.safetensors").stat().st_size,
            "slots": max(sizes.users),
            "max_tokens": sizes.max_tokens,
            "rows": medians(loads),
            "torch": versions,
        }


def turns(
    sides: Mapping[str, Measure], questions: Sequence[str], sizes: Sizes, done: Kept = ()
) -> Iterator[dict[str, Any]]:
    """The loads of all sides in turns, as they are measured; one before them, which warms up, does not count.

    Args:
      sides: by name.
      questions: messages; each turn has others, the same for all sides, and begins again after the last.
      sizes: of the run.
      done: loads that an earlier run has measured.
    """
    there = {tuple(row[key] for key in ("side", "context", "users", "turn")) for row in done}
    for users in sizes.users:
        for turn in range(sizes.turns + 1):
            first, count = turn * sizes.requests[users], sizes.requests[users] if turn else users
            some = list(itertools.islice(itertools.cycle(questions), first, first + count))
            counting = [turn] if turn else range(1, sizes.turns + 1)
            for side, ask in sides.items():
                for context in CONTEXTS:
                    left = [n for n in counting if (side, context, users, n) not in there]
                    if not left or (side == "torch" and context == "sigma"):
                        continue
                    one = ask(context, some, users)
                    if turn:
                        yield {"side": side, "context": context, "users": users, "turn": turn, **vars(one)}
                        _say(f"{side}, {context}, {users}: {sum(one.tokens) / one.seconds:.1f} tokens/s")


def medians(loads: Kept) -> list[dict[str, Any]]:
    """A row for each side, form of the document and number of users: the medians of its turns.

    Args:
      loads: of ``turns``.
    """
    found: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for one in loads:
        found.setdefault((one["side"], one["context"], one["users"]), []).append(one)
    rows = []
    for (side, context, users), own in found.items():
        rates = [sum(one["tokens"]) / one["seconds"] for one in own]
        firsts = itertools.chain.from_iterable(one["first_token_seconds"] for one in own)
        tokens = list(itertools.chain.from_iterable(one["tokens"] for one in own))
        rows.append(
            {
                "side": side,
                "context": context,
                "users": users,
                "requests": len(tokens),
                "tokens_per_second": statistics.median(rates),
                "tokens_per_second_of_turns": rates,
                "first_token_seconds": statistics.median(firsts),
                "answer_tokens": statistics.mean(tokens),
            }
        )
    return sorted(rows, key=lambda row: row["users"])


def _compressed(folder: Path, full: bool) -> tuple[jaxsp.LanguageModel, list[str], str, Path]:
    """The model of the soft prompt, the questions to ask, the document, and the soft prompt's folder."""
    if full:
        model = jaxsp.load_model()
        context, train, held_out = read("demo")
        compressed(model, "demo", folder, full)
        return model, [query.text for query in (*train, *held_out)], context, folder / "demo"
    model = jaxsp.load_model(random_llama.write(folder / "model"), dtype="float32")
    settings = make_settings({"prompt_length": 4, "kind": "embedding"})
    job = tokenize(model, SMALL_CONTEXT, as_queries(SMALL_QUERIES[:1]), [], settings)
    sigma = {"embeddings": np.asarray(model.embed(job.context_ids[:4]))}
    make_artifact(model, job, settings, sigma, SMALL_CONTEXT, steps=0).save(folder / "demo")
    return model, SMALL_QUERIES, SMALL_CONTEXT, folder / "demo"


@contextlib.contextmanager
def serving(folder: Path, model: jaxsp.LanguageModel, sizes: Sizes) -> Iterator[str]:
    """The address of a server in a process of its own, with a slot for each user."""
    words = ["serve", str(folder), "--port", "0", "--slots", str(max(sizes.users)), "--model", model.name]
    words += ["--max-query-tokens", str(sizes.query_tokens), "--max-answer-tokens", str(sizes.max_tokens)]
    command = [sys.executable, "-m", "experiments.serving.server", *words, "--dtype", model.config.dtype]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        line = process.stdout.readline()
        found = re.search(r" at (\S+) ", line)
        if found is None:
            raise jaxsp.UserError("The server has not started; its own message stands above.")
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def _asked_of(url: str, prompt: str, context: str, sizes: Sizes) -> Measure:
    def measured(form: str, questions: Sequence[str], users: int) -> Load:
        name = {"sigma": prompt, "cached": f"{prompt}:document", "read": f"{prompt}:nothing"}[form]
        texts = [f"{context}\n\n{question}" if form == "read" else question for question in questions]
        return load(url, name, texts, users, sizes.max_tokens)

    return measured


class _Torch:
    """Hugging Face's model, in a process of its own that waits between its turns."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.versions = self._answer()

    def batch(self, kind: str, queries: list[list[int]]) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps([kind, queries]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise jaxsp.UserError("The side in torch ended early; its own message stands above.")
        return json.loads(line)


@contextlib.contextmanager
def _torch(python: str, file: Path, job: dict[str, Any]) -> Iterator[_Torch]:
    file.write_text(json.dumps(job), "utf-8")
    command = [python, "-m", "experiments.serving.torch_side", str(file)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield _Torch(process)
    finally:
        assert process.stdin
        process.stdin.close()
        process.wait()


def _job(model: jaxsp.LanguageModel, context: str, sizes: Sizes) -> dict[str, Any]:
    """The part of the requests that all of them share."""
    return {
        "model": str(model.directory),
        "dtype": model.config.dtype,
        "shared": [*model.preamble_ids.tolist(), *model.encode_context(context).tolist()],
        "stop_ids": list(model.stop_ids),
        "max_tokens": sizes.max_tokens,
    }


def _asked_of_torch(torch: _Torch, model: jaxsp.LanguageModel) -> Measure:
    """A batch of as many requests as there are users; the next one begins when all of it have ended."""

    def measured(form: str, questions: Sequence[str], users: int) -> Load:
        queries = [model.encode_query(question).tolist() for question in questions]
        seconds, first, tokens = 0.0, list[float](), list[int]()
        for start in range(0, len(queries), users):
            found = torch.batch(form, queries[start : start + users])
            seconds += found["seconds"]
            first += [found["first"]] * len(found["tokens"])
            tokens += found["tokens"]
        return Load(seconds, first, tokens)

    return measured


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
