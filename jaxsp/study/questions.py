"""Training queries that a document itself gives: drafted, written, answered, filtered, chosen to cover it."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxsp.data.documents import Query, as_queries
from jaxsp.data.parts import Part, check_length
from jaxsp.data.words import words
from jaxsp.errors import Damaged
from jaxsp.evaluation.facts import stands_in
from jaxsp.evaluation.metrics import at_positions
from jaxsp.files import atomic_write, read_json, sealed, unsealed
from jaxsp.models.language_model import LanguageModel
from jaxsp.progress import Display
from jaxsp.settings import Settings, plain
from jaxsp.study.coverage import candidates, covered
from jaxsp.study.filters import MATTERS, Seen, is_answer, is_sane
from jaxsp.study.seeds import SEEDS, Draft
from jaxsp.study.text import Document
from jaxsp.study.writing import completed
from jaxsp.teacher.problem import SAMPLE, Problem, digest, identity, read_preamble, run_teacher, tokenize
from jaxsp.teacher.store import Store
from jaxsp.typing import UserError

A_SENTENCE = 4
"""Queries to train on for each sentence of the document, where the user gives none and asks for no number."""

ROUNDS = 2
"""Times that the document is asked for what no query asks for yet."""

DRAFTS = 4
"""Drafts for each query that is wanted, where their number is asked for: some give none that is fit."""

HELD_OUT, MOST_HELD_OUT = 0.2, 16
"""Part of the questions to measure on, and their number at most, where the user gives none."""

VERSION = 2
"""Version of the forms of queries and of the choice between them: a study by an earlier one is not read."""

_FILE = "study.json"


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

    def write(self, folder: Path) -> None:
        """Puts the study into a folder."""
        (folder / _FILE).write_text(json.dumps(self.as_json(), ensure_ascii=False), "utf-8")

    @classmethod
    def read(cls, folder: Path) -> Study:
        """The study that ``write`` put into a folder."""
        return cls.from_json(read_json(folder / _FILE))


def study_key(
    model: LanguageModel, context: str, given: Sequence[Query], held_out: Sequence[Query], settings: Settings
) -> str:
    """Equal where a study gives the same queries."""
    texts = [[dataclasses.astuple(query) for query in part] for part in (given, held_out)]
    chosen = plain(settings.study), plain(settings.teacher), settings.training.seed
    return digest((VERSION, *identity(model), dataclasses.astuple(model.chat), context, texts, chosen))


@dataclasses.dataclass(frozen=True)
class _Candidate:
    query: Query
    draft: Draft


def study(
    model: LanguageModel,
    context: str,
    given: Sequence[Query],
    held_out: Sequence[Query],
    settings: Settings,
    display: Display,
    *,
    measure: bool = True,
    folder: Path | None = None,
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
      folder: for what is written and answered, so that a study that is interrupted goes on from there.

    Returns:
      The study, and the problem of its queries.

    Raises:
      UserError: the document is too long or has no sentence, or nothing that was made from it is fit to train
        on.
    """
    check_length(context)
    document = Document.of(context, lambda text: len(model.encode_context(text)))
    if not document.sentences:
        raise UserError("The document has no sentence to ask about; give questions with --queries.")
    parts = tokenize(model, context, [*given, SAMPLE], held_out, settings).parts
    found = _Found(model, document, parts, settings, display, folder)
    own, last = len(given), [*range(len(given), len(given) + len(held_out))]
    if not given and held_out:
        found.ask(held_out)
    if given:
        problem = found.ask([*given, *held_out])
        with display.phase("coverage", "What the questions ask for"):
            texts = zip(given, problem.answers, strict=False)  # then those held out
            about = [
                [
                    sentence
                    for sentence in candidates(document, query.text, _text(model, answer))
                    if problem.job.part(i).shared(document.span([sentence]))
                ]
                for i, (query, answer) in enumerate(texts)
            ]
            found.depends = dict(enumerate(covered(model, document, problem.take(range(own)), about)))
    seen = Seen(query.text for query in [*given, *held_out])
    most, kept_back = settings.study.study_queries, HELD_OUT if measure and not held_out else 0.0
    for number in range(ROUNDS):
        if most is not None and len(found.depends) - own >= most / (1 - kept_back):
            break
        with display.phase("questions", "Questions from the document") as note:
            made = found.drafted(seen, number, note)
        if not made:
            break
        first, problem = len(found), found.ask([candidate.query for candidate in made])
        with display.phase("signals", "What the document decides"):
            fit = _fit(model, problem, made)
        # A query made from a sentence asks for it; of the user's own it is seen by taking sentences away.
        found.depends |= {first + i: set().union(*map(document.alike, made[i].draft.sentences)) for i in fit}
    depends = found.depends
    if measure and not last and depends:
        last = _to_measure(depends, found.queries, own, settings)
        depends = {i: some for i, some in depends.items() if i not in set(last)}
    chosen = _chosen(depends, found.queries, own, len(document.sentences), settings)
    if not chosen or (measure and not last):
        raise UserError(_nothing(len(found) - own - len(held_out)))
    asked = sorted({sentence for i in chosen for sentence in depends[i]})
    train, measured = ([found.queries[i] for i in part] for part in (chosen, last))
    texts = [sentence.text for sentence in document.sentences]
    problem = Problem.joined(found.problems).take([*chosen, *last], train=len(chosen))
    return Study(train, measured, dict(found.counts), texts, asked), problem


