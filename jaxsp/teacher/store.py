"""The teacher's answers and signals on disk, so that a resumed run reads what it was started with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxsp.data.examples import Rows
from jaxsp.typing import UserError


@dataclasses.dataclass(frozen=True)
class TeacherData:
    """What the teacher said.

    Attributes:
      rows: training rows first, then the held-out ones, with the teacher's hidden states.
      answers: its free-running answer to each query, as token ids.
    """

    rows: Rows
    answers: list[list[int]]


def save(data: TeacherData, file: Path) -> None:
    """Writes the data, whole or not at all."""
    fields = {field.name: getattr(data.rows, field.name) for field in dataclasses.fields(Rows)}
    arrays = {name: np.ascontiguousarray(a) for name, a in fields.items() if a is not None}
    arrays["answer_lengths"] = np.array([len(answer) for answer in data.answers], np.int32)
    arrays["answer_ids"] = np.array([i for answer in data.answers for i in answer], np.int32)
    scratch = file.with_suffix(f".{jax.process_index()}.part")  # others may write the same
    save_file(arrays, scratch)
    scratch.replace(file)


def load(file: Path) -> TeacherData:
    """What ``save`` wrote.

    Raises:
      UserError: the file is damaged.
    """
    try:
        arrays = load_file(file)
        ends = np.cumsum(arrays.pop("answer_lengths"))
        answers = [part.tolist() for part in np.split(arrays.pop("answer_ids"), ends)[:-1]]
        return TeacherData(Rows(**arrays), answers)
    except (SafetensorError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}); start anew with --overwrite.") from error
