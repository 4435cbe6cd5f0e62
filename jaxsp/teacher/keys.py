"""The keys of what is kept: equal where all that decides it is."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from jaxsp.models.language_model import LanguageModel
from jaxsp.settings import TeacherSettings, plain
from jaxsp.teacher.signals import Wanted
from jaxsp.teacher.store import VERSION

if TYPE_CHECKING:
    from jaxsp.teacher.problem import TokenizedJob


def teacher_key(model: LanguageModel, job: TokenizedJob, settings: TeacherSettings) -> str:
    """Equal where the teacher says the same: of the model and where it stops, the texts, all of its settings.

    Devices are no part of it: they differ in rounding alone.
    """
    # As bytes: written as numbers, those of a long document would take a hundred times the room.
    texts = job.preamble_ids.tolist(), job.context_ids.tobytes(), job.query_ids, job.given_ids
    parts = [part.ids.tobytes() for part in job.parts], job.part_of.tolist(), job.found.tolist()
    asked = [dataclasses.astuple(query) for query in job.queries]
    return digest((*identity(model), *texts, *parts, asked, plain(settings)))


def said_key(usual: str, job: TokenizedJob, wanted: Wanted) -> str:
    """The same, also of the signals that are wanted of it and of which queries are to train on.

    Where all rows have the last hidden states, that is the ``teacher_key``, which is ``usual``.
    """
    return usual if wanted.is_usual else digest((usual, wanted, job.is_train.tolist()))


def identity(model: LanguageModel) -> tuple[Any, ...]:
    """Everything that decides what a model says, and how that is kept."""
    return VERSION, model.fingerprint, dataclasses.astuple(model.config), model.stop_ids


def digest(value: Any) -> str:
    """A short text, equal for values that are written alike."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
