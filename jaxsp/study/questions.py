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
from jaxsp.evaluation.facts import stands_in
from jaxsp.evaluation.metrics import at_positions
from jaxsp.files import read_json
from jaxsp.models.language_model import LanguageModel
from jaxsp.progress import Display
from jaxsp.settings import Settings, plain
from jaxsp.study.choice import HELD_OUT, to_fill, to_measure, to_train
from jaxsp.study.coverage import covered
from jaxsp.study.filters import MATTERS, Seen, is_answer, is_sane
from jaxsp.study.seeds import SEEDS, Draft, Seed
from jaxsp.study.text import Document
from jaxsp.study.writing import completed
from jaxsp.teacher.problem import SAMPLE, Problem, digest, identity, read_preamble, run_teacher, tokenize
from jaxsp.teacher.signals import USUAL, Wanted
from jaxsp.teacher.store import Store, about
from jaxsp.typing import UserError

ROUNDS = 2
"""Times that the document is asked for what no query asks for yet."""

DRAFTS = 4
"""Drafts for each query that is wanted, where their number is asked for: some give none that is fit."""

FILLING = ("quote", "complete", "mention")
"""Seeds beside the user's own queries: the document itself has the answer, and the model writes nothing. Each
is for the sentences of which those before it can't be made."""

SHARE = 3
"""For so many of the user's own queries one sentence may be left untested: it counts as not asked for."""

FILLING_TOKENS = 8192
"""Tokens to read at most, about, to find what the user's own queries ask for: some seconds on two cores."""

VERSION = 5
"""Version of the forms of queries and of the choice between them: a study by an earlier one is not read."""

_FILE, _TEXTS = "study.json", "texts.json"


@dataclasses.dataclass(frozen=True)
class Study:
    """The queries of a document, and how much of it they ask for.

    Attributes:
      train: queries to train on, the user's own first.
      held_out: queries to measure on.
      drafted: the number of queries that each seed gave before filtering.
      sentences: the document's sentences.
      asked: numbers of the sentences that the training queries depend on.
      by_given: those that the user's own do.
      guessed: those of the latter that were not taken away to see it, as that would be too much to read: each
        is the one that shares most words with a query.
    """

    train: list[Query]
    held_out: list[Query]
    drafted: dict[str, int]
    sentences: list[str]
    asked: list[int]
    by_given: list[int] = dataclasses.field(default_factory=list)
    guessed: list[int] = dataclasses.field(default_factory=list)

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
            "added": sum(bool(query.seed) for query in self.train),
            "sentences": self.sentences,
            "asked": self.asked,
            "by_given": self.by_given,
            "guessed": self.guessed,
            "coverage": len(self.asked) / len(self.sentences) if self.sentences else 1.0,
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


class NothingFit(UserError):
    """A document gives nothing to train on."""


def only_fills(settings: Settings, given: Sequence[Query]) -> bool:
    """Whether a study adds to the user's own queries only what needs no writing: nothing in it is drawn."""
    return bool(given) and settings.study.study == "auto"


