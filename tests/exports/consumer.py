"""Soft prompts to export, without training; and the check in this process, where torch is loaded once."""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxsp
from jaxsp import distributions
from jaxsp.artifact import SoftPrompt, make_artifact
from jaxsp.data.documents import Query
from jaxsp.exports import check
from jaxsp.settings import make_settings
from jaxsp.teacher.problem import tokenize
from tests import tiny
from tests.conftest import CONTEXT

SLOTS = 4
WINDOW = 40
"""Sliding window of those that have one: wider than a soft prompt and a short question, not than the
context."""

QUESTION = "Hi?"
REPORT = {
    "queries": [{"query": QUESTION, "split": "held_out", "answer_full_context": "Steel and glass, 90 cm."}],
}  # fmt: skip

CONSUMERS = Path(check.__file__).parent / "consumers"
HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "peft"))


@functools.cache
def model(family: str) -> jaxsp.LanguageModel:
    """A tiny model."""
    windows: dict[str, Any] = (
        {"sliding_window": WINDOW} if family in ("gemma2", "gemma3_text", "mistral") else {}
    )
    folder = Path(tempfile.mkdtemp(prefix="jaxsp-export-"), family)
    return jaxsp.load_model(tiny.write(folder, model_type=family, **windows), dtype="float32")


@functools.cache
def prompt(family: str, kind: str, bias: bool = False, context: str = CONTEXT) -> SoftPrompt:
    """A soft prompt for it that starts as the context's first tokens; with biases, if it is to have any."""
    return make_prompt(model(family), kind, bias, context)


def make_prompt(
    own: jaxsp.LanguageModel, kind: str, bias: bool = False, context: str = CONTEXT
) -> SoftPrompt:
    """The same for any model."""
    settings = make_settings({"prompt_length": SLOTS, "kind": kind})
    job = tokenize(own, context, [Query(QUESTION)], [], settings)
    preamble = distributions.context_prefix(own.params, own.config, job.preamble_ids[None])
    sigma = distributions.initial_prompt(
        own.params, own.config, job.context_ids, preamble, key=jax.random.key(0), prompt_length=SLOTS,
        initial="first", kind=kind,
    )  # fmt: skip
    sigma: dict[str, Any] = jax.tree.map(np.asarray, dict(sigma))
    if bias and "bias" in sigma:
        random = np.random.RandomState(0).standard_normal(sigma["bias"].shape)
        sigma["bias"] = sigma["bias"] + random.astype(np.float32)
    return make_artifact(own, job, settings, sigma, context, steps=0)


@functools.cache
def script(folder: Path, name: str) -> Any:
    """A Python file."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if folder != CONSUMERS:
        sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def read_here(to: str, folder: Path, directory: Path, expected: Path) -> dict[str, Any]:
    """In place of the check's own process."""
    return script(CONSUMERS, "check").main(to, str(folder), str(directory), str(expected))
