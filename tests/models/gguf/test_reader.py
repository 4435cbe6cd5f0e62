"""Damaged GGUF files: one clear error, whatever they say, and no memory for lengths that lie."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import jaxsp
from jaxsp.models.gguf import convert, reader
from jaxsp.typing import UserError
from tests.conftest import slow_beside
from tests.gguf_files import SPM, write_gguf


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "m.gguf"
    write_gguf(path, fields={"tokenizer.ggml.merges": ["a b"]}, num_hidden_layers=1)
    return path.read_bytes()


def outcome(folder: Path, data: bytes) -> str:
    """``"loaded"``, or the message of the ``UserError``; any other exception is a failure."""
    (folder / "damaged.gguf").write_bytes(data)
    try:
        jaxsp.load_model(folder / "damaged.gguf", dtype="float32")
    except UserError as error:
        return str(error)
    return "loaded"


def test_truncated_file(tmp_path, cache, valid):
    sizes = [*range(48), *range(48, len(valid), 331), len(valid) - 1]
    for size in sizes:
        assert "download it again" in (message := outcome(tmp_path, valid[:size])) or size < 4, message
    assert "is empty" in outcome(tmp_path, b"")
    assert not any(cache.iterdir())


HUGE = [1 << 31, 1 << 60, (1 << 63) - 1, (1 << 64) - 1]


@pytest.mark.parametrize(
    ("after", "skip", "code", "values", "message"),
    [
        (b"GGUF", -4, "I", [0, 0x67676D6C], "not a GGUF file"),
        (b"GGUF", 0, "I", [0, 1, 4, 3 << 24], "GGUF version"),
        (b"GGUF", 4, "Q", HUGE, "ends in the middle of its header"),  # how many tensors
        (b"GGUF", 12, "Q", HUGE, "ends in the middle|unknown type|UTF-8|twice"),  # how many fields
        (b"GGUF", 20, "Q", HUGE, "ends in the middle"),  # how long the first field's name is
        (b"tokenizer.ggml.tokens", 0, "I", [13, 1 << 31], "unknown type"),
        (b"tokenizer.ggml.tokens", 4, "I", [9, 13], "array of elements"),
        (b"tokenizer.ggml.tokens", 8, "Q", HUGE, "ends in the middle|UTF-8"),  # how many tokens
        (b"tokenizer.ggml.token_type", 8, "Q", HUGE, "ends in the middle"),
        (b"token_embd.weight", 0, "I", [0, 5, 1 << 31], "impossible dimensions|ends in the middle"),
        (b"token_embd.weight", 4, "Q", [0], "impossible dimensions"),
        (b"token_embd.weight", 4, "Q", HUGE, "ends before the tensor"),
        (b"token_embd.weight", 20, "I", [4, 1000], "unknown type"),
        (b"token_embd.weight", 20, "I", [12], "not a multiple of 256"),
        (b"token_embd.weight", 24, "Q", HUGE, "ends before the tensor"),  # where it is
        (b"output_norm.weight", 16, "Q", [32], "overlap"),
    ],
)
def test_lying_headers(tmp_path, cache, frugal, valid, after, skip, code, values, message):
    at = valid.index(after) + len(after) + skip
    for value in values:
        field = struct.pack(f"<{code}", value)
        message = outcome(tmp_path, valid[:at] + field + valid[at + len(field) :])
        assert any(part in message for part in message.split("|")), message


def test_what_is_built_of_metadata_is_bounded_by_the_file(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(reader, "_ANYWAY", 0)
    write_gguf(tmp_path / "m.gguf", num_hidden_layers=1)
    valid = (tmp_path / "m.gguf").read_bytes()
    assert outcome(tmp_path, valid) == "loaded"
    at = valid.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    strings = struct.pack("<Q", 1 << 16) + bytes(8 << 16)  # each empty
    monkeypatch.setattr(reader, "_TIMES", 4)
    assert "far more memory than the file is large" in outcome(tmp_path, valid[:at] + strings + valid[at:])


def test_names_that_appear_twice(tmp_path, cache, valid):
    message = outcome(tmp_path, valid.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"))
    assert "'blk.0.attn_k.weight' appears twice" in message
    message = outcome(tmp_path, valid.replace(b"llama.block_count", b"llama.block_block"))
    assert "'llama.block_count' is missing" in message
    message = outcome(tmp_path, valid.replace(b"eos_token_id", b"bos_token_id"))
    assert "'tokenizer.ggml.bos_token_id' appears twice" in message


@pytest.fixture(scope="module")
def numbers(valid, tmp_path_factory) -> list[tuple[int, int]]:
    """Offset and size of every number in the header: counts, lengths, types, values."""
    found = []
    path = tmp_path_factory.mktemp("numbers") / "m.gguf"
    path.write_bytes(valid)
    with pytest.MonkeyPatch.context() as patch:
        number = reader._Cursor.number

        def noted(self, code: str):
            found.append((self.at, struct.calcsize(f"<{code}")))
            return number(self, code)

        patch.setattr(reader._Cursor, "number", noted)
        reader.read(path)
    return found


EDITS = st.tuples(
    st.sampled_from(["number", "number", "number", "byte", "cut"]),
    st.integers(0, 1 << 20),
    st.sampled_from([0, 1, 2, 3, 7, 8, 9, 32, 255, 1 << 16, *HUGE]) | st.integers(0, 255),
)


@pytest.mark.slow
def test_damaged_bytes(tmp_path, cache, frugal, valid, numbers):
    @settings(max_examples=250, derandomize=True, deadline=None, database=None)
    @given(st.lists(EDITS, min_size=1, max_size=3))
    def run(edits):
        data = bytearray(valid)
        for what, where, value in edits:
            if what == "number":
                at, size = numbers[where % len(numbers)]
                data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
            elif what == "byte":
                data[where % len(data)] = value % 256
            else:
                del data[max(1, where % len(data)) :]
        outcome(tmp_path, bytes(data))

    run()


SMALL = st.sampled_from([0, 1, 2, 3, 7, 16, 255, (1 << 31) - 1, 1 << 31, 1 << 63, -1])
VALUES = (
    SMALL
    | st.sampled_from([0.0, -1.0, 1e-30, 1e308, math.nan, math.inf])
    | st.booleans()
    | st.sampled_from(["", "none", "linear", "yarn", "gpt2", "llama", "qwen2", "{% for %}"])
    | st.sampled_from([[], ["a"], ["a", ""], ["$0", "$A"], ["a b", "a"], ["x" * 2000]])
    | st.sampled_from([np.zeros(0), np.arange(3), np.array([True]), np.full(257, 3)])
)
MORE = [
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.dimension_count", "attention.sliding_window", "attention.sliding_window_pattern",
    "rope.freq_base_swa", "final_logit_softcapping", "attention.causal",
]  # fmt: skip
TOKENIZER = [
    "merges", "scores", "add_bos_token", "add_eos_token", "add_space_prefix", "unknown_token_id",
    "padding_token_id", "eot_token_id", "remove_extra_whitespaces",
]  # fmt: skip


@pytest.mark.parametrize("architecture", slow_beside(["llama", "gemma3"], "gemma3"))
def test_odd_metadata(tmp_path, cache, monkeypatch, architecture):
    """A sound file whose fields say odd things, of every type."""
    path = tmp_path / "m.gguf"
    fields = SPM if architecture == "gemma3" else {}
    write_gguf(path, architecture, fields, num_hidden_layers=1, layer_types=["full_attention"])
    sound, tensors = reader.read(path)
    names = [*sound, *(f"{architecture}.{name}" for name in MORE)]
    names += [f"tokenizer.ggml.{name}" for name in TOKENIZER]
    data = path.read_bytes()

    @settings(max_examples=150, derandomize=True, deadline=None, database=None)
    @given(st.lists(st.tuples(st.sampled_from(names), VALUES), min_size=1, max_size=2))
    def run(changes):
        odd = reader.Metadata({**sound, **dict(changes)})
        monkeypatch.setattr(convert, "read", lambda path: (odd, dict(tensors)))
        outcome(tmp_path, data)

    run()
