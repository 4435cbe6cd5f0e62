"""Training queries that a document itself gives: drafted, written, answered, filtered, chosen to cover it."""

from __future__ import annotations

import collections
import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxsp.data.documents import Query, as_queries
from jaxsp.evaluation.facts import stands_in
from jaxsp.evaluation.metrics import at_positions
from jaxsp.files import atomic_write
from jaxsp.models.language_model import LanguageModel
from jaxsp.progress import Display
from jaxsp.settings import Settings, plain
from jaxsp.study.coverage import candidates, covered
from jaxsp.study.filters import MATTERS, Seen, is_answer, is_sane
from jaxsp.study.seeds import SEEDS
from jaxsp.study.text import Document
from jaxsp.study.writing import completed
from jaxsp.teacher.problem import SAMPLE, Problem, digest, read_preamble, run_teacher, tokenize
from jaxsp.typing import KeyValues, UserError

A_SENTENCE = 4
"""Queries to train on for each sentence of the document, where the user gives none and asks for no number."""

HELD_OUT, MOST_HELD_OUT = 0.2, 16
"""Part of the questions to measure on, and their number at most, where the user gives none."""


@dataclasses.dataclass(frozen=True)
class Study:
    """The queries of a document, and how much of it they ask for.

    Attributes:
      train: queries to train on, the user's own first.
      held_out: queries to measure on.
      drafted: the number of queries that each seed gave before filtering.
      sentences: the document's sentences.
      asked: numbers of the sentences that the training queries depend on.
    """

    train: list[Query]
    held_out: list[Query]
    drafted: dict[str, int]
    sentences: list[str]
    asked: list[int]

    @property
    def uncovered(self) -> list[str]:
        """The sentences that no training query depends on."""
        asked = set(self.asked)
        return [text for i, text in enumerate(self.sentences) if i not in asked]

    def summary(self) -> dict[str, Any]:
        """The report's part: what each seed gave, and what of the document is asked for."""
        kept = collections.Counter(query.seed for query in [*self.train, *self.held_out] if query.seed)
        return {
            "seeds": {name: {"drafted": n, "kept": kept[name]} for name, n in self.drafted.items()},
            "given": sum(not query.seed for query in self.train),
            "sentences": self.sentences,
            "asked": self.asked,
            "coverage": len(self.asked) / len(self.sentences),
        }

    def as_json(self) -> dict[str, Any]:
        """The study as JSON carries it."""
        queries = {part: [query.as_row() for query in getattr(self, part)] for part in ("train", "held_out")}
        return {**vars(self), **queries}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Study:
        """The study that ``as_json`` gave."""
        return cls(**{**found, **{part: as_queries(found[part]) for part in ("train", "held_out")}})

    def write(self, file: Path) -> None:
        """Keeps the study."""
        atomic_write(file, json.dumps(self.as_json(), ensure_ascii=False))

    @classmethod
    def read(cls, file: Path) -> Study:
        """The study that ``write`` kept.

        Raises:
          UserError: the file is damaged.
        """
        try:
            return cls.from_json(json.loads(file.read_text("utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}); start anew with --overwrite.") from error


def study_key(
    model: LanguageModel, context: str, given: Sequence[Query], held_out: Sequence[Query], settings: Settings
) -> str:
    """Equal where a study gives the same queries."""
    texts = [[dataclasses.astuple(query) for query in part] for part in (given, held_out)]
    chosen = plain(settings.study), plain(settings.teacher), settings.training.seed
    return digest((model.fingerprint, model.config.dtype, context, texts, chosen))


@dataclasses.dataclass(frozen=True)
class _Candidate:
    query: Query
    about: tuple[int, ...]
    """Numbers of the sentences that it may depend on."""


def study(
    model: LanguageModel,
    context: str,
    given: Sequence[Query],
    held_out: Sequence[Query],
    settings: Settings,
    display: Display,
    *,
    measure: bool = True,
) -> tuple[Study, Problem]:
    """Makes the queries that a document lacks, and has the teacher answer all.

    Args:
      model: writes the queries, and answers them with the document before it.
      context: the document.
      given: the user's own queries to train on; there may be none.
      held_out: those to measure on.
      settings: settings of the compression.
      display: shows what goes on.
      measure: hold out some of the questions made, if none is given to measure on.

    Returns:
      The study, and the problem of its queries.

    Raises:
      UserError: the document has no sentence, or nothing that was made from it is fit to train on.
    """
    preamble = read_preamble(model)
    document = Document.of(context, lambda text: len(model.encode_context(text)))
    if not document.sentences:
        raise UserError("The document has no sentence to ask about; give questions with --queries.")
    cut = tokenize(model, context, [*given, SAMPLE], held_out, settings)
    longest = max(len(part.ids) for part in cut.parts)
    with display.phase("questions", "Questions from the document") as note:
        made, drafted = _drafted(model, document, preamble, [*given, *held_out], longest, settings, note)
    own = len(given)
    queries = [*given, *(candidate.query for candidate in made)]
    job = tokenize(model, context, queries, held_out, settings)
    problem = run_teacher(model, job, settings.teacher, preamble, display)
    with display.phase("coverage", "What the document decides"):
        fit = _fit(model, problem, range(own, len(queries)))
        # A query made from a sentence asks for it; of the user's own it is seen by taking sentences away.
        depends = {i: set(made[i - own].about) for i in fit}
        if own:
            about = [
                [
                    sentence
                    for sentence in candidates(document, queries[i].text, _answer(model, problem, i))
                    if problem.job.part(i).shared(document.span([sentence]))
                ]
                for i in range(own)
            ]
            found = covered(model, document, problem.take(range(own)), about)
            depends = dict(enumerate(found)) | depends
    last = [*range(len(queries), len(queries) + len(held_out))]
    if measure and not last and depends:
        last = _to_measure(depends, queries, own, settings)
        depends = {i: some for i, some in depends.items() if i not in set(last)}
    chosen = _chosen(depends, queries, own, len(document.sentences), settings)
    if not chosen or (measure and not last):
        raise UserError(_nothing(len(made)))
    asked = sorted({sentence for i in chosen for sentence in depends[i]})
    train, measured = ([problem.job.queries[i] for i in part] for part in (chosen, last))
    texts = [sentence.text for sentence in document.sentences]
    return Study(train, measured, drafted, texts, asked), problem.take([*chosen, *last], train=len(chosen))


def _nothing(made: int) -> str:
    return (
        f"Of {made} queries made from the document none is fit to train on: with it the model answers as"
        " without it, or not at all. Give questions of your own with --queries, or a larger model."
    )


def _drafted(
    model: LanguageModel,
    document: Document,
    preamble: KeyValues,
    known: Sequence[Query],
    longest: int,
    settings: Settings,
    note: Any,
) -> tuple[list[_Candidate], dict[str, int]]:
    """Sane queries of every seed, none twice; and how many each seed drafted.

    There is room for each beside the longest part of the document.
    """
    seen, texts = Seen(query.text for query in known), {query.text for query in known}
    drafts = [
        (name, draft)
        for name, seed in SEEDS.items()
        for chunk in document.chunks
        for draft in seed.drafts(document, chunk)
    ]
    count = 0

    def on_written() -> None:
        nonlocal count
        count += 1
        note(f"{count} written")

    key = jax.random.fold_in(jax.random.key(settings.training.seed), 2)
    asked = [draft for _, draft in drafts]
    written = completed(model, preamble, asked, document.text, key, on_written)
    made, most = [], settings.teacher.max_answer_tokens
    taken = len(model.preamble_ids) + longest + most
    for (name, draft), text in zip(drafts, written, strict=True):
        if text is None or text in texts or _tokens(model, draft.answer) > most:
            continue
        if draft.source:
            if not is_sane(text, document.text) or not seen.is_new(text):
                continue
            seen.add(text)
        texts.add(text)
        if taken + len(model.encode_query(text)) > model.config.window:
            continue
        span = document.span(draft.sentences)
        made.append(_Candidate(Query(text, draft.answer, seed=name, span=span), draft.sentences))
    return made, dict(collections.Counter(name for name, *_ in drafts))


def _tokens(model: LanguageModel, text: str | None) -> int:
    return 0 if text is None else len(model.encode_context(text))


def _fit(model: LanguageModel, problem: Problem, index: range) -> list[int]:
    """The queries made whose answers come from the document, and are others without it.

    Those whose answers are cut at their greatest length come last: a small model has few others.
    """
    if not index:
        return []
    rows = problem.rows.take(index)
    kl = at_positions(model, problem.preamble, rows, problem.packing, ("kl",))["kl"].sum(axis=1)
    kl /= rows.mask.sum(axis=1)

    def is_good(i: int) -> bool:
        if problem.job.given_ids[i] is not None:
            return True
        answer = _answer(model, problem, i)
        grounded = stands_in(answer, problem.job.part(i).text, problem.job.queries[i].text) is not False
        return grounded and is_answer(answer)

    def is_cut(i: int) -> bool:
        return problem.answers[i][-1] not in model.stop_ids

    fit = [i for i, own in zip(index, kl, strict=True) if own > MATTERS and is_good(i)]
    return sorted(fit, key=is_cut)


def _answer(model: LanguageModel, problem: Problem, i: int) -> str:
    tokenizer: Any = model.tokenizer  # there is one: it has encoded the context
    return str(tokenizer.decode(problem.answers[i], skip_special_tokens=True))


def _to_measure(
    depends: Mapping[int, set[int]], queries: Sequence[Query], own: int, settings: Settings
) -> list[int]:
    """Queries to hold out: of the questions that the model wrote, as those are most like a user's."""
    written = [i for i in depends if i >= own and queries[i].seed == "question"] or list(depends)
    count = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(written))))
    return sorted(random.Random(settings.training.seed).sample(written, min(count, len(written))))


