"""GGUF: every architecture and tensor type, the cache, and what is refused."""

from __future__ import annotations

import math
import os
import struct
import tempfile
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open

import jaxsp
from jaxsp import terminal
from jaxsp.models.gguf import convert, converted, is_converted
from jaxsp.models.lazy_tokenizer import LazyTokenizer
from jaxsp.typing import UserError
from tests import tiny
from tests.gguf_files import SPM, config_of, write_gguf

# Architectures


@pytest.mark.parametrize("architecture", convert.ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_gives_the_logits_of_the_original(tmp_path, cache, architecture, tied):
    config = write_gguf(tmp_path / "m.gguf", architecture, tie_word_embeddings=tied)
    tiny.write(tmp_path / "original", **config)
    a = jaxsp.load_model(tmp_path / "m.gguf", dtype="float32")
    b = jaxsp.load_model(tmp_path / "original", dtype="float32")
    ids = [[1, 7, 30, 4, *range(100, 130)]]
    np.testing.assert_array_equal(a.logits(ids), b.logits(ids))
    text = "<|im_start|>user\n12 words<|im_end|>"
    assert a.tokenizer is not None
    assert b.tokenizer is not None
    assert a.tokenizer(text).input_ids == b.tokenizer(text).input_ids
    assert a.tokenizer.chat_template == b.tokenizer.chat_template
    assert a.stop_ids == b.stop_ids == (2,)
    assert a.config == b.config
    assert [p.name for p in cache.iterdir()] == [a.directory.name]  # nothing half-written is left


def test_a_model_of_the_users_own_in_the_cache_folder_is_not_taken_for_a_conversion(tmp_path, cache):
    """Its config.json lacks defaults, and transformers knows more of its tokenizer than tokenizer.json."""
    config = write_gguf(tmp_path / "m.gguf")
    ours = converted(tmp_path / "m.gguf")
    tiny.write(cache / "mine", **config)
    assert is_converted(ours)
    assert not is_converted(cache / "mine")
    a, b = (jaxsp.load_model(directory, dtype="float32") for directory in (ours, cache / "mine"))
    assert a.config == b.config
    assert [isinstance(model.tokenizer, LazyTokenizer) for model in (a, b)] == [True, False]
    (cache / "programs").mkdir(exist_ok=True)
    with pytest.raises(UserError, match="it has no config"):
        jaxsp.load_model(cache / "programs")


def test_a_llama_with_biases(tmp_path, cache):
    config = write_gguf(tmp_path / "m.gguf", attention_bias=True, mlp_bias=True)
    tiny.write(tmp_path / "original", **config)
    a, b = (jaxsp.load_model(tmp_path / name, dtype="float32") for name in ("m.gguf", "original"))
    np.testing.assert_array_equal(a.logits([[1, 7, 30, 4]]), b.logits([[1, 7, 30, 4]]))


def test_sliding_windows_of_gemma3(tmp_path, cache):
    pattern = "gemma3.attention.sliding_window_pattern"
    kinds = {}
    for every in (None, 3):
        write_gguf(
            tmp_path / f"{every}.gguf", "gemma3", {pattern: every},
            num_hidden_layers=7, layer_types=["full_attention"] * 7,
        )  # fmt: skip
        kinds[every] = [kind[:4] for kind in config_of(tmp_path / f"{every}.gguf")["layer_types"]]
    assert kinds == {None: [*["slid"] * 5, "full", "slid"], 3: [*["slid", "slid", "full"] * 2, "slid"]}
    write_gguf(tmp_path / "full.gguf", "gemma3", {"gemma3.attention.sliding_window": None})
    assert set(config_of(tmp_path / "full.gguf")["layer_types"]) == {"full_attention"}


@pytest.mark.parametrize(("layers", "scale"), [(61, 16), (62, 8)])
def test_scale_of_attention_of_gemma3_27b(tmp_path, cache, layers, scale):
    write_gguf(
        tmp_path / "m.gguf", "gemma3", num_hidden_layers=layers, head_dim=16,
        layer_types=["full_attention"] * layers,
    )  # fmt: skip
    assert config_of(tmp_path / "m.gguf")["query_pre_attn_scalar"] == scale


def llama3_factors(theta: float, head: int, factor: float, window: int = 8192) -> np.ndarray:
    """Written out pair by pair from the paper's words."""
    factors = []
    for pair in range(head // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head)
        if wavelength < window / 4:
            factors.append(1.0)
        elif wavelength > window:
            factors.append(factor)
        else:
            smooth = (window / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_of_llama3(tmp_path, cache, factor):
    tensors = {"rope_freqs.weight": (llama3_factors(5e5, 64, factor), Kind.F32)}
    fields = {"llama.rope.freq_base": 5e5}
    write_gguf(tmp_path / "m.gguf", fields=fields, tensors=tensors, head_dim=64)
    assert config_of(tmp_path / "m.gguf")["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_scaled_ropes(tmp_path, cache):
    linear = {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "linear.gguf", "qwen2", linear)
    assert config_of(tmp_path / "linear.gguf")["rope_parameters"] == {
        "rope_type": "linear", "rope_theta": 1e4, "factor": 4.0,
    }  # fmt: skip
    yarn = linear | {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.original_context_length": 128}
    write_gguf(tmp_path / "yarn.gguf", "qwen2", yarn)
    assert config_of(tmp_path / "yarn.gguf")["rope_parameters"] == {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 128,
    }  # fmt: skip
    jaxsp.load_model(tmp_path / "yarn.gguf", dtype="float32")
    none = linear | {"qwen2.rope.scaling.type": "none"}
    write_gguf(tmp_path / "none.gguf", "qwen2", none)
    assert config_of(tmp_path / "none.gguf")["rope_parameters"]["rope_type"] == "default"


def test_tokens_that_end_a_turn(tmp_path, cache):
    write_gguf(tmp_path / "m.gguf", fields={"tokenizer.ggml.eos_token_id": 0})
    assert config_of(tmp_path / "m.gguf")["eos_token_id"] == [0, 2]  # <|im_end|> by its name
    write_gguf(tmp_path / "n.gguf", fields={"tokenizer.ggml.eot_token_id": 7})
    assert config_of(tmp_path / "n.gguf")["eos_token_id"] == [2, 7]


# Tensor types

UP = "blk.0.ffn_up.weight"


def read_up(path: Path) -> tuple[np.ndarray, str]:
    """The tensor ``UP`` as converted, as float32, and its type in the checkpoint."""
    name = "model.layers.0.mlp.up_proj.weight"
    with safe_open(converted(path) / "model.safetensors", "numpy") as file:
        dtype = file.get_slice(name).get_dtype()
        return np.asarray(file.get_tensor(name), np.float32), dtype


@pytest.mark.parametrize(
    ("kind", "stored", "bound"),  # of the error, relative to the largest of 32 neighbours
    [
        (Kind.F32, "F32", 0.0),
        (Kind.F16, "F16", 2**-11),
        (Kind.BF16, "BF16", 2**-8),
        (Kind.Q8_0, "F32", 0.5 / 127 + 2**-10),
        (Kind.Q5_0, "F32", 1 / 16 + 2**-10),
        (Kind.Q5_1, "F32", 1 / 31 + 2**-10),
        (Kind.Q4_0, "F32", 1 / 8 + 2**-10),
        (Kind.Q4_1, "F32", 1 / 15 + 2**-10),
    ],
)
def test_tensor_types(tmp_path, cache, kind, stored, bound):
    values = np.random.RandomState(0).standard_normal((48, 32)).astype(np.float32)
    write_gguf(tmp_path / "m.gguf", tensors={UP: (gguf.quantize(values, kind), kind)})
    read, dtype = read_up(tmp_path / "m.gguf")
    assert dtype == stored
    error = np.abs(read - values) / np.abs(values).max(axis=1, keepdims=True)
    assert error.max() <= bound
    jaxsp.load_model(tmp_path / "m.gguf", dtype="float32")


def nibbles(block: bytes) -> list[int]:
    return [b & 15 for b in block] + [b >> 4 for b in block]


def half(block: bytes) -> float:
    return struct.unpack("<e", block)[0]


def q4_k(block: bytes) -> list[float]:
    """256 weights: two float16, 12 bytes with 8 scales and 8 minima of 6 bits, 128 of nibbles."""
    scale, minimum, packed, weights = half(block[:2]), half(block[2:4]), block[4:16], block[16:]
    out = []
    for i in range(8):
        if i < 4:
            its, least = packed[i] & 63, packed[i + 4] & 63
        else:
            its = packed[i + 4] & 15 | packed[i - 4] >> 6 << 4
            least = packed[i + 4] >> 4 | packed[i] >> 6 << 4
        quarter = weights[i // 2 * 32 : i // 2 * 32 + 32]
        row = nibbles(quarter)[i % 2 * 32 :][:32]
        out += [scale * its * w - minimum * least for w in row]
    return out


def q6_k(block: bytes) -> list[float]:
    """256 weights: 128 bytes of low nibbles, 64 of high pairs of bits, 16 int8 scales, one float16."""
    low, high, scales, scale = block[:128], block[128:192], block[192:208], half(block[208:])
    out = []
    for i in range(256):
        part, place = divmod(i % 128, 32)  # which quarter of which half, and where in it
        byte = low[i // 128 * 64 + part % 2 * 32 + place]
        upper = high[i // 128 * 32 + place] >> 2 * part & 3
        its = struct.unpack("b", scales[i // 16 : i // 16 + 1])[0]
        out.append(scale * its * ((byte >> 4 * (part // 2) & 15 | upper << 4) - 32))
    return out


@pytest.mark.parametrize(
    ("kind", "decode", "size", "halves"), [(Kind.Q4_K, q4_k, 144, (0, 2)), (Kind.Q6_K, q6_k, 210, (208,))]
)
def test_k_quants(tmp_path, cache, kind, decode, size, halves):
    blocks = np.random.RandomState(0).randint(0, 256, (48, size)).astype(np.uint8)
    for at in halves:  # scales of an ordinary size
        blocks[:, at : at + 2] = np.frombuffer(struct.pack("<e", 0.01 * (1 + at)), np.uint8)
    write_gguf(tmp_path / "m.gguf", tensors={UP: (blocks, kind)}, hidden_size=256)
    read, dtype = read_up(tmp_path / "m.gguf")
    assert dtype == "F32"
    expected = np.array([decode(row.tobytes()) for row in blocks])
    np.testing.assert_allclose(read, expected, rtol=1e-5, atol=1e-5)


def test_memory_does_not_grow_with_the_model(tmp_path, cache, frugal):
    wide = 1 << 17
    up, down = np.zeros((wide, 34), np.uint8), np.zeros((32, wide // 32 * 34), np.uint8)
    tensors = {
        f"blk.{layer}.ffn_{part}.weight": (down if part == "down" else up, Kind.Q8_0)
        for layer in (0, 1)
        for part in ("up", "gate", "down")
    }
    width = "llama.feed_forward_length"
    write_gguf(tmp_path / "m.gguf", fields={width: wide}, tensors=tensors)
    tracemalloc.reset_peak()  # from here on it is the conversion's
    directory = converted(tmp_path / "m.gguf")
    assert (directory / "model.safetensors").stat().st_size > 96 << 20


# The cache


def test_conversion_is_reused_until_the_file_changes(tmp_path, cache):
    write_gguf(tmp_path / "m.gguf")
    first = converted(tmp_path / "m.gguf")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert converted(tmp_path / "m.gguf") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    os.utime(tmp_path / "m.gguf", ns=(1, 1))
    assert converted(tmp_path / "m.gguf") != first


DAMAGE = {
    "a bit of the weights": ("model.safetensors", lambda data: data[:-7] + bytes([data[-7] ^ 1]) + data[-6:]),
    "the weights' end": ("model.safetensors", lambda data: data[:-4]),
    "a bit of the tokenizer": ("tokenizer.json", lambda data: data.replace(b'"A"', b'"@"', 1)),
    "no configuration": ("config.json", None),
    "no tokenizer": ("tokenizer.json", None),
    "no mark": ("converted_by_jaxsp", None),
    "half a mark": ("converted_by_jaxsp", lambda data: data[:-9]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_conversion_is_made_anew(tmp_path, cache, caplog, name):
    write_gguf(tmp_path / "m.gguf", num_hidden_layers=1)
    sound = jaxsp.load_model(tmp_path / "m.gguf", dtype="float32")
    part, damage = DAMAGE[name]
    file = sound.directory / part
    whole = file.read_bytes()
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(whole))
    again = jaxsp.load_model(tmp_path / "m.gguf", dtype="float32")
    assert (again.directory, again.fingerprint) == (sound.directory, sound.fingerprint)
    assert file.read_bytes() == whole
    assert "is not as it was written: the model is converted anew" in caplog.text


def test_weights_that_are_no_numbers_are_no_damage(tmp_path, cache):
    values = np.full((48, 32), np.nan, np.float32)
    write_gguf(tmp_path / "m.gguf", tensors={UP: (values, Kind.F32)})
    with pytest.raises(UserError, match=r"mlp\.up_proj\.weight holds NaN"):
        jaxsp.load_model(tmp_path / "m.gguf", dtype="float32")
    assert converted(tmp_path / "m.gguf").is_dir()


@pytest.mark.parametrize("why", ["a file", "read-only", "no home"])
def test_without_a_cache_a_conversion_lasts_as_long_as_the_process(tmp_path, cache, monkeypatch, caplog, why):
    write_gguf(tmp_path / "m.gguf", num_hidden_layers=1)
    make = tempfile.mkdtemp

    def refuse(*args, **options):
        if Path(options.get("dir") or "") == cache:
            raise OSError(30, "Read-only file system")
        return make(*args, **options)

    if why == "a file":
        cache.write_text("")
    elif why == "read-only":
        monkeypatch.setattr("tempfile.mkdtemp", refuse)
    else:
        monkeypatch.delenv("JAXSP_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home folder")))
    terminal.say_once.cache_clear()
    first = converted(tmp_path / "m.gguf")
    assert first == converted(tmp_path / "m.gguf")
    assert is_converted(first)
    assert cache not in first.parents
    assert caplog.text.count("are not kept for the next run") == 1
    assert [path.name for path in first.parent.iterdir()].count(first.name) == 1


def test_what_killed_conversions_left_is_cleared(tmp_path, cache):
    write_gguf(tmp_path / "m.gguf", num_hidden_layers=1)
    converted(tmp_path / "m.gguf")
    for name, age in (("old", 3600), ("running", 0)):
        scratch = cache / f"{name}-0123456789abcdef.ab_d1234"
        scratch.mkdir()
        (scratch / "model.safetensors").write_bytes(b"begun")
        for path in (scratch / "model.safetensors", scratch):
            os.utime(path, (time.time() - age, time.time() - age))
    converted(tmp_path / "m.gguf")
    assert {path.name.split("-")[0] for path in cache.iterdir()} == {"m", "running"}


def test_a_full_disk_leaves_nothing_behind(tmp_path, cache, monkeypatch):
    def full(path, tensors):
        path.write_bytes(b"begun")
        raise OSError(28, "No space left on device")

    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(convert, "_write_safetensors", full)
    with pytest.raises(UserError, match="No space left"):
        converted(tmp_path / "m.gguf")
    assert not any(cache.iterdir())


@pytest.mark.slow
def test_second_load_of_the_embedded_model_is_fast(smollm2, python):
    # torch, where it is installed, would be imported by transformers: 5 s that are not ours.
    code = (
        "import sys, time; sys.modules['torch'] = None; begun = time.process_time()\n"
        "from jaxsp.models.load import load_model; started = time.process_time()\n"
        "load_model('smollm2-135m-instruct')\n"
        "print((time.process_time() - started) / (started - begun))"
    )
    # Python caches bytecode for its users; where a machine forbids it, half the time is compiling imports.
    cached = {"PYTHONDONTWRITEBYTECODE": ""}
    ratios = [float(python("-c", code, env=cached).stdout.split()[-1]) for _ in range(3)]
    # CPU time of all its threads, by that of importing jax and flax: machines differ threefold in both.
    assert min(ratios) < 5.0


# What is refused

ZEROS = np.zeros((4, 4), np.float32), Kind.F32


@pytest.mark.parametrize(
    ("architecture", "fields", "tensors", "message"),
    [
        (
            "llama",
            {"general.architecture": "mamba"},
            {},
            "'mamba' model, but from GGUF jaxsp reads llama, qwen2, qwen3, gemma3",
        ),
        ("llama", {"tokenizer.ggml.pre": "viking"}, {}, "'viking'.*original directory"),
        ("llama", {"tokenizer.ggml.pre": None}, {}, "'tokenizer.ggml.pre' is missing"),
        ("llama", {"tokenizer.ggml.model": "bert"}, {}, "'bert'.*original directory"),
        ("llama", {"tokenizer.ggml.tokens": ["a", "b", "a"]}, {}, "vocabulary is damaged"),
        ("llama", {"tokenizer.ggml.token_type": [1]}, {}, "vocabulary is damaged"),
        ("llama", {"tokenizer.ggml.merges": ["no such"]}, {}, "tokenizer can't be built"),
        ("llama", {"tokenizer.ggml.eos_token_id": 999}, {}, "eos token 999 is not in"),
        ("llama", SPM | {"tokenizer.ggml.scores": [0.0]}, {}, "1 scores for 259 tokens"),
        ("llama", SPM | {"tokenizer.ggml.token_type": [1] * 259}, {}, "token for each byte"),
        ("llama", SPM | {"tokenizer.ggml.bos_token_id": None}, {}, "adds a bos token"),
        ("llama", SPM | {"tokenizer.ggml.remove_extra_whitespaces": True}, {}, "removes spaces"),
        ("llama", {"llama.rope.scaling.type": "longrope"}, {}, "'longrope'"),
        ("llama", {"llama.rope.scaling.yarn_log_multiplier": 0.1}, {}, "yarn_log_multiplier"),
        ("llama", {"llama.rope.dimension_count": 4}, {}, "whole heads"),
        ("llama", {"llama.rope.freq_base": -1.0}, {}, "rope.freq_base is -1.0"),
        ("llama", {}, {"rope_freqs.weight": (np.arange(1, 5, dtype=np.float32), Kind.F32)}, "Llama 3"),
        ("llama", {}, {"blk.0.attn_sinks.weight": ZEROS}, "blk.0.attn_sinks.weight.* no place"),
        ("llama", {}, {"blk.2.attn_q.weight": ZEROS}, "blk.2.attn_q.weight.* no place"),
        ("qwen3", {}, {"blk.0.attn_q.bias": ZEROS}, "blk.0.attn_q.bias.* no place"),
        ("llama", {}, {UP: ZEROS}, r"ffn_up.weight is \(4, 4\), but by its metadata \(48, 32\)"),
        ("llama", {"llama.block_count": 3}, {}, "lacks the tensor blk.2.attn_k.weight"),
        ("llama", {"llama.block_count": 1 << 30}, {}, "21 tensors for 1073741824 layers"),
        ("llama", {"llama.embedding_length": 1 << 30}, {}, r"width \[32\], but by its metadata 1073741824"),
        ("gemma3", SPM | {"gemma3.attention.key_length": 1 << 30}, {}, "heads are 1073741824 wide"),
        ("llama", {"llama.context_length": 0}, {}, "llama.context_length is 0"),
        ("llama", {"llama.context_length": "long"}, {}, "'llama.context_length' is not of type int"),
        ("llama", {"llama.embedding_length": None}, {}, "'llama.embedding_length' is missing"),
        ("llama", {"split.count": 3}, {}, "one of 3 parts"),
        ("qwen2", {"qwen2.attention.causal": False}, {}, "not causal"),
        ("gemma3", {"gemma3.attention.sliding_window_pattern": [True] * 99}, {}, "in 4 of 3 layers"),
        ("llama", {"general.alignment": 48}, {}, "alignment 48"),
    ],
)
def test_refusals_name_what_is_wrong(tmp_path, cache, architecture, fields, tensors, message):
    write_gguf(tmp_path / "m.gguf", architecture, fields, tensors)
    with pytest.raises(UserError, match=message):
        jaxsp.load_model(tmp_path / "m.gguf")
    assert not any(cache.iterdir())
