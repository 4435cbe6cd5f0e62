"""The tokenizer that a GGUF file describes, rebuilt with the ``tokenizers`` library.

Two kinds: ``gpt2`` is byte-level BPE with a list of merges and a named splitting rule; ``llama`` is
SentencePiece, where any two neighbours that form a piece may merge, the best score first.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from jaxsp.errors import in_a_line
from jaxsp.models.gguf.reader import Metadata
from jaxsp.typing import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # llama.cpp's token types
_SPACE = "▁"  # how SentencePiece writes a space
_LONGEST = 1024  # characters of a piece; looking for merges takes their square
_TOKEN, _MERGE = 400, 300  # bytes that each takes in memory, in the tokenizers library, too

_NUMBERS = r"\p{N}"
_TO_THREE = r"\p{N}{1,3}"


def _words_and(digits: str) -> str:
    """Contractions, words with the sign before them, numbers, signs, ends of lines, spaces."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _camel_case_and(digits: str, contractions: str = "") -> str:
    """The same, but a word begins at a capital after small letters, and has its contraction."""
    before, upper, lower = (
        r"[^\r\n\p{L}\p{N}]?",
        r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
    )
    return (
        f"{before}{upper}*{lower}+{contractions}|{before}{upper}+{lower}*{contractions}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The way a byte-level tokenizer splits a text before it merges.

    Attributes:
      pattern: regular expression of the pieces.
      then_gpt2: whether GPT-2's own rule splits the pieces further.
      adds_bos: whether a text begins with the first token, where the file doesn't say.
      whole_words: whether a piece that is a token is taken without merging.
      composes: whether characters are composed first (NFC), as the original does; llama.cpp does not.
    """

    pattern: str | None
    then_gpt2: bool = False
    adds_bos: bool = False
    whole_words: bool = False
    composes: bool = False


_GPT2 = _Rule(None, then_gpt2=True)
_DIGITS = _Rule(_NUMBERS, then_gpt2=True)
_LLAMA3 = _Rule(_words_and(_TO_THREE), adds_bos=True, whole_words=True)
_QWEN2 = _Rule(_words_and(_NUMBERS), composes=True)
_GPT4O = _Rule(_camel_case_and(_TO_THREE, r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"))

# The regular expressions of the original tokenizer.json files, by the names that llama.cpp gives them:
# https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp (tokenizer_pre, regex_exprs).
_RULES = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "qwen2": _QWEN2,
    "megrez": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "smaug-bpe": _Rule(_LLAMA3.pattern),
    "tekken": _Rule(_camel_case_and(_NUMBERS), adds_bos=True, whole_words=True),
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
}


def build(metadata: Metadata) -> Tokenizer:
    """The tokenizer of a file, without chat template and padding.

    Raises:
      UserError: it is of a kind or splitting rule not supported, or its vocabulary is damaged.
    """
    from tokenizers import AddedToken

    kind = metadata.read("tokenizer.ggml.model", str)
    words = metadata.read("tokenizer.ggml.tokens", list)
    metadata.spend(_TOKEN * len(words))
    kinds = metadata.read("tokenizer.ggml.token_type", np.ndarray)
    types = kinds.tolist() if len(kinds) == len(words) else []
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
        raise UserError(f"its tokenizer can't be built ({in_a_line(error)})") from error
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

    name = metadata.read("tokenizer.ggml.pre", str)
    if (rule := _RULES.get(name)) is None:
        raise UserError(
            f"its tokenizer has the splitting rules {name!r}; from GGUF jaxsp reads"
            f" {', '.join(_RULES)}. Use the model's original directory"
        )
    merges = []
    for pair in metadata.read("tokenizer.ggml.merges", list, []):
        metadata.spend(_MERGE + len(pair))
        merges.append(tuple(pair.split(" ", 1)))
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=rule.whole_words))
    if rule.composes:
        tokenizer.normalizer = normalizers.NFC()
    split = [] if rule.pattern is None else [pre_tokenizers.Split(Regex(rule.pattern), "isolated")]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.then_gpt2)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.adds_bos


def _sentence_piece(metadata: Metadata, words: list[str], types: list[int]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    if metadata.read("tokenizer.ggml.remove_extra_whitespaces", bool, False):
        raise UserError("its tokenizer removes spaces; use the model's original directory")
    # Converters mark it as a control token where the original lists it among the added ones: Gemma's.
    unknown = special_token(metadata, "unknown")
    if unknown is None and _UNKNOWN in types:
        unknown = words[types.index(_UNKNOWN)]
    if sum(type_ == _BYTE for type_ in types) != 256 or unknown is None:
        raise UserError("its tokenizer lacks a token for each byte, or one for what is unknown")
    scores = metadata.read("tokenizer.ggml.scores", np.ndarray)
    if len(scores) != len(words):
        raise UserError(f"its tokenizer has {len(scores)} scores for {len(words)} tokens")
    pieces = {
        word: score
        for word, score, type_ in zip(words, scores.tolist(), types, strict=True)
        if type_ not in (_UNKNOWN, _CONTROL, _BYTE) and word != unknown
    }
    ids = {word: i for i, word in enumerate(words)}
    bpe = models.BPE(ids, _merges(pieces, metadata), unk_token=unknown, fuse_unk=True, byte_fallback=True)
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


def _merges(pieces: dict[str, float], metadata: Metadata) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, the best piece first, then the longest left part."""
    found = []
    for word, score in pieces.items():
        for right in range(1, len(word)):
            if word[:-right] in pieces and word[-right:] in pieces:
                metadata.spend(_MERGE + len(word))
                found.append((-score, right, word))
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