def _chosen(
    depends: Mapping[int, set[int]], queries: Sequence[Query], own: int, sentences: int, settings: Settings
) -> list[int]:
    """Numbers of the queries to train on: all given, and more in turns for the sentences asked for least.

    Where the user gives queries and asks for no number of others, until each sentence is asked for.
    """
    chosen = [i for i in depends if i < own]
    times = [collections.Counter[str]() for _ in range(sentences)]  # by seed
    most = settings.study.study_queries
    enough = 1 if own and most is None else A_SENTENCE

    def choose(i: int) -> None:
        for sentence in depends[i]:
            times[sentence][queries[i].seed or "given"] += 1

    for i in chosen:
        choose(i)
    left = {
        sentence: [i for i in depends if i >= own and sentence in depends[i]] for sentence in range(sentences)
    }
    while most is None or len(chosen) - own < most:
        open_ones = [s for s, some in left.items() if some and (most or times[s].total() < enough)]
        if not open_ones:
            break
        sentence = min(open_ones, key=lambda s: times[s].total())
        seen = times[sentence]
        best = min(left[sentence], key=lambda i: (seen[queries[i].seed] + 1) / SEEDS[queries[i].seed].WEIGHT)
        chosen.append(best)
        choose(best)
        for sentence in depends[best]:
            left[sentence].remove(best)
    return chosen
