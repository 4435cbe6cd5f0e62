"""The teacher's targets, computed in packed batches and kept on disk, so that a resumed run reads what it was
started with.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from jaxsp.data.examples import Rows
from jaxsp.data.packing import Packing
from jaxsp.files import atomic_write
from jaxsp.models.config import DecoderConfig
from jaxsp.models.language_model import LanguageModel
from jaxsp.teacher.signals import SIGNALS
from jaxsp.typing import KeyValues, Params, PyTree, UserError

_TARGET = "targets/"


@functools.partial(jax.jit, static_argnames=("config", "name"))
def _signal(params: Params, config: DecoderConfig, prefix: KeyValues, rows: Rows, name: str) -> PyTree:
    return SIGNALS[name](params, config, prefix, rows)


def compute(model: LanguageModel, prefix: KeyValues, rows: Rows, packing: Packing, name: str) -> PyTree:
    """One signal at every answer position of ``rows``, ``[N, A, ...]`` on the host.

    Args:
      model: the teacher.
      prefix: prefix of the context.
      rows: one sequence each.
      packing: shape of the batches they are read in.
      name: a key of ``SIGNALS``.
    """
    batches = packing.in_order(rows)
    parts = [
        _signal(model.params, model.config, prefix, packing.pack(rows, index), name) for index in batches
    ]
    return jax.tree.map(lambda *leaves: packing.unpack(leaves, rows, batches), *parts)


def write(file: Path, rows: Rows, answers: Sequence[Sequence[int]]) -> None:
    """Keeps the rows with their targets, and the teacher's own answers; whole or not at all."""
    arrays = {name: array for name, array in vars(rows).items() if name not in ("targets", "segment_ids")}
    for name, target in rows.targets.items():
        arrays |= {f"{_TARGET}{name}/{i}": array for i, array in enumerate(jax.tree.leaves(target))}
    arrays["answer_lengths"] = np.array([len(answer) for answer in answers], np.int32)
    arrays["answer_ids"] = np.array([i for answer in answers for i in answer], np.int32)
    atomic_write(file, save({name: np.ascontiguousarray(a) for name, a in arrays.items()}))


def read(file: Path) -> tuple[Rows, list[list[int]]]:
    """The rows and answers that ``write`` kept.

    Raises:
      UserError: the file is damaged.
    """
    try:
        arrays = load_file(file)
        ends = np.cumsum(arrays.pop("answer_lengths"))
        answers = [part.tolist() for part in np.split(arrays.pop("answer_ids"), ends)[:-1]]
        found: dict[str, list[np.ndarray]] = {}
        for name in sorted(name for name in arrays if name.startswith(_TARGET)):
            found.setdefault(name.split("/")[1], []).append(arrays.pop(name))
        targets = {n: tuple(some) if len(some) > 1 else some[0] for n, some in found.items()}
        return Rows(**arrays, targets=targets), answers
    except (SafetensorError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}); start anew with --overwrite.") from error
