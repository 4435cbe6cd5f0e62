"""The prompts that are served: their names, the tokens of a request behind each, and what these count."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsp import prompts
from jaxsp.artifact import MANIFEST, SoftPrompt
from jaxsp.errors import UserError, suggestion
from jaxsp.files import read_json
from jaxsp.hub import name_of
from jaxsp.models.chat import TurnTexts
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.text import control_ids, encode
from jaxsp.serve.messages import texts_in_turn
from jaxsp.serve.refusal import Refusal
from jaxsp.serve.schema import Wish
from jaxsp.typing import KeyValues


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """One soft prompt, or what it is compared with, as a model of the interface.

    Attributes:
      name: of the model.
      folder: of the prompt.
      prompt: the soft prompt.
      model: the frozen model, which all share.
      prefix: what the model has read before a request.
      index: of the prefix among all of its batch.
      kind: of the prompt; or the bracket that stands in its place, see ``jaxsp.serve.brackets``.
      held: slots of the prompt, or tokens in its place.
    """

    name: str
    folder: Path
    prompt: SoftPrompt
    model: LanguageModel
    prefix: KeyValues
    index: int
    kind: str
    held: int
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    _there: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def entry(self) -> dict[str, Any]:
        """The model in ``/v1/models``."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "jaxsp",
            "kind": self.kind,
            "prompt_length": self.held,
            "context_tokens": self.prompt.manifest["context_tokens"],
            "base_model": self.model.short_name,
            "changed_on_disk": self.changed,
        }

    @property
    def changed(self) -> bool:
        """Whether its folder holds another prompt by now; the one that was read at the start is served on."""
        file = self.folder / MANIFEST
        with contextlib.suppress(OSError, UserError):  # it is gone, or is being written
            found = file.stat()
            stamp = found.st_ino, found.st_mtime_ns, found.st_size
            if stamp != self._there.get("stamp"):
                other = read_json(file).get("sha256") != self.prompt.manifest.get("sha256")
                self._there.update(stamp=stamp, other=other)
        return self._there.get("other", False)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer."""
        return self.model.stopping_at(self.prompt.stop_ids).stop_ids

    @property
    def room(self) -> int:
        """Tokens that the model's window leaves behind the prefix."""
        return self.model.config.window - self.prefix.end

    def longest(self, limit: int) -> int:
        """Tokens that a request may have here, of a server that reads so many."""
        return min(limit, self.room - 1)  # one is the answer's

    def too_long(self, wish: Wish, count: str, limit: int) -> Refusal:
        """The refusal of a request that has so many tokens."""
        most = self.longest(limit)
        what = "The prompt has" if wish.messages is None else "The messages have"
        why = "the model's window leaves" if most < limit else "this server reads up to"
        return Refusal(
            f"{what} {count} tokens; {why} {most}. Shorten the text, or leave out earlier turns.",
            param="prompt" if wish.messages is None else "messages",
            code="context_length_exceeded",
        )

    def request_ids(self, wish: Wish, limit: int) -> list[int]:
        """Token ids of all that the model reads behind the prefix.

        Args:
          wish: the request.
          limit: tokens that the server reads; of a chat that has more not all is encoded.

        Raises:
          Refusal: the messages are no chat or too long, or an id is none of the model's.
          UserError: a text can't be encoded.
        """
        tokenizer = self.model.tokenizer
        if wish.messages is not None:
            texts = texts_in_turn(wish.messages, self._knows)
            most = self.longest(limit)
            if len(texts) > most:  # each has a token
                raise self.too_long(wish, f"at least {len(texts)}", limit)
            later = self._later if len(texts) > 1 else None
            ids = self.prompt.chat.chat_ids(tokenizer, texts, later, most)
            if len(ids) > most:
                raise self.too_long(wish, f"at least {len(ids)}", limit)
        elif isinstance(wish.prompt, str):
            ids = encode(tokenizer, wish.prompt, behind="a")
        else:
            ids = wish.prompt or []
        try:
            return self.model.check_ids(ids).tolist()
        except (UserError, OverflowError) as error:
            param = "prompt" if wish.messages is None else "messages"
            message = str(error) if isinstance(error, UserError) else "A token id is too large."
            raise Refusal(message, param=param) from None

    @property
    def context(self) -> str:
        """The context of its answers: ``sigma``, ``full`` or ``none``."""
        return {"document": "full", "nothing": "none"}.get(self.kind, "sigma")

    def usage(self, read: int, written: int, discarded: int = 0) -> dict[str, Any]:
        """Tokens of a request and its answer, those that σ saved, and the context of the answer.

        Args:
          read: tokens of the request.
          written: tokens of the answer.
          discarded: tokens of σ's own answer, where another one is given.
        """
        before = len(self.prompt.manifest["slots"]["before_ids"]) + self.held
        tokens = self.prompt.manifest["context_tokens"]
        saved = tokens - self.held if tokens else 0  # of one that was imported it is not known
        return {
            "prompt_tokens": before + read,
            "completion_tokens": written,
            "total_tokens": before + read + written,
            "prompt_tokens_details": {
                "cached_tokens": before,
                "saved_tokens": saved,
                "context": self.context,
            },
            **({"completion_tokens_details": {"discarded_tokens": discarded}} if discarded else {}),
        }

    def _knows(self, text: str) -> bool:
        """Whether a system text is the document, or the system turn that the prompt has anyway."""
        said = _words(text)
        return said in (self._document, "") or any(f" {own}".endswith(f" {said}") for own in self._preamble)

    @functools.cached_property
    def _document(self) -> str | None:
        unknown = self.held == 0 or self.prompt.context is None  # after nothing it is news
        return None if unknown else _words(self.prompt.context or "")

    @functools.cached_property
    def _preamble(self) -> list[str]:
        """The texts between the control tokens before σ."""
        tokenizer, runs = self.model.tokenizer, [[]]
        control = control_ids(tokenizer)
        for i in self.prompt.manifest["slots"]["before_ids"]:
            if i in control:
                runs.append([])
            else:
                runs[-1].append(i)
        return [_words(str(_decode(tokenizer, run))) for run in runs if run]

    @functools.cached_property
    def _later(self) -> TurnTexts:
        return TurnTexts.of(self.model.tokenizer, self.model.chat_options)


