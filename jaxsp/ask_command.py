"""The command `jaxsp ask`: one question, or a loop of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from jaxsp.errors import UserError
from jaxsp.options import Saved, check_share
from jaxsp.settings import check_limits
from jaxsp.terminal import visible

if TYPE_CHECKING:
    from jaxsp.artifact import SoftPrompt
    from jaxsp.models.language_model import LanguageModel
    from jaxsp.typing import KeyValues


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask(Saved):
    """Ask the model a question, with a soft prompt in place of the document."""

    examples: ClassVar[str] = """
      jaxsp ask prompt/ "How long is the warranty?"
      echo "How long is the warranty?" | jaxsp ask prompt/ -
      jaxsp ask prompt/
    """
    question: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="QUESTION")]] = ()
    """The question, or - for standard input; without one, a chat loop."""
    max_tokens: int = 128
    """Longest answer."""
    context_fallback: Annotated[float | None, tyro.conf.arg(metavar="FRACTION")] = None
    """Fraction of questions that the whole document answers: those on which the soft prompt is least sure."""

    def run(self) -> None:
        from jaxsp.data.documents import read_text

        check_limits("max_tokens", self.max_tokens, at_least=1)
        check_share(self.context_fallback)
        prompt = self.prompt()
        question = read_text("-") if self.question == ("-",) else " ".join(self.question)
        if self.question and not question.strip():
            raise UserError("The question is empty; leave it away for a chat loop.")
        answer = self._answer(prompt)
        if self.question:
            answer(question.strip())
            return
        print("Each question is answered on its own. An empty line ends.", file=sys.stderr)
        with contextlib.suppress(EOFError):
            while question := input("> ").strip():
                try:
                    answer(question)
                except UserError as error:
                    print(visible(str(error)), file=sys.stderr)

    def _answer(self, prompt: SoftPrompt) -> Callable[[str], None]:
        """A function that prints the answer to a question; the model is loaded."""
        from jaxsp.evaluation.certainty import ROOM, Calibration

        share, least = self.context_fallback, None
        if share is not None:
            least = Calibration.of(prompt).threshold(share)
            if prompt.context is None:
                raise UserError(
                    "The document is not in the soft prompt's folder (context.txt): leave --context-fallback"
                    " away."
                )
        model = self.load(prompt)
        prefix = prompt.prefix(model)
        ids = None if least is None else _document_ids(model, prompt)
        document = functools.cache(lambda: _document(model, ids))

        def has_room(question: str) -> bool:
            count = len(prompt.chat.query_ids(model.tokenizer, question))
            return ids is not None and len(ids) + count + min(self.max_tokens, ROOM) <= model.config.window

        def pieces(question: str) -> Iterator[str]:
            before = prefix
            if least is not None and has_room(question):
                if (own := _sure(model, prompt, prefix, question, self.max_tokens, least)) is not None:
                    yield own
                    return
                print("σ is not sure of this; the whole document answers.", file=sys.stderr)
                before = document()
            yield from model.stream_answer(before, question, prompt.chat, max_tokens=self.max_tokens)

        def answer(question: str) -> None:
            for piece in pieces(question):
                print(visible(piece), end="", flush=True)
            print(flush=True)

        return answer


def _sure(
    model: LanguageModel, prompt: SoftPrompt, prefix: KeyValues, question: str, max_tokens: int, least: float
) -> str | None:
    """The soft prompt's own answer; ``None`` if it is less sure of it than ``least``."""
    from jaxsp.evaluation.certainty import certainty
    from jaxsp.models.generation import generate_with_log_probs

    ids, sampling = model.greedy_request(prefix, question, prompt.chat, max_tokens=max_tokens)
    (answer,), (logs,) = generate_with_log_probs(model.params, model.config, prefix, [ids], sampling)
    return None if certainty(logs) < least else model.decode(answer)


def _document_ids(model: LanguageModel, prompt: SoftPrompt) -> Any:
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


def _document(model: LanguageModel, ids: Any) -> KeyValues:
    """The prefix that the whole document is."""
    import numpy as np

    from jaxsp.distributions import context_prefix

    return context_prefix(model.params, model.config, np.array([ids]))
