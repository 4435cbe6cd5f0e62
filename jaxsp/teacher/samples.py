"""More answers of the teacher to each training query, sampled: σ is to know all that it may say."""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxsp import processes
from jaxsp.files import read_json
from jaxsp.losses import as_objective
from jaxsp.models.language_model import LanguageModel
from jaxsp.progress import Display
from jaxsp.settings import Settings, TeacherSettings
from jaxsp.teacher.answers import answer_ids
from jaxsp.teacher.problem import Problem, TokenizedJob, digest, read_part, run_teacher, teacher_key
from jaxsp.teacher.signals import Wanted
from jaxsp.teacher.store import Store, about
from jaxsp.typing import AnyArray, Array, KeyValues, UserError

_DRAW = 3
"""Folded into the run's key: these draws are their own."""

_FORM = "sampled"
"""The form of such a query, as the document's own have theirs: nobody compares it with the greedy answer."""


_FILE = "samples.json"


def count(settings: TeacherSettings) -> int:
    """The sampled answers to a training query, beside the greedy one.

    Raises:
      UserError: it is neither ``greedy`` nor ``sampled:N``.

    Example:
      >>> count(TeacherSettings()), count(TeacherSettings(answers="sampled:4"))
      (0, 3)
    """
    if settings.answers == "greedy":
        return 0
    found = re.fullmatch(r"sampled:(\d{1,4})", settings.answers)
    if found is None or int(found[1]) < 2:
        raise UserError(f"--answers must be greedy or sampled:N, N from 2 to 9999, not {settings.answers!r}.")
    return int(found[1]) - 1


def sample(
    model: LanguageModel,
    job: TokenizedJob,
    settings: Settings,
    preamble: KeyValues,
    display: Display,
    store: Store,
    *,
    vocab_size: int,
) -> tuple[list[int], Problem] | None:
    """Sampled answers, and what the teacher says there; ``None`` if the settings ask for none.

    An answer depends on its query's text, its number among that query's and the seed, not on the other
    queries or on the process that made it. A query with an answer given has no other.

    Args:
      model: the teacher.
      job: the queries as it reads them.
      settings: settings of the compression.
      preamble: prefix before the context.
      display: shows that it goes on.
      store: where they are kept.
      vocab_size: number of ids that the student has, too; an answer with another one is left out.

    Returns:
      The query's number in ``job`` of each answer, and the problem of these queries with these answers.

    Raises:
      UserError: the run's own entry of them is damaged.
    """
    several = count(settings.teacher)
    numbers = [i for i in np.flatnonzero(job.is_train).tolist() if job.given_ids[i] is None]
    if not several or not numbers:
        return None
    asked = [(number, sample) for number in numbers for sample in range(several)]
    chosen = settings.training.seed, numbers, teacher_key(model, job, settings.teacher)
    key = digest(chosen)
    tokens = min(model.config.vocab_size, vocab_size)
    wanted = Wanted.by(as_objective(settings.training.objective, by_gradient=False), tokens)
    if (answers := store.read(key, _read, "Sampled answers")) is None:
        with display.phase("answers", f"Sampled answers to {len(numbers)} queries"):
            own = [asked[i] for i in processes.strided_shard(len(asked))]
            answers = processes.gather_strided(_answers(model, job, own, settings, preamble), len(asked))
        if processes.is_first():
            text, tokens = job.parts[0].text, len(job.context_ids)
            shown = about("samples", model.name, text, len(numbers), tokens=tokens)
            store.write(key, shown, lambda folder: _write(folder, answers or []), _read)
    pairs = zip(asked, answers, strict=True)
    kept = [(number, ids) for (number, _), ids in pairs if max(ids) < vocab_size]
    if not kept:
        return None
    index = [number for number, _ in kept]
    taken = job.take(index)
    queries = [dataclasses.replace(query, seed=_FORM) for query in taken.queries]
    taken = dataclasses.replace(taken, queries=queries, given_ids=[ids for _, ids in kept])
    with display.phase("signals", "Teacher's distributions on them"):
        quiet = Display(visible=False)
        return index, run_teacher(model, taken, settings.teacher, preamble, quiet, store, wanted)


def _write(folder: Path, answers: list[list[int]]) -> None:
    (folder / _FILE).write_text(json.dumps(answers))


def _read(folder: Path) -> list[list[int]]:
    return read_json(folder / _FILE, list)


def _answers(
    model: LanguageModel,
    job: TokenizedJob,
    asked: Sequence[tuple[int, int]],
    settings: Settings,
    preamble: KeyValues,
) -> list[list[int]]:
    """An answer for each number of a query with that of a sample."""
    key = jax.random.fold_in(jax.random.key(settings.training.seed), _DRAW)
    found: dict[int, list[int]] = {}
    for part in range(len(job.parts)):
        some = [i for i, (number, _) in enumerate(asked) if job.part_of[number] == part]
        if not some:
            continue
        numbers, samples = zip(*(asked[i] for i in some), strict=True)
        texts = [zlib.crc32(job.queries[number].text.encode()) for number in numbers]
        answered = answer_ids(
            model,
            read_part(model, job, part, preamble),
            [job.query_ids[number] for number in numbers],
            max_tokens=settings.teacher.max_answer_tokens,
            keys=_keys(key, np.array(texts, np.uint32), np.array(samples, np.uint32)),
        )
        found |= zip(some, answered, strict=True)
    return [found[i] for i in range(len(asked))]


@jax.jit
def _keys(key: Array, texts: AnyArray, samples: AnyArray) -> Array:
    """A key for each pair of a text's and a sample's number, uint32 ``[n]``."""
    fold = jax.random.fold_in
    return jax.vmap(lambda text, sample: fold(fold(key, text), sample))(texts, samples)