def study_key(
    model: LanguageModel,
    context: str,
    given: Sequence[Query],
    held_out: Sequence[Query],
    settings: Settings,
    wanted: Wanted = USUAL,
) -> str:
    """Equal where a study gives the same queries; arguments as in ``study``.

    ``wanted`` are the signals that the run wants of its queries.
    """
    texts = [[dataclasses.astuple(query) for query in part] for part in (given, held_out)]
    decides = wanted if only_fills(settings, given) else settings.training.seed
    chosen = plain(settings.study), plain(settings.teacher), decides
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
    kept: Store | None = None,
    said: Problem | None = None,
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
      kept: for what is written and answered, so that a study that is interrupted goes on from there.
      said: the problem of the user's own queries, if the teacher has answered them.

    Returns:
      The study, and the problem of its queries; without signals, if they are to be others than the usual.

    Raises:
      UserError: the document is too long.
      NothingFit: unless it only fills up, the document has no sentence, or nothing that
        was made from it is fit to train on.
    """
    check_length(context)
    document, fills = Document.of(context, lambda text: _tokens(model, text)), only_fills(settings, given)
    if not document.sentences and not fills:
        raise NothingFit("The document has no sentence to ask about; give questions with --queries.")
    parts = said.job.parts if said else tokenize(model, context, [*given, SAMPLE], held_out, settings).parts
    found = _Found(model, document, parts, settings, display, kept or Store(None), said)
    own, last = len(given), [*range(len(given), len(given) + len(held_out))]
    if not said and (given or held_out):
        found.ask([*given, *held_out])
    guessed = found.cover(given, fills) if given else set[int]()
    seen = Seen(query.text for query in [*given, *held_out])
    if fills:
        _fill_up(found, seen, own)
    else:
        _ask_for_all(found, seen, own, HELD_OUT if measure and not held_out else 0.0)
    depends = found.depends
    if measure and not last and depends:
        last = to_measure(depends, found.queries, own, settings, found.cut)
        depends = {i: some for i, some in depends.items() if i not in set(last)}
    chosen = list(depends)
    if not fills:
        weights = {name: seed.WEIGHT for name, seed in SEEDS.items()}
        chosen = to_train(depends, found.queries, own, len(document.sentences), settings, weights, found.cut)
    if not chosen or (measure and not last):
        raise NothingFit(_nothing(len(found) - own - len(held_out)))
    asked, by_given = (
        sorted(set[int]().union(*(depends[i] for i in some)))
        for some in (chosen, [i for i in chosen if i < own])
    )
    train, measured = ([found.queries[i] for i in part] for part in (chosen, last))
    texts = [sentence.text for sentence in document.sentences]
    problem = found.joined().take([*chosen, *last], train=len(chosen))
    covers = texts, asked, by_given, sorted(guessed)
    return Study(train, measured, dict(found.counts), *covers), problem


def _ask_for_all(found: _Found, seen: Seen, own: int, kept_back: float) -> None:
    """Has queries of every seed made for what no query asks for yet, and asks them."""
    most = found.settings.study.study_queries
    for number in range(ROUNDS):
        if most is not None and len(found.depends) - own >= most / (1 - kept_back):
            return
        asked = set[int]().union(*found.depends.values())
        made = found.drafted(seen, number, SEEDS, set(range(len(found.document.sentences))) - asked)
        if not made:
            return
        found.ask_made(made)


def _fill_up(found: _Found, seen: Seen, own: int) -> None:
    """Asks for the sentences that none of the user's own queries asks for."""
    document, most = found.document, found.settings.study.study_queries
    for number, name in enumerate(FILLING):
        asked = collections.Counter(i for some in found.depends.values() for i in some)
        times = [asked[i] if i in document.distinct else 1 for i in range(len(document.sentences))]
        sentences = set(to_fill(times, own, len(found.depends) - own, most))
        each = dict[tuple[int, ...], _Candidate]()
        for candidate in found.drafted(seen, number, {name: SEEDS[name]}, sentences) if sentences else ():
            each.setdefault(candidate.draft.sentences, candidate)
        if each:
            found.ask_made(list(each.values()))