def _words(text: str) -> str:
    return " ".join(text.split())


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)


class Shelf(Mapping[str, Served]):
    """All prompts that are served, by their names.

    Args:
      model: that all were trained for.
      folders: of the prompts, with what was read from them.

    Raises:
      UserError: a prompt belongs to another model.
    """

    def __init__(self, model: LanguageModel, folders: Iterable[tuple[Path, SoftPrompt]]) -> None:
        self.model = model
        self.prefixes: list[KeyValues] = []
        self._all: dict[str, Served] = {}
        for folder, prompt in folders:
            try:
                self._take(self._unused(name_of(folder)), folder, prompt)
            except UserError as error:
                raise UserError(f"{folder}: {error}") from None

    def _unused(self, name: str) -> str:
        names = (name if n == 1 else f"{name}-{n}" for n in range(1, len(self._all) + 2))
        return next(each for each in names if each not in self._all)

    def _take(self, name: str, folder: Path, prompt: SoftPrompt) -> None:
        """A prompt, and each of the shorter ones that it holds."""
        whole = self._add(name, folder, prompt, prompt.prefix(self.model))
        lengths = prompts.lengths(prompt.kind, prompt.sigma)
        for length in lengths if len(lengths) > 1 else ():
            cut = prompt.cut(length)
            prefix = whole.prefix if length == prompt.prompt_length else cut.prefix(self.model)
            self._add(f"{name}@{length}", folder, cut, prefix)

    def _add(self, name: str, folder: Path, prompt: SoftPrompt, prefix: KeyValues) -> Served:
        if not any(prefix is known for known in self.prefixes):
            self.prefixes.append(prefix)
        index = next(i for i, known in enumerate(self.prefixes) if known is prefix)
        held = prompt.prompt_length
        served = Served(name, folder, prompt, self.model, prefix, index, prompt.kind, held)
        self._all[name] = served
        return served

    def __getitem__(self, name: str) -> Served:
        """The prompt of a name.

        Raises:
          Refusal: there is none.
        """
        if name not in self._all:
            meant = suggestion(name[:100], self._all) or "; /v1/models lists those that there are."
            message = f"There is no model {name!r:.100}{meant}"
            raise Refusal(message, status=404, param="model", code="model_not_found")
        return self._all[name]

    def __contains__(self, name: object) -> bool:
        return name in self._all

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)
