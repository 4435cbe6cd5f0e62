"""The teacher's signals: one file each, one line each in ``SIGNALS``, by the names in ``Objective.needs``.

A signal is a function ``at_positions(params, config, prefix, rows) -> target``: what the teacher, reading
``rows`` after the context's ``prefix``, says at their answer positions: an array ``[B, A, ...]`` or a tuple
of such. It becomes ``rows.targets[name]``. The answer's tokens are there from the start.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxsp.data.examples import Rows
from jaxsp.models.config import DecoderConfig
from jaxsp.teacher.signals import hidden
from jaxsp.typing import KeyValues, Params, PyTree

Signal = Callable[[Params, DecoderConfig, KeyValues, Rows], PyTree]

SIGNALS: dict[str, Signal] = {"hidden": hidden.at_positions}
