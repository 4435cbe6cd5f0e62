"""A text as token ids: the user's words are never control tokens, and a part is read as the whole has it."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import tokenizers

from jaxsp.errors import check_unicode
from jaxsp.files import parse_json
from jaxsp.typing import UserError

_ANCHORS = ("a", ".", "\n")
"""Texts that a part may stand behind, where it would become one token with what really is there."""

AT_ONCE = 2**18
"""Characters that are encoded at once: a tokenizer takes some 200 bytes for each until it is done."""

_BEFORE = 64
"""Characters of the piece before that a piece of a long text is encoded behind."""

_SPACES = " \n\t\r▁ĠĊĉč"
"""Blanks, also as tokenizers write them: added tokens of these alone are no control tokens."""


def encode(tokenizer: Any, text: str, *, control: bool = False, behind: str = "") -> list[int]:
    """Token ids of a text as they are behind another one, without any added at its ends.

    Many tokenizers begin a text in another way than they go on with it.

    Args:
      tokenizer: a ``transformers`` tokenizer.
      text: what to encode.
      control: whether control tokens spelled out in the text (``<|im_end|>``) are meant as such; in
        the user's text they are not.
      behind: what stands before the text. Where a token would hold the end of it and the beginning of the
        text, the text is encoded as it is behind a letter, a full stop or the end of a line.

    Raises:
      UserError: the tokenizer gives a control token for the user's text, and can't be made not to.

    Example:
      >>> import jaxsp
      >>> tokenizer = jaxsp.load_model("smollm2-135m-instruct").tokenizer
      >>> encode(tokenizer, "<|im_end|>", control=True)
      [2]
      >>> len(encode(tokenizer, "<|im_end|>")) > 1
      True
    """

    check_unicode(text, "The text")
    if len(text) > AT_ONCE:
        return [
            i
            for piece, before in _pieces(text, behind)
            for i in encode(tokenizer, piece, control=control, behind=before)
        ]

    def raw(some: str) -> list[int]:
        return tokenizer.encode(some, add_special_tokens=False, split_special_tokens=False)

    ids = _behind(raw, behind, text)
    if control or (forbidden := control_ids(tokenizer)).isdisjoint(ids):
        return ids
    plain = _without_control(tokenizer)
    # Whether the text goes on or begins behind a control token, a word shows.
    begins = _behind(raw, behind, "a") == plain("a")
    ids = plain(text) if begins else _behind(plain, _ANCHORS[0], text)
    if not forbidden.isdisjoint(ids):
        word = tokenizer.convert_ids_to_tokens(min(forbidden.intersection(ids)))
        raise UserError(f"The text holds {word!r}, a control token of this model; take it out.")
    return ids


def _behind(encode: Callable[[str], list[int]], before: str, text: str) -> list[int]:
    for anchor in (before, *_ANCHORS) if before else ():
        head, whole = encode(anchor), encode(anchor + text)
        rest = whole[len(head) :]
        if whole[: len(head)] == head and (rest or not text.strip()):  # else they are one token
            return rest
    return encode(text)


def _pieces(text: str, behind: str) -> Iterator[tuple[str, str]]:
    """A long text in pieces, each with what it stands behind: their ids are those of the whole.

    A piece begins with the single blank between two words, if there is one: no tokenizer joins such words.
    """
    start = 0
    while start < len(text):
        there = text[start : start + AT_ONCE]
        if start + AT_ONCE < len(text):
            for between in (r"(?<=\w)(?=[ \n]\w)", r"(?<=\S)(?=\s)"):
                if end := max((found.start() for found in re.finditer(between, there)), default=0):
                    there = there[:end]
                    break
        yield there, behind
        start, behind = start + len(there), there[-_BEFORE:]


def stands_alone(tokenizer: Any, before: str) -> bool:
    """Whether the ids of a text stay as they are when others follow it.

    Args:
      tokenizer: a ``transformers`` tokenizer.
      before: the text.
    """

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)

    head = ids(before)
    return all(ids(before + word)[: len(head)] == head for word in ("The", "the", "1", '"', "#"))


_CONTROL = weakref.WeakKeyDictionary[Any, tuple[int, frozenset[int]]]()
_DISARMED = weakref.WeakKeyDictionary[Any, tuple[int, tokenizers.Tokenizer]]()


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Token ids that no text of a user's may have: special ones, and added ones that are not mere blanks.

    The id of what is unknown to the tokenizer is not among them.
    """
    size, found = _CONTROL.get(tokenizer, (-1, frozenset()))
    if size != len(tokenizer):  # a token may be added later
        backend = _backend(tokenizer)
        words = backend.get_added_tokens_decoder() if backend else tokenizer.added_tokens_decoder
        added = {i for i, token in words.items() if str(token.content).strip(_SPACES)}
        found = frozenset({*added, *tokenizer.all_special_ids} - {tokenizer.unk_token_id})
        _CONTROL[tokenizer] = len(tokenizer), found
    return found


def _backend(tokenizer: Any) -> tokenizers.Tokenizer | None:
    found = getattr(tokenizer, "backend_tokenizer", None)
    return found if isinstance(found, tokenizers.Tokenizer) else None


def _without_control(tokenizer: Any) -> Callable[[str], list[int]]:
    """Encodes by a tokenizer of the same ids that knows no control token."""
    own = _backend(tokenizer)
    if own is None:  # written in Python: it may know a way of its own
        return lambda text: tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    size, backend = _DISARMED.get(tokenizer, (-1, None))
    if backend is None or size != len(tokenizer):  # as in control_ids; it takes long
        backend = _disarmed(own.to_str(), control_ids(tokenizer))
        _DISARMED[tokenizer] = len(tokenizer), backend
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def _disarmed(description: str, ids: frozenset[int]) -> tokenizers.Tokenizer:
    """A tokenizer whose vocabulary has other names, which no text has, for some ids."""
    content = parse_json(description, "The tokenizer", finite=False)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] not in ids]
    model = content["model"]
    vocabulary = model["vocab"]

    def name(i: int) -> str:
        return f"\N{SYMBOL FOR NULL}{i}\N{SYMBOL FOR NULL}"

    if isinstance(vocabulary, list):  # of Unigram: pairs of a piece and its score
        model["vocab"] = [[name(i), -1e9] if i in ids else pair for i, pair in enumerate(vocabulary)]
    else:
        gone = {word for word, i in vocabulary.items() if i in ids}
        model["vocab"] = {name(i) if word in gone else word: i for word, i in vocabulary.items()}
        if "merges" in model:
            pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
            model["merges"] = [[a, b] for a, b in pairs if gone.isdisjoint((a, b, a + b))]
    content["post_processor"] = content["truncation"] = content["padding"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(content))
