"""Memory: the loss without logits beside the loss with them, and a context of 32,768 tokens."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.accelerator.checks import Check, Goal, NotRun, seconds
from experiments.decoder_speed.jobs import decoder_config, ids, random_params
from experiments.decoder_speed.workload import SHAPES
from experiments.loss_cost.experiment import measure_one
from experiments.suite import Run
from jaxsp.losses import fused_kl_divergence, masked_mean
from jaxsp.models import decoder

LONG = 32_768
GIB = 2**30


def checks(run: Run) -> list[Check]:
    """The loss, then the long context: read, and read with a gradient to each of its vectors."""
    loss: dict[str, Any] = {}

    def both() -> dict[str, Any]:
        if not loss:
            sizes = (8192, 128_256, "bfloat16", 2048) if run.full else (64, 512, "bfloat16", 32)
            loss.update(measure_one(*sizes, beside_torch=False))
        return loss

    def ratio(key: str) -> tuple[float, dict[str, Any]]:
        if both()["materialised"][key] is None:
            taken = both()["materialised"]["temp_mib"]
            raise NotRun(f"materialised logits take {taken:,.0f} MiB, which is too much here")
        return both()["materialised"][key] / max(both()["fused"][key], 1e-9), both()

    tokens = LONG if run.full else 64
    return [
        Check(
            "loss, memory",
            "temporary memory with materialised logits, as a multiple of that of the fused loss",
            "×",
            functools.partial(ratio, "temp_mib"),
            Goal(least=5.0) if run.full else None,
        ),
        Check(
            "loss, time",
            "seconds with materialised logits, as a multiple of those of the fused loss",
            "×",
            functools.partial(ratio, "seconds"),
            Goal(least=1.0) if run.full else None,
        ),
        Check(
            f"a context of {tokens:,} tokens, read",
            "speed",
            "tokens/s",
            functools.partial(read_long, tokens, run.full),
        ),
        *(
            Check(
                f"a context of {tokens:,} tokens, its gradient, {backend}",
                "temporary memory of the value and gradient to all of its vectors",
                "GiB",
                functools.partial(long_gradient, tokens, backend, run.full),
            )
            for backend in ("chunked", "auto")
        ),
    ]


def read_long(tokens: int, full: bool) -> tuple[float, dict[str, Any]]:
    """Tokens a second of the reading in chunks; and that a question's states come out finite after it."""
    config = decoder_config(SHAPES["llama-1b" if full else "tiny"], "bfloat16", window=2 * tokens)
    params, random = random_params(config), np.random.default_rng(0)
    context, question = ids(random, config, 1, tokens), ids(random, config, 1, 16)
    read = functools.partial(decoder.read_long, params, config, context)
    took = seconds(read, 3 if full else 1)
    prefix = read()
    where = tokens + np.arange(question.shape[1])[None]
    inputs = decoder.embed(params, config, question)
    states, _ = decoder.hidden(params, config, inputs, where, (prefix,))
    if not bool(jnp.all(jnp.isfinite(states.astype(jnp.float32)))):
        raise ArithmeticError("the states of a question after the context are not finite")
    bytes_of = sum(leaf.nbytes for leaf in jax.tree.leaves(prefix))
    return tokens / took, {"seconds_of_it": took, "prefix_gib": bytes_of / GIB}


def long_gradient(tokens: int, backend: str, full: bool) -> tuple[float, dict[str, Any]]:
    """GiB of temporary memory, as the compiler says; the program runs, too."""
    config = decoder_config(SHAPES["llama-1b" if full else "tiny"], "bfloat16", window=2 * tokens)
    config = config.replace(remat=True, attention=backend)
    params, random = random_params(config), np.random.default_rng(0)
    vectors = decoder.embed(params, config, ids(random, config, 1, tokens))
    question = ids(random, config, 1, 16)
    teacher = jnp.asarray(random.standard_normal((*question.shape, config.width)), config.dtype)

    @jax.jit
    def gradient(params: Any, vectors: Any, question: Any, teacher: Any) -> Any:
        def loss(vectors: Any) -> Any:
            prefix = decoder.prefill(params, config, vectors)
            where = tokens + jnp.arange(question.shape[1])[None]
            inputs = decoder.embed(params, config, question)
            states, _ = decoder.hidden(params, config, inputs, where, (prefix,))
            return masked_mean(fused_kl_divergence(teacher, states, decoder.unembedding(params, config)))

        return jax.value_and_grad(loss)(vectors)

    given = params, vectors, question, teacher
    program = gradient.lower(*given).compile()
    analysis: Any = program.memory_analysis()
    took = seconds(lambda: program(*given), 1)
    value, slope = program(*given)
    norm = float(jnp.linalg.norm(slope.astype(jnp.float32)))
    if not np.isfinite(norm) or norm == 0:
        raise ArithmeticError(f"the gradient's norm is {norm}")
    told = {"seconds_of_it": took, "loss": float(value), "gradient_norm": norm}
    return analysis.temp_size_in_bytes / GIB, told
