"""Tokenizers rebuilt from GGUF files: the ids that llama.cpp gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxsp.models.gguf.reader import Metadata
from jaxsp.models.gguf.tokenizer import build

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