class _Found:
    """The queries asked so far, with what the teacher said, and the sentences that they depend on."""

    def __init__(
        self,
        model: LanguageModel,
        document: Document,
        parts: list[Part],
        settings: Settings,
        display: Display,
        kept: Store,
        said: Problem | None = None,
    ) -> None:
        self.model, self.document, self.parts, self.kept = model, document, parts, kept
        self.preamble = said.preamble if said else read_preamble(model)
        self.settings, self.display = settings, display
        self.wanted = said.wanted if said else USUAL
        self.problems = [said] if said else []
        self.depends: dict[int, set[int]] = {}
        self.counts = collections.Counter[str]()
        """Queries drafted, by seed."""
        self.cut = set[int]()
        """Those made whose answers are cut at their greatest length."""
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
        self.problems.append(run_teacher(*asked, self.kept, self.wanted))
        return self.problems[-1]

    def cover(self, given: Sequence[Query], fills: bool) -> set[int]:
        """Finds what the user's own queries, the first ones, depend on; gives the sentences guessed."""
        problem = self.problems[0].take(range(len(given)))
        answers = [
            _text(self.model, ids) if q.answer is None else q.answer
            for q, ids in zip(given, problem.answers, strict=True)
        ]
        asked = [(query.text, answer) for query, answer in zip(given, answers, strict=True)]
        options: dict[str, Any] = {}
        if fills:
            options = {"most_tokens": FILLING_TOKENS, "spare": len(given) // SHARE}
        with self.display.phase("coverage", "What the questions ask for"):
            found = covered(self.model, self.document, problem, asked, **options)
        self.depends = dict(enumerate(found.depends))
        return found.guessed

    def ask_made(self, made: Sequence[_Candidate]) -> None:
        """The queries made, of which those count that are fit to train on.

        A query made from a sentence asks for it; of the user's own it is seen by words, and by taking
        sentences away.
        """
        first, problem = len(self), self.ask([candidate.query for candidate in made])
        with self.display.phase("signals", "What the document decides"):
            fit = _fit(self.model, problem, made)
        self.cut |= {first + i for i in fit if problem.answers[i][-1] not in self.model.stop_ids}
        alike = self.document.alike
        self.depends |= {first + i: set[int]().union(*map(alike, made[i].draft.sentences)) for i in fit}

    def joined(self) -> Problem:
        """The problem of all queries asked; where signals differ between them, without any."""
        if len(self.problems) == 1 or self.wanted.is_usual:
            return Problem.joined(self.problems)
        bare = []
        for problem in self.problems:
            targets = {"tokens": problem.rows.targets["tokens"]}
            bare.append(dataclasses.replace(problem, rows=dataclasses.replace(problem.rows, targets=targets)))
        return Problem.joined(bare)

    def _written(self, key: str, drafts: Sequence[Draft], write: Callable[[], list[Any]]) -> list[str | None]:
        """The texts of drafts: those kept, or what ``write`` gives, kept from then on."""
        if not any(draft.source for draft in drafts):
            return write()

        def read(folder: Path) -> list[str | None]:
            return read_json(folder / _TEXTS)["texts"]

        def put(folder: Path) -> None:
            (folder / _TEXTS).write_text(json.dumps({"texts": texts}, ensure_ascii=False), "utf-8")

        if (texts := self.kept.read(key, read, "Questions")) is None:
            texts = write()
            self.kept.write(key, about("drafts", self.model.name, self.document.text, len(texts)), put, read)
        return texts

    def drafted(
        self, seen: Seen, number: int, seeds: Mapping[str, Seed], wanted: set[int]
    ) -> list[_Candidate]:
        """Sane queries of some seeds for the sentences that are wanted; none twice."""
        with self.display.phase("questions", "Questions from the document") as note:
            return self._drafted(seen, number, seeds, wanted, note)

    def _drafted(
        self, seen: Seen, number: int, seeds: Mapping[str, Seed], wanted: set[int], note: Any
    ) -> list[_Candidate]:
        model, document, most = self.model, self.document, self.settings.teacher.max_answer_tokens
        drafts = [
            (name, draft)
            for name, seed in seeds.items()
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
        written = self._written(
            digest([number, *asked]),
            asked,
            lambda: completed(
                model, self.preamble, asked, document.text, key, lambda _: note(f"{next(count)} written")
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
    arXiv:1906.05416). Others stay, too, as σ is to do what the model does. Answers that are cut at their
    greatest length are the last: they count where a sentence has not enough others.
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
