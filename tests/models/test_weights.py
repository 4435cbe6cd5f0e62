"""Checkpoints into place: sharded, in bounded memory, and whatever a damaged file may hold."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from safetensors.numpy import load_file, save_file

import jaxsp
from jaxsp.models import weights
from jaxsp.models.families import FAMILIES
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.weights import fingerprint
from jaxsp.typing import UserError
from tests import tiny


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_every_device_reads_its_shard(tmp_path, family):
    """Fused matrices, stored either way round, cut for eight devices: each gets what is its own."""
    assert jax.device_count() == 8
    tiny.write(tmp_path, with_tokenizer=False, model_type=family)
    whole = jaxsp.load_model(tmp_path, dtype="float32", tokenizer=None)
    sharded = jaxsp.load_model(tmp_path, dtype="float32", tokenizer=None, mesh="data=4,model=2")
    params = sharded.params
    jax.tree.map(np.testing.assert_array_equal, params, whole.params)
    kernel = params["layers"]["q_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[-1] == kernel.shape[-1] // 2
    ids = [[4, 8, 15, 16, 23, 42]]
    np.testing.assert_allclose(sharded.logits(ids), whole.logits(ids), atol=1e-4)
    cut = jaxsp.load_model(tmp_path, dtype="float32", tokenizer=None, mesh="fsdp=4,model=2")
    jax.tree.map(np.testing.assert_array_equal, cut.params, whole.params)
    kernel = cut.params["layers"]["q_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[1:] == (kernel.shape[1] // 4, kernel.shape[2] // 2)
    np.testing.assert_allclose(cut.logits(ids), whole.logits(ids), atol=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_key_sets(tmp_path, family):
    """In every family each tensor is needed, has one shape, and no other is let in."""
    file = tiny.write(tmp_path, with_tokenizer=False, model_type=family) / "model.safetensors"
    tensors = load_file(file)
    for name in list(tensors)[::5]:
        save_file({k: v for k, v in tensors.items() if k != name}, file)
        with pytest.raises(UserError, match=f"lacks tensor {name}"):
            jaxsp.load_model(tmp_path, tokenizer=None)
        save_file({**tensors, name: np.zeros((3, *tensors[name].shape), np.float32)}, file)
        with pytest.raises(UserError, match=rf"Tensor {name} has shape \[3, "):
            jaxsp.load_model(tmp_path, tokenizer=None)
    save_file({**tensors, "model.extra": np.zeros(3, np.float32)}, file)
    with pytest.raises(UserError, match=r"holds tensor model\.extra"):
        jaxsp.load_model(tmp_path, tokenizer=None)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_checkpoints_of_the_model_without_its_head(tmp_path, family):
    changes = {"model_type": family, "tie_word_embeddings": True}
    file = tiny.write(tmp_path, with_tokenizer=False, **changes) / "model.safetensors"
    before = jaxsp.load_model(tmp_path, dtype="float32", tokenizer=None).logits([[5, 6]])
    bare = {name.split(".", 1)[1]: tensor for name, tensor in load_file(file).items()}
    if family == "gpt2":
        bare["h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.float32))  # as OpenAI's files have
    save_file(bare, file)
    after = jaxsp.load_model(tmp_path, dtype="float32", tokenizer=None).logits([[5, 6]])
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_stored_dtypes(tmp_path, stored):
    file = tiny.write(tmp_path, with_tokenizer=False) / "model.safetensors"
    narrow = {k: v.astype(jax.numpy.dtype(stored)) for k, v in load_file(file).items()}
    save_file(narrow, file)
    params = jaxsp.load_model(tmp_path, dtype="float32", tokenizer=None).params
    expected = narrow["model.layers.1.self_attn.q_proj.weight"].astype(np.float32).T
    np.testing.assert_array_equal(params["layers"]["q_proj"]["kernel"][1], expected)


@pytest.mark.parametrize(("dtype", "shown"), [("int8", "int8"), ("float8_e4m3fn", "f8_e4m3")])
def test_quantised_tensors_are_no_weights(tmp_path, dtype, shown):
    file = tiny.write(tmp_path, with_tokenizer=False) / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.norm.weight": np.zeros(32, jax.numpy.dtype(dtype))}, file)
    with pytest.raises(UserError, match=rf"model\.norm\.weight holds {shown}, not floats"):
        jaxsp.load_model(tmp_path, tokenizer=None)


def test_every_bit_is_in_the_fingerprint(tmp_path):
    file = tiny.write(tmp_path, with_tokenizer=False) / "model.safetensors"
    sound, found = bytearray(file.read_bytes()), set()
    begin = 8 + int.from_bytes(sound[:8], "little")
    places = np.random.RandomState(0).randint(begin, len(sound), 40).tolist()
    for place in (begin, len(sound) - 1, *places):
        sound[place] ^= 1 << place % 8
        file.write_bytes(sound)
        sound[place] ^= 1 << place % 8
        found.add(fingerprint([file]))
    file.write_bytes(sound)
    assert len(found) == len({begin, len(sound) - 1, *places})
    model = jaxsp.load_model(tmp_path, dtype="float32", tokenizer=None)
    assert model.fingerprint == fingerprint([file])
    assert model.fingerprint not in found


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_no_numbers(tmp_path, monkeypatch, stored, value):
    """Also where a tensor is read in pieces, and they are in the last one."""
    monkeypatch.setattr(weights, "READ_BYTES", 64)
    file = tiny.write(tmp_path, with_tokenizer=False) / "model.safetensors"
    tensors = {k: v.astype(jax.numpy.dtype(stored)) for k, v in load_file(file).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = value
    save_file(tensors, file)
    with pytest.raises(
        UserError, match=r"Tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"
    ):
        jaxsp.load_model(tmp_path, dtype="float32", tokenizer=None)


def test_weights_that_a_dtype_cannot_hold(tmp_path):
    file = tiny.write(tmp_path, with_tokenizer=False) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = 1e30  # norms stay in float32
    save_file(tensors, file)
    jaxsp.load_model(tmp_path, dtype="float32", tokenizer=None)
    tensors["lm_head.weight"][3, 4] = -1e5
    save_file(tensors, file)
    jaxsp.load_model(tmp_path, dtype="float32", tokenizer=None)
    if jax.__version_info__ >= (0, 10):
        with pytest.raises(UserError, match=r"lm_head\.weight holds 1e\+05, but float16 ends at 6.55e\+04"):
            jaxsp.load_model(tmp_path, dtype="float16", tokenizer=None)


@pytest.mark.slow
def test_loading_holds_the_model_once(tmp_path, python):
    """Peak memory beyond what was there before: at most 1.3 times a checkpoint of 260 MB."""
    tiny.write(
        tmp_path,
        with_tokenizer=False,
        vocab_size=16_000,
        hidden_size=512,
        intermediate_size=2048,
        head_dim=128,
        num_hidden_layers=12,
    )
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 200e6
    code = "import sys; from experiments.decoder_speed.loading import child; child(*sys.argv[1:])"
    peak = json.loads(python("-c", code, str(tmp_path), "float32").stdout.splitlines()[-1])["peak"]
    assert peak < 1.3 * size, f"{peak / size:.2f} times the checkpoint"


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> tuple[LanguageModel, bytes]:
    directory = tiny.write(tmp_path_factory.mktemp("small"), with_tokenizer=False)
    model = jaxsp.load_model(directory, dtype="float32", tokenizer=None)
    return model, (directory / "model.safetensors").read_bytes()


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_damaged_headers(small_file, data):
    """Whatever stands in the header: a model, or one clear error; lengths that lie allocate nothing."""
    model, good = small_file
    (length,) = struct.unpack("<Q", good[:8])
    header = bytearray(good[8 : 8 + length])
    match data.draw(st.sampled_from(["length", "bytes", "cut", "offsets", "field"])):
        case "length":
            lie = data.draw(st.integers(0, 2**64 - 1))
            broken = struct.pack("<Q", lie) + good[8:]
        case "bytes":
            for _ in range(data.draw(st.integers(1, 4))):
                header[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
            broken = good[:8] + bytes(header) + good[8 + length :]
        case "cut":
            broken = good[: data.draw(st.integers(0, len(good) - 1))]
        case kind:
            tensors = json.loads(header)
            entry = tensors[data.draw(st.sampled_from(sorted(tensors)))]
            number = st.integers(-1, 2**64)
            if kind == "offsets":
                entry["data_offsets"] = data.draw(st.lists(number, max_size=3))
            else:
                entry["shape"] = data.draw(st.lists(number, max_size=4))
                entry["dtype"] = data.draw(st.sampled_from(["F32", "F16", "BF16", "F4", "I64", "?"]))
            text = json.dumps(tensors).encode()
            broken = struct.pack("<Q", len(text)) + text + good[8 + length :]
    file = model.directory / "model.safetensors"
    file.write_bytes(broken)
    tracemalloc.start()
    with contextlib.suppress(UserError):
        jaxsp.load_model(model.directory, dtype="float32", tokenizer=None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20
