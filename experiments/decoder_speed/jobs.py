"""The measured jobs, compiled: ours, the machine's own product, and torch's in another process."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.decoder_speed.workload import Shape
from jaxsp.errors import UserError
from jaxsp.losses import fused_kl_divergence, masked_mean
from jaxsp.models import decoder
from jaxsp.models.config import DecoderConfig
from jaxsp.models.generation import Sampling, generate
from jaxsp.models.rope import make_rope


def decoder_config(shape: Shape, dtype: str, window: int = 8192) -> DecoderConfig:
    """The shape's decoder."""
    rope = make_rope({"rope_theta": 1e5}, shape.head_width)
    return DecoderConfig(
        vocab_size=shape.vocab_size,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_width=shape.head_width,
        mlp_width=shape.mlp_width,
        window=window,
        norm_epsilon=1e-5,
        tied_head=True,
        ropes=(rope,) * shape.layers,
        dtype=dtype,
    )


def our_jobs(shape: Shape, dtype: str, params: Any = None) -> dict[str, Callable[[], Any]]:
    """Each job as a function without arguments, compiled; with random weights, if none are given."""
    config = decoder_config(shape, dtype)
    params = random_params(config) if params is None else params
    random = np.random.default_rng(0)
    read = jax.jit(decoder.prefill, static_argnums=1)

    document = decoder.embed(params, config, ids(random, config, 1, shape.document))
    context = read(params, config, document[:, : shape.context])
    sigma = document[:, : shape.prompt]
    rows = ids(random, config, shape.rows, shape.row)
    teacher = jnp.asarray(random.standard_normal((shape.rows, shape.answer, config.width)), config.dtype)

    @jax.jit
    def gradient(params, sigma, rows, teacher):
        def loss(sigma):
            prefix = decoder.prefill(params, config, sigma)
            where = jnp.broadcast_to(shape.prompt + jnp.arange(shape.row), rows.shape)
            inputs = decoder.embed(params, config, rows)
            states, _ = decoder.hidden(params, config, inputs, where, (prefix,))
            head = decoder.unembedding(params, config)
            return masked_mean(fused_kl_divergence(teacher, states[:, -shape.answer :], head))

        return jax.value_and_grad(loss)(sigma)

    queries = ids(random, config, shape.slots, shape.query).tolist()
    sampling = Sampling(max_tokens=shape.new_tokens)
    return {
        "prefill": lambda: read(params, config, document),
        "decode": lambda: generate(params, config, context, queries, sampling, slots=shape.slots),
        "prompt gradient": lambda: gradient(params, sigma, rows, teacher),
    }


def random_params(config: DecoderConfig) -> Any:
    """Weights of the scale of a trained model's: matrices 1/sqrt(inputs), norms 1."""
    shapes = decoder.parameter_shapes(config)

    def leaf(path, shape):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.ones(shape.shape, shape.dtype)
        key = jax.random.fold_in(jax.random.key(0), sum(name.encode()))
        scale = shape.shape[-2] ** -0.5 if "kernel" in name else 0.02
        return (scale * jax.random.normal(key, shape.shape, jnp.bfloat16)).astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def ids(random: np.random.Generator, config: DecoderConfig, rows: int, length: int) -> np.ndarray:
    return random.integers(0, config.vocab_size, (rows, length), np.int32)


def matmul(dtype: str, size: int) -> Callable[[], Any]:
    """The machine's own rate: a square product of this size."""
    a = jax.random.normal(jax.random.key(1), (size, size)).astype(dtype)
    precision = "highest" if dtype == "float32" else None
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))
    return lambda: product(a)


class Torch:
    """The same jobs by Hugging Face's model, in a process of its own that waits between its turns."""

    def __init__(self, python: str, shape: str, dtype: str) -> None:
        self._process = subprocess.Popen(
            [python, "-m", "experiments.decoder_speed.torch_side", shape, dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions = self._answer()

    def do(self, job: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(job + "\n")
        self._process.stdin.flush()
        self._answer()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise UserError("The process with torch ended early; its own message stands above.")
        return json.loads(line)


def has_torch(python: str) -> bool:
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0
