"""Speed of the decoder: prefill, decoding, the prompt's gradient; against the machine and against torch."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.decoder_speed import attention, generation, loading, questions
from experiments.decoder_speed.workload import SHAPES, Shape, flops
from experiments.suite import Experiment, Results, Run, in_turns, markdown
from jaxsp.losses import fused_kl_divergence, masked_mean
from jaxsp.models import decoder
from jaxsp.models.config import DecoderConfig
from jaxsp.models.generation import Sampling, generate
from jaxsp.models.rope import make_rope

DTYPES = ("bfloat16", "float32")
PARTS = {"attention": attention, "generation": generation, "loading": loading, "questions": questions}


def our_jobs(shape: Shape, dtype: str) -> dict[str, Callable[[], Any]]:
    """Each job as a function without arguments, compiled."""
    rope = make_rope({"rope_theta": 1e5}, shape.head_width)
    config = DecoderConfig(
        vocab_size=shape.vocab_size,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_width=shape.head_width,
        mlp_width=shape.mlp_width,
        window=8192,
        norm_epsilon=1e-5,
        tied_head=True,
        ropes=(rope,) * shape.layers,
        dtype=dtype,
    )
    params = random_params(config)
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
        return json.loads(self._process.stdout.readline())


def has_torch(python: str) -> bool:
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def measure(setting: str, run: Run) -> dict[str, Any]:
    """A dtype's jobs, or one of ``PARTS``."""
    if setting in PARTS:
        return PARTS[setting].measure(run.full)
    name = "smollm2-135m" if jax.default_backend() == "cpu" else "llama-1b"
    shape, repeats = SHAPES[name], 7
    if not run.full:
        shape, repeats = dataclasses.replace(shape, layers=2, matmul=512), 1
    return measure_jobs(name, shape, setting, repeats, run.torch_python)


def measure_jobs(name: str, shape: Shape, dtype: str, repeats: int, torch_python: str) -> dict[str, Any]:
    jobs = our_jobs(shape, dtype)
    calls = {"matmul": matmul(dtype, shape.matmul), **jobs}
    torch = Torch(torch_python, name, dtype) if has_torch(torch_python) else None
    if torch:
        calls |= {f"torch {job}": functools.partial(torch.do, job) for job in jobs}
    seconds, _ = in_turns(calls, repeats)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rate = 2 * shape.matmul**3 / median["matmul"]
    rows = []
    for job in jobs:
        work, tokens = flops(shape, job)
        row = {
            "job": job,
            "tokens": tokens,
            "seconds": median[job],
            "tokens_per_second": tokens / median[job],
            "of_matmul_rate": work / median[job] / rate,
        }
        if torch:
            theirs = median[f"torch {job}"]
            row |= {"torch_seconds": theirs, "torch_of_matmul_rate": work / theirs / rate}
        rows.append(row)
    if torch:
        torch.close()
    return {
        "shape": name,
        "dtype": dtype,
        "matmul_gflops": rate / 1e9,
        "rows": rows,
        "workload": dataclasses.asdict(shape),
        "torch": torch.versions if torch else None,
    }


def table(results: Results) -> str:
    parts = [_jobs([results[dtype] for dtype in DTYPES if dtype in results])]
    if "attention" in results:
        parts.append(markdown(attention.HEAD, [attention.cells(row) for row in results["attention"]["rows"]]))
    sentences = (name for name in ("generation", "loading", "questions") if name in results)
    parts += [PARTS[name].line(results[name]) for name in sentences]
    return "\n\n".join(part for part in parts if part)


def _jobs(found: list[dict[str, Any]]) -> str:
    rows = []
    for record in found:
        for row in record["rows"]:
            theirs = row.get("torch_seconds")
            beside = (
                (f"{row['tokens'] / theirs:,.0f}", f"{theirs / row['seconds']:.2f}") if theirs else ("–", "–")
            )
            ours = f"{row['tokens_per_second']:,.0f}", f"{row['of_matmul_rate']:.2f}"
            rows.append([row["job"], record["shape"], record["dtype"], *ours, *beside])
    head = ["job", "shape", "dtype", "tokens/s", "of the matrix-product rate", "torch, tokens/s", "ratio"]
    return markdown(head, rows, texts=3) if rows else ""


def result(results: Results) -> str:
    found = ((dtype, results[dtype]["rows"][-1]) for dtype in DTYPES)
    rates = (
        f"{dtype} {row['tokens_per_second']:,.0f} tokens/s, {row['of_matmul_rate']:.2f} of the matrix-product"
        f" rate, {row['torch_seconds'] / row['seconds']:.1f}× torch"
        for dtype, row in found
    )
    return f"the prompt's gradient: {'; '.join(rates)}"


EXPERIMENT = Experiment(
    question="How many tokens a second do prefill, decoding and the prompt's gradient take, what part of the"
    " machine's own matrix-product rate is that, and how does Hugging Face's model in torch stand beside it?",
    cost="some minutes a setting on two cores; rows beside torch need torch and transformers",
    run=measure,
    table=table,
    result=result,
    settings=(*DTYPES, *PARTS),
    options="--torch-python PATH",
)
