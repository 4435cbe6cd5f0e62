"""Another model as the teacher: what it shares with the student, and its problem as the student reads it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from jaxsp.data.examples import make_rows
from jaxsp.losses import as_objective
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.output_head import OutputHead
from jaxsp.settings import Settings
from jaxsp.teacher.problem import Problem, TokenizedJob
from jaxsp.typing import KeyValues, UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A model that teaches another one.

    Of the same vocabulary it gives answers and, with its own head, their distributions; of another one its
    answers alone, as texts.

    Attributes:
      model: it reads the whole context.
      student: the model that σ is for. Where the vocabulary is the same, its answers end where the teacher's
        do, too: the teacher's end of turn is what it learns to say.
    """

    model: LanguageModel
    student: LanguageModel

    @classmethod
    def of(cls, student: LanguageModel, model: LanguageModel | None) -> Teacher | None:
        """The teacher of a student; ``None`` if there is none, or one that is the student itself.

        Two models with the same weights, dtype and texts around the context are one.
        """
        if model is None or model is student:
            return None
        found = cls(model, student)
        if found.difference is not None:
            return found
        alike = model.config == student.config and model.fingerprint == student.fingerprint
        if alike and model.chat == student.chat and model.stop_ids == student.stop_ids:
            return None
        return cls(model, student.stopping_at(model.stop_ids))

    def on(self, mesh: Mesh) -> Teacher:
        """The same with the weights of both spread over a mesh.

        Raises:
          UserError: one of them can't be cut in so many parts.
        """
        student = self.student.on(mesh)
        try:
            return Teacher(self.model.on(mesh), student)
        except UserError as error:
            raise UserError(f"The teacher {self.model.name} can't be spread so: {error}") from None

    @functools.cached_property
    def difference(self) -> str | None:
        """The first difference of the two vocabularies in words; ``None``: every token has the same id."""
        theirs, ours = (_vocabulary(model) for model in (self.model, self.student))
        if theirs == ours:
            return None
        if len(theirs) != len(ours):
            return f"{len(theirs)} tokens, not {len(ours)}"
        word = min((w for w in ours if theirs.get(w) != ours[w]), key=lambda word: ours[word])
        if word not in theirs:
            return f"it lacks the token {word!r}"
        return f"the token {word!r} has the id {theirs[word]}, not {ours[word]}"

    @functools.cached_property
    def head(self) -> OutputHead | None:
        """The teacher's head, with no more tokens than the student's; ``None`` if only its answers count.

        The models may pad one vocabulary to two sizes: no text has the ids beyond the smaller one.
        """
        if self.difference is not None:
            return None
        head, tokens = OutputHead.of(self.model.params, self.model.config), self.student.config.vocab_size
        if head.unembedding.shape[0] <= tokens:
            return head
        return dataclasses.replace(head, unembedding=head.unembedding[:tokens])

    @property
    def identity(self) -> dict[str, Any]:
        """The model, its weights and what is computed with them, and its chat, as they decide a run."""
        model, config = self.model, self.model.config
        return {
            "teacher": model.short_name,
            "teacher_weights": model.fingerprint,
            "teacher_decoder": config.identity,
            "teacher_dtype": config.dtype,
            "teacher_chat": dataclasses.asdict(model.chat),
        }

    @property
    def summary(self) -> dict[str, Any]:
        """The teacher as manifest and report name it; ``signal`` is ``distributions`` or ``answers``."""
        config, shared = self.model.config, self.difference is None
        return {
            "name": self.model.name,
            "fingerprint": self.model.fingerprint,
            "decoder": config.identity,
            "quantization": config.quantization,
            "dtype": config.dtype,
            "signal": "distributions" if shared else "answers",
            "stop_ids": list(self.model.stop_ids) if shared else [],
        }

    @property
    def message(self) -> str:
        """The teacher in a sentence."""
        name = self.model.name
        if self.difference is None:
            return f"Taught by {name}."
        return (
            f"Taught by {name}, tokens only: it has another vocabulary ({self.difference}), so that only its"
            " answers are used."
        )

    def check(self, settings: Settings) -> None:
        """Raises ``UserError`` if the teacher can't give what the objective needs."""
        objective = as_objective(settings.training.objective, by_gradient=False)
        if self.difference is not None and not set(objective.needs) <= {"tokens"}:
            raise UserError(
                f"The teacher {self.model.name} has another vocabulary than {self.student.name}"
                f" ({self.difference}), so that only its answers can be used, and {objective} needs its"
                " distributions; train on the answers with --objective nll."
            )
        widths = self.model.config.width, self.student.config.width
        if objective.compares_hidden and widths[0] != widths[1]:
            raise UserError(
                f"{objective} compares hidden states, which have {widths[0]} entries in the teacher"
                f" {self.model.name} and {widths[1]} in {self.student.name}; train on distributions, such as"
                " with --objective kl."
            )

    def problem(self, said: Problem, job: TokenizedJob, preamble: KeyValues, settings: Settings) -> Problem:
        """The student's problem.

        Args:
          said: the teacher's own: with its texts around the context and the queries.
          job: the same queries as the student reads them.
          preamble: the student's prefix before σ.
          settings: settings of the compression.

        Raises:
          UserError: an answer is too long for the student's window.
        """
        answers, rows, signals = said.answers, said.rows, {}
        if self.difference is None:
            ids = [row[mask].tolist() for row, mask in zip(rows.targets["tokens"], rows.mask, strict=True)]
            for answer in ids:
                self.student.check_ids(answer)
            signals = {name: target for name, target in rows.targets.items() if name != "tokens"}
        else:
            answers = [self._encoded_again(answer) for answer in answers]
            ids = [given or own for given, own in zip(job.given_ids, answers, strict=True)]
        rows = make_rows(job.query_ids, ids).with_targets(**signals)
        # z stands behind the longest part, or behind more slots than that has tokens.
        before = max(settings.prompt.prompt_length, len(job.longest_part.ids))
        taken = preamble.end + before + int(rows.lengths.max())
        if taken > (window := self.student.config.window):
            raise UserError(
                f"The longest answer with its query, after the context, takes {taken} tokens, more than the"
                f" model's window of {window}. Lower --max-answer-tokens."
            )
        return Problem(job, preamble, rows, answers, self.head, said.job, wanted=said.wanted)

    def _encoded_again(self, answer: list[int]) -> list[int]:
        """The teacher's answer in the student's tokens, with its end of turn if the answer has one."""
        theirs: Any = self.model.tokenizer
        text = str(theirs.decode(answer, skip_special_tokens=True))
        ids = self.student.encode_answer(text).tolist()
        if text and answer[-1] not in self.model.stop_ids:  # it was cut at its greatest length
            ids = ids[: len(ids) - len(self.student.chat.end_ids(self.student.tokenizer))]
        return ids


def name_of_kl(taught_by: Mapping[str, Any] | None) -> str:
    """The name of what a report calls ``kl``.

    Args:
      taught_by: the report's ``taught_by``: a teacher's ``summary``; ``None`` if the model teaches itself.

    Example:
      >>> name_of_kl(None), name_of_kl({"signal": "answers"})
      ('KL', "NLL of the teacher's answers")
    """
    return "NLL of the teacher's answers" if (taught_by or {}).get("signal") == "answers" else "KL"


def _vocabulary(model: LanguageModel) -> Mapping[str, int]:
    if model.tokenizer is None:
        raise UserError(f"The model {model.name} was loaded without a tokenizer; load it with one.")
    return model.tokenizer.get_vocab()
