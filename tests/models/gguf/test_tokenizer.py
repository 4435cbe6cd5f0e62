"""Tokenizers rebuilt from GGUF files: the ids that llama.cpp gives."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex

from jaxsp.models.gguf.reader import Metadata
from jaxsp.models.gguf.tokenizer import build
from jaxsp.typing import UserError

GOLDENS = Path(__file__).parents[2] / "goldens"
IDS = json.loads((GOLDENS / "token_ids.json").read_text("utf-8"))
KINDS = json.loads((GOLDENS / "token_ids_kinds.json").read_text("utf-8"))


@pytest.mark.parametrize("row", IDS, ids=range(len(IDS)))
def test_token_ids_are_those_of_llama_cpp(smollm2, row):
    assert smollm2.tokenizer(row["text"]).input_ids == row["ids"]
    assert smollm2.tokenizer.decode(row["ids"]) == row["text"]


def tokenizer_fields(**fields: Any) -> Metadata:
    """Metadata with one of the golden vocabularies."""
    all_ = {**KINDS["vocabularies"][fields["model"]], "bos_token_id": 1, "eos_token_id": 2, **fields}
    arrays = {name: np.array(all_[name]) for name in ("scores", "token_type") if name in all_}
    return Metadata({f"tokenizer.ggml.{name}": value for name, value in (all_ | arrays).items()})


@pytest.mark.parametrize("row", KINDS["rows"], ids=lambda row: "-".join(map(str, row["fields"].values())))
def test_every_kind_gives_the_ids_of_llama_cpp(row):
    tokenizer = build(tokenizer_fields(**row["fields"]))
    for its, ids in zip(IDS, row["ids"], strict=True):
        assert tokenizer.encode(its["text"], add_special_tokens=False).ids == ids, its["text"]


WORDS = r"[^\r\n\p{L}\p{N}]?"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PUBLISHED = {
    "tekken": f"{WORDS}{UPPER}*{LOWER}+|{WORDS}{UPPER}+{LOWER}*|\\p{{N}}{ENDS}",
    "gpt-4o": f"{WORDS}{UPPER}*{LOWER}+{SHORT}|{WORDS}{UPPER}+{LOWER}*{SHORT}|\\p{{N}}{{1,3}}{ENDS}",
}


@pytest.mark.parametrize("rule", PUBLISHED)
def test_published_rules_split_as_another_library_reads_them(rule):
    split = build(tokenizer_fields(model="gpt2", pre=rule)).pre_tokenizer
    assert split is not None
    for row in IDS:
        pieces = [row["text"][a:b] for _, (a, b) in split.pre_tokenize_str(row["text"])]
        assert pieces == regex.findall(PUBLISHED[rule], row["text"])


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("tekken", ["Don", "'t", " Camel", "Case", " ", "1", "2", "3", "4", "!/"]),
        ("gpt-4o", ["Don't", " Camel", "Case", " ", "123", "4", "!/"]),
        ("llama3", ["Don", "'t", " CamelCase", " ", "123", "4", "!/"]),
        ("deepseek-r1-qwen", ["Don", "'t", " CamelCase", " ", "1", "2", "3", "4", "!/"]),
        ("starcoder", ["Don", "'t", " CamelCase", " ", "1", "2", "3", "4", "!/"]),
    ],
)
def test_what_the_rules_split(rule, pieces):
    text = "Don't CamelCase 1234!/"
    split = build(tokenizer_fields(model="gpt2", pre=rule)).pre_tokenizer
    assert split is not None
    assert [text[a:b] for _, (a, b) in split.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize("rule", ["llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe", "phi-2", "megrez"])
def test_other_names_of_a_rule(rule):
    same = {"smaug-bpe": "llama-bpe", "phi-2": "gpt-2", "megrez": "qwen2"}.get(rule, "llama-bpe")
    a, b = (build(tokenizer_fields(model="gpt2", pre=name)).pre_tokenizer for name in (rule, same))
    for row in IDS:
        assert a.pre_tokenize_str(row["text"]) == b.pre_tokenize_str(row["text"])


def test_what_is_unknown_may_be_a_control_token_that_the_file_names():
    """As the converter marks it where it is among the original's added tokens: in Gemma 3."""
    plain = tokenizer_fields(model="llama")
    types = plain["tokenizer.ggml.token_type"].copy()
    types[0] = 3
    gemma = {**plain, "tokenizer.ggml.token_type": types}
    with pytest.raises(UserError, match="for what is unknown"):
        build(Metadata(gemma))
    named = build(Metadata({**gemma, "tokenizer.ggml.unknown_token_id": 0}))
    for row in IDS:
        assert named.encode(row["text"]).ids == build(plain).encode(row["text"]).ids


@pytest.mark.slow
def test_merges_are_bounded_by_the_file():
    """1,024 tokens of one letter: half a million ways to put them together."""
    fields = tokenizer_fields(model="llama")
    more = ["a" * n for n in range(2, 1025)]
    tokens = [*fields["tokenizer.ggml.tokens"], *more]
    types = np.append(fields["tokenizer.ggml.token_type"], np.ones(len(more), int))
    scores = np.append(fields["tokenizer.ggml.scores"], -np.arange(len(more)))
    parts = {"tokens": tokens, "token_type": types, "scores": scores}
    hostile = Metadata({**fields, **{f"tokenizer.ggml.{name}": value for name, value in parts.items()}})
    hostile.room = 64 << 20
    tracemalloc.start()
    with pytest.raises(UserError, match="far more memory than the file is large"):
        build(hostile)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 << 20


def test_sentence_piece_reads_back_what_it_wrote():
    fields = {"model": "llama", "add_space_prefix": False}
    tokenizer = build(tokenizer_fields(**fields))
    for row in IDS:
        ids = tokenizer.encode(row["text"], add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == row["text"]
    prefixed = build(tokenizer_fields(model="llama"))
    assert prefixed.decode(prefixed.encode("a b").ids) == "a b"


@pytest.mark.parametrize(
    ("fields", "first", "last"),
    [
        ({"model": "gpt2", "pre": "llama-bpe"}, [1], []),
        ({"model": "gpt2", "pre": "llama-bpe", "add_bos_token": False}, [], []),
        ({"model": "gpt2", "pre": "qwen2"}, [], []),
        ({"model": "gpt2", "pre": "qwen2", "add_bos_token": True}, [1], []),
        ({"model": "llama"}, [1], []),
        ({"model": "llama", "add_eos_token": True}, [1], [2]),
    ],
)
def test_first_and_last_token(fields, first, last):
    tokenizer = build(tokenizer_fields(**fields))
    plain = tokenizer.encode("some text", add_special_tokens=False).ids
    assert tokenizer.encode("some text").ids == [*first, *plain, *last]
