"""The soft prompts that are served and asked: of the demo's manual and of the texts of ``documents``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jaxsp
from experiments.suite import DEMO, own_document
from jaxsp import demo
from jaxsp.runs.folder import Result

DOCUMENTS = ("demo", "museum", "town", "shelter", "cabin")
COMPRESSION = 20


def read(name: str) -> tuple[str, Sequence[Any], Sequence[Any]]:
    """A document, its training queries, and the held-out ones."""
    return demo.read() if name == "demo" else own_document(name)


def compressed(model: jaxsp.LanguageModel, name: str, folder: Path, full: bool) -> Result:
    """The run of a document by the demo's settings, 20× for the others; one that is there is not done again.

    Args:
      model: the model.
      name: one of ``DOCUMENTS``.
      folder: where the runs lie, each under its name.
      full: else a few steps, with few queries.
    """
    context, queries, held_out = read(name)
    options: dict[str, Any] = dict(DEMO)
    if name != "demo":
        options["prompt_length"] = len(model.encode_context(context)) // COMPRESSION
    if not full:
        options |= {"steps": 2, "max_answer_tokens": 8}
        queries, held_out = queries[:8], held_out[:4]
    out = folder / name
    resume = (out / "run" / "settings.json").is_file()
    given: dict[str, Any] = {"held_out": held_out, "out": out, "resume": resume, "overwrite": not resume}
    return jaxsp.compress(model, context, list(queries), progress=False, **given, **options)
