"""The command `jaxsp ask`: one question, or a loop of them."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import Annotated, ClassVar

import tyro

from jaxsp.errors import UserError
from jaxsp.options import Saved, check_share
from jaxsp.settings import check_limits
from jaxsp.terminal import visible


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
        from jaxsp.evaluation.asking import Asking

        check_limits("max_tokens", self.max_tokens, at_least=1)
        check_share(self.context_fallback)
        prompt = self.prompt()
        question = read_text("-") if self.question == ("-",) else " ".join(self.question)
        if self.question and not question.strip():
            raise UserError("The question is empty; leave it away for a chat loop.")
        asking = Asking(prompt, self.context_fallback)
        pieces = asking.of(self.load(prompt), lambda line: print(line, file=sys.stderr))

        def answer(text: str) -> None:
            for piece in pieces(text, self.max_tokens):
                print(visible(piece), end="", flush=True)
            print(flush=True)

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
