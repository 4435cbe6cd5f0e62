"""``quantization="int8"``: equal to a model whose matrices were rounded beforehand, in less memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import jaxsp
from jaxsp.models import decoder, weights
from jaxsp.models.families import FAMILIES
from jaxsp.typing import UserError
from tests import programs, tiny

IDS = np.array([[5, 9, 77, 30, 200, 14, 3, 99, 41, 120]])
sixteen_bits = pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="refused on a CPU before jax 0.10")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def load(directory: Path, quantization: Any = "int8", dtype: str = "float32") -> jaxsp.LanguageModel:
    return jaxsp.load_model(directory, dtype=dtype, quantization=quantization, tokenizer=None)


def change(directory: Path, name: str, rows: slice, value: float) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors[name][rows] = value
    save_file(tensors, file)


def rounded(directory: Path, outputs: int) -> Path:
    """A copy of a checkpoint whose layers hold what int8 can tell apart, in float64 until stored."""
    copy = shutil.copytree(directory, directory / "rounded")
    tensors = load_file(copy / "model.safetensors")
    for name, matrix in tensors.items():
        if matrix.ndim == 2 and (".layers." in name or ".h." in name):
            wide = matrix.astype(np.float64)
            step = np.abs(wide).max(axis=1 - outputs, keepdims=True) / 127
            wide = np.round(wide / np.where(step, step, 1)) * step
            tensors[name] = wide.astype(np.float32)
    save_file(tensors, copy / "model.safetensors")
    return copy


def logits_and_gradient(model: jaxsp.LanguageModel) -> tuple[np.ndarray, np.ndarray]:
    coefficients = np.random.RandomState(1).standard_normal((*IDS.shape, model.config.vocab_size))

    @jax.jit
    def both(inputs, params):
        where = jnp.arange(IDS.shape[1])[None]

        def total(inputs):
            last, _ = decoder.hidden(params, model.config, inputs, where)
            logits = decoder.unembed(params, model.config, last)
            return (logits * coefficients).sum(), logits

        gradient, logits = jax.grad(total, has_aux=True)(inputs)
        return logits, gradient

    logits, gradient = both(model.embed(IDS), model.params)
    return np.asarray(logits), np.asarray(gradient)


@pytest.mark.parametrize(("family", "outputs"), [("llama", 0), ("gpt2", 1), ("phi3", 0)])
def test_equals_a_full_model_with_rounded_matrices(tmp_path, family, outputs):
    """Logits and gradients; matrices stored either way round, by themselves and fused."""
    tiny.write(tmp_path, with_tokenizer=False, model_type=family)
    if family == "llama":
        change(tmp_path, Q_PROJ, slice(3, 5), 0.0)
    ours = logits_and_gradient(load(tmp_path))
    expected = logits_and_gradient(load(rounded(tmp_path, outputs), "none"))
    plain = logits_and_gradient(load(tmp_path, "none"))
    for a, b, unrounded in zip(ours, expected, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.ptp(b), rtol=0)
        assert np.abs(a - unrounded).max() > 1e-3 * np.ptp(b)


def test_what_is_rounded_and_how(tmp_path):
    model = load(tiny.write(tmp_path, with_tokenizer=False))
    module = model.params["layers"]["down_proj"]
    assert module["kernel"].dtype == jnp.int8
    assert module["scale"].dtype == jnp.float32
    assert module["scale"].shape == (2, 32)
    np.testing.assert_array_equal(np.abs(module["kernel"]).max(axis=1), 127)
    assert model.params["embed_tokens"]["embedding"].dtype == jnp.float32


@sixteen_bits
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_lose_what_they_lose_anyway(tmp_path, dtype):
    """Sums are float32 until they are scaled: one rounding a product, as in a full model."""
    tiny.write(tmp_path, with_tokenizer=False)

    def error(quantization):
        narrow, wide = (load(tmp_path, quantization, d).logits(IDS) for d in (dtype, "float32"))
        return np.std(narrow - wide)

    assert error("int8") < 1.5 * error("none")


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_pieces_and_shards_give_the_same(tmp_path, family, monkeypatch):
    """Scales are those of whole columns, wherever reading stops and however devices share inputs."""
    tiny.write(tmp_path, with_tokenizer=False, model_type=family)
    whole = load(tmp_path)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("inputs", "outputs"))

    def sharding(path, shape):
        kinds = {"kernel": (None, "inputs", "outputs"), "scale": (None, "outputs")}
        return NamedSharding(mesh, PartitionSpec(*kinds.get(path.split("/")[-1], ())))

    monkeypatch.setattr(weights, "READ_BYTES", 32 * 4 * 5)  # five columns of 32 inputs
    tensors = FAMILIES[family].tensors(whole.config)
    files = weights.weight_files(tmp_path)
    params, _ = weights.load_params(files, whole.config, tensors, sharding)
    jax.tree.map(np.testing.assert_array_equal, params, whole.params)
    assert params["layers"]["up_proj"]["kernel"].sharding.shard_shape((2, 32, 48)) == (2, 16, 12)


def test_the_backward_pass_keeps_no_kernel_in_floats(tmp_path):
    """Beyond what a full model needs for a gradient; kept, they would double it."""
    tiny.write(tmp_path, with_tokenizer=False, num_hidden_layers=8, hidden_size=64)

    def scratch(model):
        def total(inputs, params):
            where = jnp.arange(4)[None]
            return decoder.hidden(params, model.config, inputs, where)[0].sum()

        program = jax.jit(jax.grad(total)).lower(jnp.ones((1, 4, 64)), model.params).compile()
        return programs.memory(program).temp_size_in_bytes

    full, int8 = load(tmp_path, "none"), load(tmp_path)
    kernels = sum(a.nbytes for a in jax.tree.leaves(full.params["layers"]))
    assert scratch(int8) < scratch(full) + 0.25 * kernels


@sixteen_bits
def test_float16_does_not_overflow(tmp_path):
    """Sums of products with whole numbers up to 127 would leave its range."""
    tiny.write(tmp_path, with_tokenizer=False)
    change(tmp_path, "model.layers.0.post_attention_layernorm.weight", slice(None), 50.0)
    assert np.isfinite(load(tmp_path, dtype="float16").logits(IDS)).all()


@pytest.mark.slow
def test_many_prompts_at_once(tmp_path):
    model = load(tiny.write(tmp_path, with_tokenizer=False))
    prompts = jax.random.normal(jax.random.key(0), (3, 1, 4, 32))

    def total(inputs):
        where = jnp.arange(4)[None]
        return (decoder.hidden(model.params, model.config, inputs, where)[0] ** 3).sum()

    together = jax.jit(jax.vmap(jax.grad(total)))(prompts)
    alone = np.stack([jax.jit(jax.grad(total))(one) for one in prompts])
    np.testing.assert_allclose(together, alone, atol=1e-5 * np.ptp(alone), rtol=0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_int8_cannot_hold(tmp_path, value):
    tiny.write(tmp_path, with_tokenizer=False)
    change(tmp_path, Q_PROJ, slice(3, 4), value)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.weight holds NaN or inf"):
        load(tmp_path)


def test_unknown_quantization(tmp_path):
    with pytest.raises(UserError, match="Unknown quantization 'int3'; choose one of none, int8"):
        load(tmp_path, "int3")


def test_the_fingerprint_tells_them_apart(tmp_path):
    tiny.write(tmp_path, with_tokenizer=False)
    assert load(tmp_path).fingerprint == f"int8:{load(tmp_path, 'none').fingerprint}"


@pytest.mark.slow
def test_loading_never_holds_the_floats(tmp_path, python):
    """Peak memory beyond what a small model needs: at most half of a float32 checkpoint of 190 MB."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
    for layers in (1, 12):
        directory = tmp_path / str(layers)
        tiny.write(directory, with_tokenizer=False, num_hidden_layers=layers, **sizes)
    size = (directory / "model.safetensors").stat().st_size
    assert size > 180e6
    code = (
        "import sys, re, pathlib, jaxsp\n"
        "def memory(kind):\n"
        "    text = pathlib.Path('/proc/self/status').read_text()\n"
        "    return int(re.search(kind + r':\\s+(\\d+)', text)[1]) * 1024\n"
        "def load(path):\n"
        "    return jaxsp.load_model(path, dtype='float32', quantization='int8', tokenizer=None)\n"
        "load(sys.argv[1])\n"
        "before = memory('VmRSS')\n"
        "model = load(sys.argv[2])\n"
        "print(memory('VmHWM') - before)"
    )
    peak = int(python("-c", code, str(tmp_path / "1"), str(directory)).stdout.split()[-1])
    assert peak < 0.5 * size, f"{peak / size:.2f} times the checkpoint"
