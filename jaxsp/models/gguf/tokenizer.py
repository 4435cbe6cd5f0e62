"""The tokenizer that a GGUF file describes, rebuilt with the ``tokenizers`` library.

Two kinds: ``gpt2`` is byte-level BPE with a list of merges and a named splitting rule; ``llama`` is
SentencePiece, where any two neighbours that form a piece may merge, the best score first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxsp.models.gguf.reader import Metadata
from jaxsp.typing import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # llama.cpp's token types
_SPACE = "▁"  # how SentencePiece writes a space
_LONGEST = 1024  # characters of a piece; looking for merges takes their square


def _words_and(digits: str) -> str:
    """Contractions, words with the sign before them, numbers, signs, ends of lines, spaces."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# The splitting rules of the original tokenizers by llama.cpp's names: before GPT-2's own, or instead.
_BEFORE = {"gpt-2": None, "smollm": r"\p{N}"}
_INSTEAD = {"qwen2": _words_and(r"\p{N}"), "llama-bpe": _words_and(r"\p{N}{1,3}")}
_RULES = {**_BEFORE, **_INSTEAD}


def build(metadata: Metadata) -> Tokenizer:
    """The tokenizer of a file, without chat template and padding.

    Raises:
      UserError: it is of a kind or splitting rule not supported, or its vocabulary is damaged.
    """
    from tokenizers import AddedToken

    kind = metadata.read("tokenizer.ggml.model", str)
    words = metadata.read("tokenizer.ggml.tokens", list)
    types = metadata.read("tokenizer.ggml.token_type", np.ndarray).tolist()
    if len(set(words)) < len(words) or len(types) != len(words) or not all(words):
        raise UserError("its vocabulary is damaged: tokens are empty, repeated or without a type")
    if longest := [word for word in words if len(word) > _LONGEST]:
        raise UserError(f"its vocabulary has a token of {len(longest[0])} characters")
    try:
        if kind == "gpt2":
            tokenizer, adds_bos = _byte_level(metadata, words)
        elif kind == "llama":
            tokenizer, adds_bos = _sentence_piece(metadata, words, types), True
        else:
            raise UserError(
                f"its tokenizer is of the kind {kind!r}; from GGUF jaxsp reads 'gpt2' and 'llama'."
                " Use the model's original directory"
            )
        added = [
            AddedToken(word, special=its == _CONTROL, normalized=False)
            for word, its in zip(words, types, strict=True)
            if its in (_CONTROL, _USER_DEFINED)
        ]
        tokenizer.add_tokens(added)
        _frame(tokenizer, metadata, adds_bos)
    except UserError:
        raise
    except Exception as error:  # what the library makes of a damaged vocabulary
        raise UserError(f"its tokenizer can't be built ({error})") from error
    return tokenizer


def special_token(metadata: Metadata, role: str) -> str | None:
    """The token that has a role (``bos``, ``eos``, ``unknown``, ``padding``), if any has."""
    name = f"tokenizer.ggml.{role}_token_id"
    if name not in metadata:
        return None
    i, words = metadata.read(name, int), metadata.read("tokenizer.ggml.tokens", list)
    if not 0 <= i < len(words):
        raise UserError(f"its {role} token {i} is not in the vocabulary of {len(words)}")
    return words[i]


def _byte_level(metadata: Metadata, words: list[str]) -> tuple[Tokenizer, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    rule = metadata.read("tokenizer.ggml.pre", str)
    if rule not in _RULES:
        raise UserError(
            f"its tokenizer has the splitting rules {rule!r}; from GGUF jaxsp reads"
            f" {', '.join(_RULES)}. Use the model's original directory"
        )
    merges = [tuple(pair.split(" ", 1)) for pair in metadata.read("tokenizer.ggml.merges", list, [])]
    llama = rule == "llama-bpe"
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=llama))
    if rule == "qwen2":  # as its original does; llama.cpp does not
        tokenizer.normalizer = normalizers.NFC()
    pattern = _RULES[rule]
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule in _BEFORE)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, llama


def _sentence_piece(metadata: Metadata, words: list[str], types: list[int]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    if metadata.read("tokenizer.ggml.remove_extra_whitespaces", bool, False):
        raise UserError("its tokenizer removes spaces; use the model's original directory")
    if sum(type_ == _BYTE for type_ in types) != 256 or _UNKNOWN not in types:
        raise UserError("its tokenizer lacks a token for each byte and for what is unknown")
    scores = metadata.read("tokenizer.ggml.scores", np.ndarray).tolist()
    if len(scores) != len(words):
        raise UserError(f"its tokenizer has {len(scores)} scores for {len(words)} tokens")
    pieces = {
        word: score
        for word, score, type_ in zip(words, scores, types, strict=True)
        if type_ not in (_UNKNOWN, _CONTROL, _BYTE)
    }
    ids, unknown = {word: i for i, word in enumerate(words)}, words[types.index(_UNKNOWN)]
    bpe = models.BPE(ids, _merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(" ", _SPACE)
    undo = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.read("tokenizer.ggml.add_space_prefix", bool, True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = spaces
        tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer


def _merges(pieces: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, the best piece first, then the longest left part."""
    found = [
        (-score, right, word)
        for word, score in pieces.items()
        for right in range(1, len(word))
        if word[:-right] in pieces and word[-right:] in pieces
    ]
    return [(word[:-right], word[-right:]) for _, right, word in sorted(found)]


def _frame(tokenizer: Tokenizer, metadata: Metadata, adds_bos: bool) -> None:
    """Has the tokenizer put the file's first and last token around a text."""
    from tokenizers import processors

    def token(role: str, default: bool) -> list[str]:
        if not metadata.read(f"tokenizer.ggml.add_{role}_token", bool, default):
            return []
        word = special_token(metadata, role)
        if word is None:
            raise UserError(f"its tokenizer adds a {role} token, but the file does not say which")
        return [word]

    before, after = token("bos", adds_bos), token("eos", False)
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[(word, tokenizer.token_to_id(word)) for word in {*before, *after}],
        )
