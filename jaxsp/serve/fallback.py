"""The fallback: a chat whose answer σ is not sure of is answered after the whole document."""

from __future__ import annotations

from jaxsp.errors import UserError
from jaxsp.evaluation.certainty import ROOM, Calibration
from jaxsp.serve.brackets import DOCUMENT, Bracket
from jaxsp.serve.schema import Wish
from jaxsp.serve.served import Served, Shelf


class Fallback:
    """The certainties below which the soft prompts' own answers are not given.

    Args:
      shelf: the soft prompts. The shorter ones of a nested prompt are not calibrated, and always answer.
      share: the expected share of chats that are answered after the document, above 0 and below 1.

    Raises:
      UserError: a prompt is not calibrated, or its document can't be read.
    """

    def __init__(self, shelf: Shelf, share: float) -> None:
        self._least: dict[str, float] = {}
        for name, served in shelf.items():
            if any(one.folder == served.folder and one.held > served.held for one in shelf.values()):
                continue
            try:
                least = Calibration.of(served.prompt).threshold(share)
            except UserError as error:
                raise UserError(f"--context-fallback, {name}: {error}") from None
            if (missing := Bracket(f"{name}:{DOCUMENT}", DOCUMENT, served).missing) is not None:
                raise UserError(f"--context-fallback, {name}: {missing}")
            self._least[name] = least

    def least(self, served: Served, wish: Wish, count: int) -> float | None:
        """The certainty that an answer needs to be given; ``None``: it is given however unsure.

        Completions are never judged, as the certainties are those of answers to questions; nor is a chat for
        which there is no room behind the document.

        Args:
          served: the model that is asked.
          wish: the request.
          count: its tokens.
        """
        if wish.messages is None or served.name not in self._least:
            return None
        manifest = served.prompt.manifest
        before = len(manifest["slots"]["before_ids"]) + manifest["context_tokens"]
        wanted = ROOM if wish.max_tokens is None else min(wish.max_tokens, ROOM)
        fits = before + count + wanted <= served.model.config.window
        return self._least[served.name] if fits else None
