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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jaxsp
from experiments import random_llama
from experiments.decoder_speed.experiment import has_torch
from experiments.serving.client import Load, load
from experiments.suite import DEMO, Run
from jaxsp import demo
from jaxsp.artifact import make_artifact
from jaxsp.data.documents import as_queries
from jaxsp.evaluation.report import report_header
from jaxsp.settings import make_settings
from jaxsp.teacher.problem import tokenize

USERS = (1, 8, 32)
REQUESTS = {1: 16, 8: 48, 32: 96}
"""Requests of a turn, by the number of users."""

TURNS = 3
"""Turns that count; what differs takes turns, and one before them compiles and warms up."""

MOST_TOKENS = 32

CONTEXTS = {"sigma": "σ", "cached": "document, cached", "read": "document, read for each request"}
"""The forms that the document has in front of a question."""

SMALL_CONTEXT = "The tank holds 1.2 litres. The cable is 90 cm long. The lid is made of steel and of glass."
SMALL_QUERIES = [f"What is fact {n}?" for n in range(4)]

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
    """All sides in turns, on the demo's manual and its questions; a small run is of a random model."""
    sizes = FULL if run.full else SMALL
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        directory = Path(folder)
        model, questions, context = _compressed(directory, run.full)
        sides: dict[str, Measure] = {}
        url = stack.enter_context(serving(directory / "manual", model, sizes))
        sides["jaxsp"] = _asked_of(url, context, sizes)
        versions = None
        if has_torch(run.torch_python):
            job = _job(model, context, sizes)
            torch = stack.enter_context(_torch(run.torch_python, directory / "job.json", job))
            versions = torch.versions
            sides["torch"] = _asked_of_torch(torch, model)
        header = report_header(model, jaxsp.SoftPrompt.load(directory / "manual"))
        return {
            "model": model.name,
            "dtype": model.config.dtype,
            **{key: header[key] for key in ("context_tokens", "prompt_length", "prefix_bytes")},
            "file_bytes": (directory / "manual" / "prompt.safetensors").stat().st_size,
            "slots": max(sizes.users),
            "max_tokens": sizes.max_tokens,
            "rows": list(rows(sides, questions, sizes)),
            "torch": versions,
        }


def rows(sides: dict[str, Measure], questions: Sequence[str], sizes: Sizes) -> Iterator[dict[str, Any]]:
    """A row for each side, form of the document and number of users: the medians of the turns."""
    found: dict[tuple[str, str, int], list[Load]] = {}
    for users in sizes.users:
        for turn in range(sizes.turns + 1):
            # Other questions each turn, the same for all; more requests than questions ask them again.
            first = turn * sizes.requests[users]
            asked = itertools.islice(itertools.cycle(questions), first, first + sizes.requests[users])
            some = list(asked)
            for side, ask in sides.items():
                for context in CONTEXTS:
                    if side == "torch" and context == "sigma":
                        continue
                    one = ask(context, some, users)
                    if turn:
                        found.setdefault((side, context, users), []).append(one)
                        _say(f"{side}, {context}, {users}: {sum(one.tokens) / one.seconds:.1f} tokens/s")
    for (side, context, users), loads in found.items():
        yield {
            "side": side,
            "context": context,
            "users": users,
            "requests": sizes.requests[users],
            "tokens_per_second": statistics.median(sum(one.tokens) / one.seconds for one in loads),
            "first_token_seconds": statistics.median(
                itertools.chain.from_iterable(one.first_token_seconds for one in loads)
            ),
            "answer_tokens": statistics.mean(itertools.chain.from_iterable(one.tokens for one in loads)),
        }


def _compressed(directory: Path, full: bool) -> tuple[jaxsp.LanguageModel, list[str], str]:
    """Writes the soft prompt; gives its model, the questions to ask and the document."""
    if full:
        model = jaxsp.load_model()
        context, train, held_out = demo.read()
        jaxsp.compress(model, context, train, held_out=held_out, out=directory / "manual", **DEMO)
        return model, [query.text for query in (*train, *held_out)], context
    model = jaxsp.load_model(random_llama.write(directory / "model"), dtype="float32")
    settings = make_settings({"prompt_length": 4, "kind": "embedding"})
    job = tokenize(model, SMALL_CONTEXT, as_queries(SMALL_QUERIES[:1]), [], settings)
    sigma = {"embeddings": np.asarray(model.embed(job.context_ids[:4]))}
    make_artifact(model, job, settings, sigma, SMALL_CONTEXT, steps=0).save(directory / "manual")
    return model, SMALL_QUERIES, SMALL_CONTEXT


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


def _asked_of(url: str, context: str, sizes: Sizes) -> Measure:
    def measured(form: str, questions: Sequence[str], users: int) -> Load:
        name = {"sigma": "manual", "cached": "manual:document", "read": "manual:nothing"}[form]
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
