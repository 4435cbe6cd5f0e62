"""GGUF: the embedded model's tokenizer and weights, the cache, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest

import jaxsp
from jaxsp.models import gguf as ours
from jaxsp.typing import UserError
from tests import tiny

IDS = json.loads((Path(__file__).parents[1] / "goldens" / "token_ids.json").read_text("utf-8"))


@pytest.mark.parametrize("row", IDS, ids=range(len(IDS)))
def test_token_ids_are_those_of_llama_cpp(smollm2, row):
    assert smollm2.tokenizer(row["text"]).input_ids == row["ids"]
    assert smollm2.tokenizer.decode(row["ids"]) == row["text"]


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key rows."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, **fields) -> dict:
    """The tiny model as a GGUF file, quantised by the gguf package; gives its config."""
    config = tiny.config(tie_word_embeddings=True)
    writer = gguf.GGUFWriter(path, fields.get("architecture", "llama"))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    if "rope" in fields:
        writer.add_rope_scaling_type(fields["rope"])
    vocabulary = tiny.tokenizer().get_vocab()
    words = sorted(vocabulary, key=lambda word: vocabulary[word])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.get("pre", "smollm"))
    writer.add_token_list(words)
    writer.add_token_types([3 if word in tiny.SPECIAL else 1 for word in words])
    writer.add_token_merges([])
    writer.add_eos_token_id(2)
    writer.add_chat_template(tiny.CHAT_TEMPLATE)
    back = {theirs: name for name, theirs in ours._TENSORS.items()}
    layer_back = {theirs: name for name, theirs in ours._LAYER_TENSORS.items()}
    for name, tensor in tiny.tensors(config).items():
        if name in back:
            gguf_name = back[name]
        else:
            _, _, layer, *part, kind = name.split(".")
            gguf_name = f"blk.{layer}.{layer_back['.'.join(part)]}.{kind}"
        if name.endswith("q_proj.weight"):
            tensor = interleave(tensor, 4)
        elif name.endswith("k_proj.weight"):
            tensor = interleave(tensor, 2)
        writer.add_tensor(gguf_name, tensor)
    if "extra" in fields:
        writer.add_tensor(fields["extra"], np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_gguf_gives_the_logits_of_the_original(tmp_path, cache):
    write_gguf(tmp_path / "m.gguf")
    tiny.write(tmp_path / "original", tie_word_embeddings=True)
    a = jaxsp.load_model(tmp_path / "m.gguf", dtype="float32")
    b = jaxsp.load_model(tmp_path / "original", dtype="float32")
    np.testing.assert_array_equal(a.logits([[1, 7, 30, 4]]), b.logits([[1, 7, 30, 4]]))
    text = "<|im_start|>user\n12 words<|im_end|>"
    assert a.tokenizer(text).input_ids == b.tokenizer(text).input_ids
    assert a.stop_ids == b.stop_ids == (2,)
    assert [p.name for p in cache.iterdir()] == [a.directory.name]  # nothing half-written is left


def test_conversion_is_reused_until_the_file_changes(tmp_path, cache):
    write_gguf(tmp_path / "m.gguf")
    first = ours.converted(tmp_path / "m.gguf")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert ours.converted(tmp_path / "m.gguf") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    os.utime(tmp_path / "m.gguf", ns=(1, 1))
    assert ours.converted(tmp_path / "m.gguf") != first


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "mamba"}, "'mamba'"),
        ({"pre": "llama-bpe"}, "'llama-bpe'"),
        ({"rope": gguf.RopeScalingType.YARN}, "'yarn'"),
        ({"extra": "blk.0.attn_sinks.weight"}, "blk.0.attn_sinks.weight"),
    ],
)
def test_refusals_name_what_is_wrong(tmp_path, cache, fields, message):
    write_gguf(tmp_path / "m.gguf", **fields)
    with pytest.raises(UserError, match=message):
        jaxsp.load_model(tmp_path / "m.gguf")
    assert not any(cache.iterdir())


def test_truncated_file(tmp_path, cache):
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    for size in (0, 3, 100, len(data) // 2):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(UserError, match="not a readable GGUF file"):
            jaxsp.load_model(tmp_path / "cut.gguf")


def test_second_load_of_the_embedded_model_is_fast(smollm2, python):
    # torch, where it is installed, would be imported by transformers: 5 s that are not ours.
    code = (
        "import sys, time; sys.modules['torch'] = None\n"
        "import jaxsp; started = time.perf_counter()\n"
        "jaxsp.load_model('smollm2-135m-instruct'); print(time.perf_counter() - started)"
    )
    # Python caches bytecode for its users; where a machine forbids it, half the time is compiling imports.
    cached = {"PYTHONDONTWRITEBYTECODE": ""}
    times = [float(python("-c", code, env=cached).stdout.split()[-1]) for _ in range(3)]
    assert min(times) < 3.0  # the least, as other work on the machine only adds
