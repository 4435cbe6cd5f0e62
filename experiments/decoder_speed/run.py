"""Speed of the decoder: prefill, decoding, the prompt's gradient; against the machine and against torch.

python -m experiments.decoder_speed.run [--shape NAME] [--dtype T] [--torch-python PATH]
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.decoder_speed.workload import SHAPES, Shape, flops
from jaxsp.artifact import environment
from jaxsp.losses import fused_kl_divergence, masked_mean
from jaxsp.models import decoder
from jaxsp.models.config import DecoderConfig
from jaxsp.models.generation import Sampling, generate
from jaxsp.models.rope import make_rope

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Run:
    """Measure, add to results.json, and print the table of README.md."""

    shape: str = "smollm2-135m"
    """A key of workload.SHAPES; the weights are random."""
    dtype: str = "bfloat16"
    """Dtype of weights and activations, here and in torch."""
    repeats: int = 7
    """Runs of each job, in turns."""
    torch_python: str = sys.executable
    """A Python with torch and transformers, for the rows beside Hugging Face; without them there are none."""
    out: Path = HERE
    """Where the results go."""


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

    def seconds(self, job: str) -> float:
        assert self._process.stdin
        self._process.stdin.write(job + "\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

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


def measure(run: Run) -> dict[str, Any]:
    shape = SHAPES[run.shape]
    jobs = our_jobs(shape, run.dtype)
    product = matmul(run.dtype, shape.matmul)
    torch = Torch(run.torch_python, run.shape, run.dtype) if has_torch(run.torch_python) else None
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> None:
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.setdefault(name, []).append(time.perf_counter() - started)

    for _ in range(run.repeats + 1):  # the first compiles and warms up
        for name, job in jobs.items():
            timed("matmul", product)
            timed(name, job)
            if torch:
                seconds.setdefault(f"torch {name}", []).append(torch.seconds(name))
    median = {
        name: statistics.median(times[len(times) // (run.repeats + 1) :]) for name, times in seconds.items()
    }
    rate = 2 * shape.matmul**3 / median["matmul"]
    rows = []
    for name in jobs:
        work, tokens = flops(shape, name)
        row = {
            "job": name,
            "tokens": tokens,
            "seconds": median[name],
            "tokens_per_second": tokens / median[name],
            "of_matmul_rate": work / median[name] / rate,
        }
        if torch:
            theirs = median[f"torch {name}"]
            row |= {"torch_seconds": theirs, "torch_of_matmul_rate": work / theirs / rate}
        rows.append(row)
    if torch:
        torch.close()
    return {
        "shape": run.shape,
        "dtype": run.dtype,
        "matmul_gflops": rate / 1e9,
        "rows": rows,
        "workload": dataclasses.asdict(shape),
        "machine": {**environment(), "processor": processor()},
        "torch": torch.versions if torch else None,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def table(results: list[dict[str, Any]]) -> str:
    head = ["shape, dtype, device", "job", "tokens/s", "of matmul rate", "torch tokens/s", "ratio"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---:|---:|---:|---:|"]
    for result in results:
        device = result["machine"]["device"]
        for row in result["rows"]:
            theirs = row.get("torch_seconds")
            lines.append(
                f"| {result['shape']}, {result['dtype']}, {device} | {row['job']} |"
                f" {row['tokens_per_second']:,.0f} | {row['of_matmul_rate']:.2f} |"
                + (
                    f" {row['tokens'] / theirs:,.0f} | {theirs / row['seconds']:.2f} |"
                    if theirs
                    else " – | – |"
                )
            )
    return "\n".join(lines)


def main() -> None:
    run = tyro.cli(Run)
    if importlib.util.find_spec("experiments") is None:
        sys.exit("Run this from the repository's root.")
    result = measure(run)
    file = run.out / "results.json"
    results = json.loads(file.read_text("utf-8")) if file.is_file() else []
    same = ("shape", "dtype")
    kept = [
        old
        for old in results
        if any(old[k] != result[k] for k in same) or old["machine"]["device"] != result["machine"]["device"]
    ]
    file.write_text(json.dumps([*kept, result], indent=1) + "\n", "utf-8")
    print(f"Matrix products: {result['matmul_gflops']:,.0f} GFLOP/s.\n{table([*kept, result])}")
    print(f"Written: {file}")


if __name__ == "__main__":
    main()
