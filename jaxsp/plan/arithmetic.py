"""Operations of an update, and the speed of this machine at them."""

from __future__ import annotations

import functools
import math
import time

import jax
import jax.numpy as jnp

from jaxsp import device
from jaxsp.data.packing import Packing
from jaxsp.models.config import DecoderConfig
from jaxsp.plan.program import PREAMBLE_TOKENS

SIZES = {"cpu": (512, 1024, 2048)}
"""Widths of the products that are timed. On a processor that others use, too, a short one is now and then
computed without a break; one of many cores needs a long one."""
ACCELERATOR_SIZES = (8192,)

PROBE_SECONDS = 1.5
"""Time in which they are computed again and again."""

PASSES = 6
"""Products of bfloat16 that a TPU makes one of float32 from."""


def step_flops(
    config: DecoderConfig,
    prompt_length: int,
    query_tokens: int,
    packing: Packing,
    readings: int = 1,
    heads: int = 3,
) -> float:
    """Floating-point operations of an update that it can't do without.

    Two for each multiply-add of the matrix products; attention over the slots that are seen. A gradient
    to the inputs costs as much again as the products that it goes through (twice as much in attention),
    as no weight has one. XLA's own count is of no use here: it takes the body of a loop once, however
    often that runs, and the layers are a loop.

    Args:
      config: configuration of the model.
      prompt_length: K.
      query_tokens: tokens of a query with its answer; the answer's are half of them.
      packing: shape of the batch.
      readings: number of times that σ is read: once for each part that the batch is computed in, if at all.
      heads: products with the output head: of the teacher, of the student, and back.
    """
    tokens, own = packing.tokens, readings * prompt_length
    projections = config.width * config.head_width * (2 * config.heads + 2 * config.kv_heads)
    mlp = (3 if config.gated_mlp else 2) * config.width * config.mlp_width
    attended = tokens * (PREAMBLE_TOKENS + prompt_length + query_tokens / 2)
    attended += own * (PREAMBLE_TOKENS + prompt_length / 2)
    attention = 4 * config.heads * config.head_width * attended
    layer = 2 * 2 * (tokens + own) * (projections + mlp) + 3 * attention
    return config.layers * layer + heads * 2 * config.width * config.vocab_size * tokens / 2


def matmul_rate(config: DecoderConfig) -> float:
    """The device's speed at a square matrix product in the model's dtype: operations a second, at best.

    The best of many short products counts, so that other programs on the machine hardly decide it.
    """
    product = jax.jit(functools.partial(jnp.matmul, precision=config.precision))
    sizes = SIZES.get(device.platform(), ACCELERATOR_SIZES)

    def rate(size: int) -> float:
        matrix = jax.random.normal(jax.random.key(0), (size, size)).astype(config.dtype)
        product(matrix, matrix).block_until_ready()
        least, end = math.inf, time.perf_counter() + PROBE_SECONDS / len(sizes)
        while (started := time.perf_counter()) < end:
            product(matrix, matrix).block_until_ready()
            least = min(least, time.perf_counter() - started)
        return 2 * size**3 / least

    return max(map(rate, sizes))


def peak_rate(config: DecoderConfig, system: device.Described) -> float:
    """The greatest speed that a described device has at the same."""
    return system.chip.rate / (PASSES if config.dtype == "float32" else 1)
