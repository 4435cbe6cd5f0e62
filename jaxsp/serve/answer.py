"""An answer as its tokens come: its text, where it ends, and how likely its tokens were."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import pre_tokenizers

from jaxsp.models.generation.likely import Likely

LEAST = -9999.0
"""Logarithm of a probability that is as good as 0: JSON has no infinity."""

_HALF = "\N{REPLACEMENT CHARACTER}"


class Likelihood(NamedTuple):
    """A token, and the natural logarithm of its probability."""

    token: int
    log: float


class Token(NamedTuple):
    """A token of an answer.

    Attributes:
      chosen: the token.
      top: the most probable ones in its place.
      offset: characters of the answer before it.
    """

    chosen: Likelihood
    top: list[Likelihood]
    offset: int


@dataclasses.dataclass(eq=False)
class Answer:
    """The text of tokens that come in pieces; what may yet change is held back.

    Attributes:
      tokenizer: decodes them.
      stops: texts before which the answer ends.
      stop_ids: tokens that end it.
      ids: all tokens so far.
      reason: why it has ended: ``stop`` or ``length``; ``None``: it has not.
    """

    tokenizer: Any
    stops: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ids: list[int] = dataclasses.field(default_factory=list)
    reason: str | None = None
    _shown: str = ""
    _logs: list[tuple[float, list[Likelihood]]] = dataclasses.field(default_factory=list)
    _told: int = 0
    _offsets: list[int] = dataclasses.field(default_factory=lambda: [0])

    def add(
        self, ids: Sequence[int], ended: bool, likely: Likely | None = None, alternatives: int = 0
    ) -> str:
        """Takes further tokens and gives the text that is certain now, beyond what was given before.

        Args:
          ids: the tokens.
          ended: whether they are the last ones.
          likely: their probabilities, if wanted.
          alternatives: most probable tokens that are kept of each.
        """
        if likely is not None:
            for log, tops, logs in zip(likely.chosen_RA, likely.ids_RAN, likely.log_RAN, strict=True):
                best = zip(tops[:alternatives].tolist(), logs[:alternatives].tolist(), strict=True)
                self._logs.append(
                    (max(float(log), LEAST), [Likelihood(i, max(one, LEAST)) for i, one in best])
                )
        text, ends = "", list[tuple[int, int]]()
        # With stops token by token, so that an answer has the same ones however they come.
        for some in ([[token] for token in ids] if self.stops else []) or [ids]:
            self.ids += some
            text = self._decode(self.ids)
            ends = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
            if ends:
                break
        if ends:  # the one that is complete first
            text, self.reason = text[: min(ends)[1]], "stop"
        elif ended:
            self.reason = "stop" if self.ids and self.ids[-1] in self.stop_ids else "length"
        else:
            text = self._certain(text)
        new, self._shown = text[len(self._shown) :], max(self._shown, text, key=len)
        return new

    @property
    def text(self) -> str:
        """All text that is certain."""
        return self._shown

    def tokens(self) -> list[Token]:
        """The tokens of the certain text that were not given before, where their probabilities are known.

        What ends the answer is not among them.
        """
        found = []
        last = min(len(self._logs), len(self.ids)) - (bool(self.ids) and self.ids[-1] in self.stop_ids)
        while self._told < last:
            n = self._told
            if n == len(self._offsets) - 1:
                self._offsets.append(len(self._decode(self.ids[: n + 1]).rstrip(_HALF)))
            start, end, shown = self._offsets[n], self._offsets[n + 1], len(self._shown)
            if end > shown and not (self.reason and start < shown):  # a stop may cut through a token
                break
            log, best = self._logs[n]
            found.append(Token(Likelihood(self.ids[n], log), best, self._offsets[n]))
            self._told += 1
        return found

    def _certain(self, text: str) -> str:
        """The text without half a character, and without what may begin a stop."""
        text = text.rstrip(_HALF)
        for size in range(min(len(text), max(map(len, self.stops), default=1) - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stops):
                return text[:-size]
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


@functools.lru_cache(maxsize=100_000)
def token_text(tokenizer: Any, token: int) -> str:
    """The text of a token within a text; a sign of a missing half stands for a part of a character."""
    anchor = tokenizer.encode("a", add_special_tokens=False)
    before = str(tokenizer.decode(anchor, skip_special_tokens=False))
    return str(tokenizer.decode([*anchor, token], skip_special_tokens=False))[len(before) :]


def token_bytes(tokenizer: Any, token: int) -> list[int] | None:
    """The bytes of a token, also where they are a part of a character; ``None`` if they can't be known."""
    if _HALF not in (text := token_text(tokenizer, token)):
        return list(text.encode())
    word = str(tokenizer.convert_ids_to_tokens(token))
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", word):  # as SentencePiece writes a byte
        return [int(byte[1], 16)]
    return [_alphabet()[sign] for sign in word] if set(word) <= _alphabet().keys() else None


@functools.cache
def _alphabet() -> dict[str, int]:
    """The bytes by the signs that byte-level vocabularies write for them: itself, or one beyond Latin-1."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = {sign: ord(sign) for sign in signs if ord(sign) < 256}
    others = [sign for sign in signs if ord(sign) >= 256]
    return {**known, **dict(zip(others, sorted({*range(256)} - {*known.values()}), strict=True))}