class _Found:
    """The queries asked so far, with what the teacher said, and the sentences that they depend on."""

    def __init__(
        self,
        model: LanguageModel,
        document: Document,
        parts: list[Part],
        settings: Settings,
        display: Display,
        folder: Path | None,
    ) -> None:
        self.model, self.document, self.parts, self.folder = model, document, parts, folder
        self.preamble = read_preamble(model)
        self.settings, self.display = settings, display
        self.problems: list[Problem] = []
        self.depends: dict[int, set[int]] = {}
        self.counts = collections.Counter[str]()
        """Queries drafted, by seed."""
        self.drafts = set[Draft]()
        """Those complete as they were drafted: in another round they would be the same."""

    def __len__(self) -> int:
        return sum(len(problem.answers) for problem in self.problems)

    @property
    def queries(self) -> list[Query]:
        return [query for problem in self.problems for query in problem.job.queries]

    def ask(self, queries: Sequence[Query]) -> Problem:
        """More queries, which the teacher answers."""
        job = tokenize(self.model, self.document.text, queries, [], self.settings, self.parts)
        asked = self.model, job, self.settings.teacher, self.preamble, self.display
        self.problems.append(run_teacher(*asked, Store(self.folder, mend=True)))
        return self.problems[-1]

    def _kept(self, key: str, write: Callable[[], list[str | None]]) -> list[str | None]:
        """The texts in the folder, or those that ``write`` gives, kept there."""
        if self.folder is None:
            return write()
        file = self.folder / f"{key}.json"
        try:
            return unsealed(read_json(file), file)["texts"]
        except Damaged:  # or not there yet
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, json.dumps(sealed({"texts": (texts := write())}), ensure_ascii=False))
            return texts

    def drafted(self, seen: Seen, number: int, note: Any) -> list[_Candidate]:
        """Sane queries, of every seed, for the sentences that nobody asks for yet; none twice."""
        model, document, most = self.model, self.document, self.settings.teacher.max_answer_tokens
        wanted = set(range(len(document.sentences))).difference(*self.depends.values())
        drafts = [
            (name, draft)
            for name, seed in SEEDS.items()
            for chunk in document.chunks
            for draft in seed.drafts(document, chunk)
            if wanted.issuperset(draft.sentences) and (draft.source or draft not in self.drafts)
        ]
        if not drafts:
            return []
        if (queries := self.settings.study.study_queries) is not None:
            some = random.Random(f"{self.settings.training.seed} {number}")
            index = some.sample(range(len(drafts)), min(len(drafts), DRAFTS * queries))
            drafts = [drafts[i] for i in sorted(index)]
        count = itertools.count(1)
        key = jax.random.fold_in(jax.random.key(self.settings.training.seed), 2 + number)
        asked = [draft for _, draft in drafts]
        written = self._kept(
            digest([number, *asked]),
            lambda: completed(
                model, self.preamble, asked, document.text, key, lambda: note(f"{next(count)} written")
            ),
        )
        made, texts = [], {query.text for query in self.queries}
        longest = max(len(part.ids) for part in self.parts)
        taken = len(model.preamble_ids) + longest + most
        for (name, draft), text in zip(drafts, written, strict=True):
            if text is None or text in texts or _tokens(model, draft.answer) > most:
                continue
            if draft.expect and set(words(draft.expect)) <= set(words(text)):
                continue  # it says what it asks for
            if draft.source:
                if not is_sane(text, document.text) or not seen.is_new(text):
                    continue
                seen.add(text)
            texts.add(text)
            if taken + len(model.encode_query(text)) > model.config.window:
                continue
            span = document.span(draft.sentences)
            made.append(_Candidate(Query(text, draft.answer, seed=name, span=span), draft))
        self.counts.update(name for name, _ in drafts)
        self.drafts.update(asked)
        return made


def _nothing(made: int) -> str:
    return (
        f"Of {made} queries made from the document none is fit to train on: with it the model answers as"
        " without it, or not at all. Give questions of your own with --queries, or a larger model."
    )


def _tokens(model: LanguageModel, text: str | None) -> int:
    return 0 if text is None else len(model.encode_context(text))


def _fit(model: LanguageModel, problem: Problem, made: Sequence[_Candidate]) -> list[int]:
    """The queries made whose answers come from the document, and are others without it; the best first.

    The best have the answer that they were made for: round-trip consistency (Alberti et al. 2019,
    arXiv:1906.05416). Others stay, too, as σ is to do what the model does, and so do those whose answers are
    cut at their greatest length, as the last: a small model has few others.
    """
    rows = problem.rows
    kl = at_positions(model, problem.preamble, rows, problem.packing, ("kl",))["kl"].sum(axis=1)
    texts = [_text(model, answer) for answer in problem.answers]

    def is_good(i: int) -> bool:
        if problem.job.given_ids[i] is not None:
            return True
        part, query = problem.job.part(i).text, problem.job.queries[i].text
        return stands_in(texts[i], part, query) is not False and is_answer(texts[i])

    def rank(i: int) -> tuple[bool, bool]:
        is_other = not set(words(made[i].draft.expect)) <= set(words(texts[i]))
        return problem.answers[i][-1] not in model.stop_ids, is_other

    return sorted((i for i, own in enumerate(kl) if own > MATTERS and is_good(i)), key=rank)


def _text(model: LanguageModel, answer: Sequence[int]) -> str:
    tokenizer: Any = model.tokenizer  # there is one: it has encoded the context
    return str(tokenizer.decode(answer, skip_special_tokens=True))


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
