"""An export measured in its consumer: the distributions there against jaxsp's own, in float32."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsp import distributions
from jaxsp.artifact import SoftPrompt
from jaxsp.data.examples import Rows, make_rows
from jaxsp.exports.prefix import Held
from jaxsp.exports.question import ORDINARY
from jaxsp.files import parse_json
from jaxsp.models import decoder
from jaxsp.models.config import DecoderConfig
from jaxsp.models.language_model import LanguageModel
from jaxsp.typing import Array, KeyValues, Params, UserError

LARGEST_KL = 1e-5
"""Nats a token: an export with more is refused. Rounding in float32 gives a thousandth of it; a mask that is
wrong for the tokens before the prompt alone, a hundred times as much."""

MOST_ROWS, MOST_ANSWER = 8, 32
"""Questions that are measured on, and tokens of an answer to each, at most."""

_WORDS = 12
"""Words of the context that stand for a question, and for its answer, where no queries are known."""

_SCRIPT = Path(__file__).parent / "consumers" / "check.py"

Row = tuple[str, str]
"""A question and an answer."""


def rows_of(prompt: SoftPrompt, report: dict[str, Any] | None) -> list[Row]:
    """The questions to measure on: the report's held-out queries, else pieces of the context.

    Args:
      prompt: the soft prompt.
      report: the run's ``report.json``, if it is known.
    """
    queries = [q for q in (report or {}).get("queries", []) if q.get("split") == "held_out"]
    found = [(q["query"], q.get("answer_full_context") or "Yes.") for q in queries]
    if not found:
        words = (prompt.context or "").split()
        pieces = [" ".join(words[i : i + _WORDS]) for i in range(0, len(words), _WORDS)]
        found = list(zip(pieces[::2], pieces[1::2], strict=False)) or [(text, "Yes.") for text in ORDINARY]
    return found[:MOST_ROWS]


def measure(
    held: Held, to: str, folder: Path, rows: Sequence[Row], weights: Callable[[LanguageModel, Path], Path]
) -> dict[str, Any]:
    """The largest difference of a logit, and the mean KL from jaxsp's distributions to the consumer's.

    Args:
      held: the soft prompt.
      to: the format.
      folder: the export.
      rows: from ``rows_of``.
      weights: that of the format, as ``Export.weights``.

    Returns:
      ``kl``, ``logit_difference`` and ``queries``; in place of the first two ``missing``, a package that is
      not there.

    Raises:
      UserError: the consumer fails.
    """
    model, chat = held.model, held.prompt.chat
    asked = [model.encode_query(query, chat).tolist() for query, _ in rows]
    answers = [model.with_chat(chat).encode_answer(answer)[:MOST_ANSWER].tolist() for _, answer in rows]
    made, prefix = make_rows(asked, answers), held.prompt.prefix(model)
    before = np.array(held.prompt.manifest["slots"]["before_ids"], np.int64)
    content: dict[str, Any] = {"before": before}
    for i, ((query, _), z, y) in enumerate(zip(rows, asked, answers, strict=True)):
        logits = _logits(model.params, model.config, prefix, made.take([i]))[0, : len(y)]
        own = {"query": query, "ids": [*z, *y[:-1]], "first": len(z) - 1, "logits": logits}
        content |= {f"{name}_{i}": np.asarray(value) for name, value in own.items()}
    with tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch, "expected.npz")
        np.savez(expected, **content)
        found = _read_there(to, folder, weights(model, Path(scratch)), expected)
    return {**found, "queries": len(rows)}


@functools.partial(jax.jit, static_argnames="config")
def _logits(params: Params, config: DecoderConfig, prefix: KeyValues, rows: Rows) -> Array:
    return decoder.unembed(params, config, distributions.answer_hidden(params, config, prefix, rows))


def _read_there(to: str, folder: Path, model: Path, expected: Path) -> dict[str, Any]:
    # -P: the scripts beside it are not the packages that have their names.
    command = [sys.executable, "-P", _SCRIPT, to, folder, model, expected]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, encoding="utf-8", errors="replace",
        check=False, env=environment,
    )  # fmt: skip
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2] or f"it ended with code {done.returncode}"
        raise UserError(f"The export can't be read in its consumer: {reason:.300}; nothing was written.")
    return parse_json(done.stdout.strip().rpartition("\n")[2], "The consumer's answer")
