"""A question to a soft prompt, or to the whole document where the soft prompt is not sure of its answer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np

from jaxsp.artifact import SoftPrompt, named_model
from jaxsp.errors import check_text
from jaxsp.evaluation.certainty import ROOM, Calibration, certainty
from jaxsp.models import decoder
from jaxsp.models.generation import generate_with_log_probs
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.load import as_model
from jaxsp.settings import check_limits
from jaxsp.terminal import say
from jaxsp.typing import Int, KeyValues, UserError


class AskOptions(TypedDict, total=False):
    """Options of ``jaxsp.ask``."""

    max_tokens: int
    """Longest answer."""
    context_fallback: float | None
    """Fraction of questions that the whole document answers: those on which the soft prompt is least sure."""


UNSURE = "σ is not sure of this; the whole document answers."


class Asking:
    """A soft prompt that is asked, and its document beside it.

    Args:
      prompt: the soft prompt.
      context_fallback: fraction of questions that the whole document answers: those on which the soft
        prompt is least sure; ``None``: it answers all.

    Raises:
      UserError: the fraction is not between 0 and 1, the prompt is not calibrated, or its document is not
        there. No model is needed to find that out.
    """

    def __init__(self, prompt: SoftPrompt, context_fallback: float | None = None) -> None:
        if context_fallback is not None:
            check_limits("context_fallback", context_fallback, above=0, below=1)
        self.prompt = prompt
        self._least = None if context_fallback is None else Calibration.of(prompt).threshold(context_fallback)
        if context_fallback is not None and prompt.context is None:
            raise UserError(
                "The document is not in the soft prompt's folder (context.txt): leave --context-fallback"
                " away."
            )

    def of(self, model: LanguageModel, tell: Callable[[str], None] = say) -> Callable[..., Iterator[str]]:
        """A function ``pieces(question, max_tokens)``: an answer's pieces of text as they come.

        Args:
          model: that the prompt was trained for.
          tell: hears ``UNSURE`` before an answer of the document.

        Raises:
          UserError: the prompt belongs to another model, or its window has no room for the document. The
            function raises it for a question that is too long.
        """
        prompt, least = self.prompt, self._least
        model = model.stopping_at(prompt.stop_ids)
        prefix = prompt.prefix(model)
        ids = None if least is None else _document_ids(model, prompt)

        @functools.cache
        def document() -> KeyValues:
            assert ids is not None
            return decoder.read_long(model.params, model.config, ids[None])

        def has_room(question: str, max_tokens: int) -> bool:
            count = len(prompt.chat.query_ids(model.tokenizer, question))
            return ids is not None and len(ids) + count + min(max_tokens, ROOM) <= model.config.window

        def pieces(question: str, max_tokens: int) -> Iterator[str]:
            before = prefix
            if least is not None and has_room(question, max_tokens):
                own, sure = _judged(model, prompt, prefix, question, max_tokens)
                if sure >= least:
                    yield own
                    return
                tell(UNSURE)
                before = document()
            yield from model.stream_answer(before, question, prompt.chat, max_tokens=max_tokens)

        return pieces


def ask(
    prompt: SoftPrompt,
    question: str,
    *,
    model: LanguageModel | str | Path | None = None,
    max_tokens: int = 128,
    context_fallback: float | None = None,
) -> str:
    """The greedy answer to a question, with the prompt in place of the context; as ``jaxsp.ask``.

    A document that answers is read for each call; ``Asking.of`` reads it once.
    """
    if context_fallback is None:
        return prompt.ask(question, model=model, max_tokens=max_tokens)
    check_text(question, "The question")
    check_limits("max_tokens", max_tokens, at_least=1)
    asking = Asking(prompt, context_fallback)
    named = named_model(prompt.manifest["model"]) if model is None else model
    return "".join(asking.of(as_model(named, prompt.quantization))(question, max_tokens))


def _judged(
    model: LanguageModel, prompt: SoftPrompt, prefix: KeyValues, question: str, max_tokens: int
) -> tuple[str, float]:
    """The soft prompt's own answer, and how sure it is of it."""
    ids, sampling = model.greedy_request(prefix, question, prompt.chat, max_tokens=max_tokens)
    (answer,), (logs,) = generate_with_log_probs(model.params, model.config, prefix, [ids], sampling)
    return model.decode(answer), certainty(logs)


def _document_ids(model: LanguageModel, prompt: SoftPrompt) -> Int[np.ndarray, " c"]:
    """The token ids of the whole document, with those before it.

    Raises:
      UserError: the model has no room for them.
    """
    ids = prompt.chat.context_ids(model.tokenizer, prompt.context or "")
    ids = model.check_ids([*prompt.manifest["slots"]["before_ids"], *ids])
    if len(ids) >= model.config.window:
        raise UserError(
            f"The document has {len(ids):,} tokens, and the model's window {model.config.window:,}: leave"
            " --context-fallback away."
        )
    return ids
