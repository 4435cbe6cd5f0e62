"""The work of a v5e-256, as arithmetic: the chip, the models, the job, and what a context of it takes."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsp.data.packing import Packing
from jaxsp.losses import chunked_head
from jaxsp.models import decoder
from jaxsp.models.config import DecoderConfig
from jaxsp.models.rope import make_rope
from jaxsp.models.sharding import DATA, MODEL
from jaxsp.plan import PREAMBLE_TOKENS, UTILISATION, step_flops
from jaxsp.settings import make_settings

PEAK, HBM, BANDWIDTH = 197e12, 16_000_000_000, 819e9
"""A v5e chip: bfloat16 FLOP/s, bytes, bytes/s (cloud.google.com/tpu/docs/v5e)."""
LINK, HOP = 1600e9 / 8 / 4, 1e-6
"""Each of its four ports: bytes/s each way; and seconds to a neighbour, which is assumed."""
CHIPS, HOST = 256, 4
"""In all, and of one host."""

CONTEXT, QUERIES, HELD_OUT, QUERY, ANSWER = 1000, 32, 6, 32, 32
"""The job: tokens of a context; queries, and how many are held out; tokens of one and of its answer."""
SETTINGS = make_settings(
    {"kind": "embedding", "prompt_length": 16, "batch_size": 8, "steps": 60, "max_answer_tokens": ANSWER}
)
ROW = QUERY + ANSWER
PACKING = Packing.of(np.full(QUERIES, ROW), SETTINGS.training.batch_size)
TEACHER = PREAMBLE_TOKENS + decoder.round_size(CONTEXT)  # slots of its prefix
STUDENT = PREAMBLE_TOKENS + SETTINGS.prompt.prompt_length
EVALUATIONS = SETTINGS.training.updates // SETTINGS.training.evaluate_every + 1


def decoder_config(theta: float = 5e5, **sizes: Any) -> DecoderConfig:
    rope = make_rope({"rope_theta": theta}, sizes["head_width"])
    ropes = (rope,) * sizes["layers"]
    return DecoderConfig(norm_epsilon=1e-5, ropes=ropes, dtype="bfloat16", **sizes)


MODELS = {
    "SmolLM2-135M": decoder_config(
        1e5, layers=30, width=576, heads=9, kv_heads=3, head_width=64, mlp_width=1536,
        vocab_size=49152, window=8192, tied_head=True,
    ),
    "Llama-3.2-1B": decoder_config(
        layers=16, width=2048, heads=32, kv_heads=8, head_width=64, mlp_width=8192,
        vocab_size=128256, window=131072, tied_head=True,
    ),
    "Llama-3.1-8B": decoder_config(
        layers=32, width=4096, heads=32, kv_heads=8, head_width=128, mlp_width=14336,
        vocab_size=128256, window=131072, tied_head=False,
    ),
}  # fmt: skip
"""Sizes of each model's config.json; Llama 3's scaling of rotations changes no count and is left out."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All-reduces of one update, as one device sees them."""

    messages: int
    bytes: int


def expected(
    config: DecoderConfig, packing: Packing, layout: Mapping[str, int], prompts: int, answers: int
) -> Exchange:
    """The arithmetic of an update's all-reduces.

    Over ``model``, T tokens of rows and K of σ a device: each layer adds up two arrays [T + K, D] forward
    (after attention, after the MLP) and five backward (to the inputs of q, k, v, gate, up), T and K apart;
    the embedding one [T, D]; the head, a chunk of C answer positions at a time, the gradient [C, D] and five
    numbers a position (two maxima, two sums, the KL) in float32. Over ``data``, for one prompt: σ's gradient
    [K, D] and three numbers in float32 (with one part, to itself); several prompts have nothing to say.

    Args:
      config: configuration of the model.
      packing: packing of a prompt's batch, on all devices.
      layout: parts of each axis.
      prompts: side by side; 0 for one whose rows go over ``data``.
      answers: answer positions of the prompt's batch.
    """
    parts, K, D = layout[DATA], SETTINGS.prompt.prompt_length, config.width
    share = max(prompts, 1) / parts
    T, own, live = packing.rows * packing.length * share, max(1, share) * K, answers * share
    messages = size = 0.0
    if layout[MODEL] > 1:
        C, chunks = head_chunks(config, int(T), live)
        item = jnp.dtype(config.dtype).itemsize
        size += item * D * (config.layers * 7 * (T + own) + T) + 4 * chunks * C * (D + 5)
        messages += config.layers * 8 + 1 + 3 * chunks
    if not prompts:
        size += 4 * (K * D + 3)
        messages += 1
    return Exchange(int(messages), int(size))


def head_chunks(config: DecoderConfig, tokens: int, answers: float) -> tuple[int, int]:
    """Positions of a chunk of the head, as the device at hand has them, and how many chunks are computed."""
    C = min(tokens, chunked_head.chunk_size(tokens, config.vocab_size, masked=True, closed=True))
    return C, math.ceil(answers / C)


@dataclasses.dataclass(frozen=True)
class Work:
    """A part of the job: how often, and each time operations, bytes read, and sums over ``model``."""

    name: str
    times: float
    flops: float
    bytes: float
    sums: float = 0.0
    sum_bytes: float = 0.0

    def seconds(self, chips: int, utilisation: float) -> tuple[float, float, float]:
        """At the operations, at reading, at adding up; the first two overlap, the last with neither."""
        return (
            self.times * self.flops / (chips * utilisation * PEAK),
            self.times * self.bytes / (chips * utilisation * BANDWIDTH),
            self.times * all_reduce(chips, self.sums, self.sum_bytes),
        )


def all_reduce(chips: int, messages: float, size: float) -> float:
    """Seconds of a ring's all-reduces: 2 (n - 1) / n of the bytes over two ports, 2 (n - 1) hops a message.

    Two chips share one port, four are a host's square, eight two hosts'.
    """
    if chips == 1:
        return 0.0
    return 2 * (chips - 1) * (size / chips / (min(2, chips - 1) * LINK) + messages * HOP)


def layer_weights(config: DecoderConfig) -> int:
    """Weights of all layers: q, k, v, o and the three of the MLP."""
    projections = config.width * config.head_width * (2 * config.heads + 2 * config.kv_heads)
    return config.layers * (projections + 3 * config.width * config.mlp_width)


def forward(config: DecoderConfig, tokens: int, slots: float, cached: float = 0.0) -> Any:
    """Work of the layers: two operations for each weight and token, four for each head's entry and seen slot.

    Weights and ``cached`` tokens' keys and values are read once; [tokens, D] is added up twice a layer, and
    once for the embedding.
    """
    seen = 4 * config.layers * config.heads * config.head_width * tokens * slots
    caches = 2 * 2 * config.layers * config.kv_heads * config.head_width * cached
    sums = 2 * config.layers + 1
    flops = 2 * tokens * layer_weights(config) + seen
    return flops, 2 * layer_weights(config) + caches, sums, 2 * sums * tokens * config.width


def head(config: DecoderConfig, positions: float, products: int) -> Any:
    """Work of the head: products with [V, D], which each chunk of positions (an accelerator's) reads anew."""
    C = min(max(128, 2**30 // (24 * config.vocab_size)), max(64, int(2 * positions) // 8))
    table, chunks = config.width * config.vocab_size, math.ceil(positions / C)
    flops, size = 2 * products * table * positions, 2 * products * table * chunks
    return flops, size, 3 * chunks, 4 * positions * (config.width + 5)


def works(config: DecoderConfig, prompts: int) -> Iterator[Work]:
    """All that a context takes; its training ``prompts`` at a time, one prompt's share of it."""
    tokens, answers = PACKING.rows * PACKING.length, SETTINGS.training.batch_size * ANSWER
    batches = math.ceil(QUERIES / SETTINGS.training.batch_size)
    yield Work("context", 1, *forward(config, TEACHER - PREAMBLE_TOKENS, TEACHER / 2))
    for slots, rounds in ((TEACHER, 1), (STUDENT, 3)):  # the teacher; start, no context and σ
        read = forward(config, 8 * QUERY, slots + QUERY / 2, slots)  # eight queries at a time
        yield Work("answers", rounds * QUERIES / 8, *read)
        own = ROW - ANSWER / 2
        step = forward(config, QUERIES, slots + own, slots + QUERIES * ROW)
        yield Work("answers", rounds * ANSWER, *step)
        yield Work("answers", rounds * ANSWER, *head(config, QUERIES, 1))
        batch = forward(config, tokens, slots + ROW / 2, slots)
        yield Work("signals and brackets", batches * rounds, *batch)
        yield Work("signals and brackets", batches * rounds, *head(config, answers, 2))
    # The teacher's rows are read for its signals, and once more for the bracket of the full context.
    again = forward(config, tokens, TEACHER + ROW / 2, TEACHER)
    yield Work("signals and brackets", batches, *again)

    losses = head(config, prompts * tokens / 2, 3)
    layers = prompts * step_flops(config, SETTINGS.prompt.prompt_length, ROW, PACKING) - losses[0]
    exchanged = expected(config, PACKING, {DATA: 1, MODEL: 2}, prompts, answers)
    steps = SETTINGS.training.updates / prompts
    yield Work("steps", steps, layers, 4 * layer_weights(config), exchanged.messages, exchanged.bytes)
    yield Work("steps", steps, *losses[:2])
    watched = forward(config, prompts * (tokens + SETTINGS.prompt.prompt_length), STUDENT + ROW / 2)
    yield Work("evaluations", EVALUATIONS / prompts, *watched)
    yield Work("evaluations", EVALUATIONS / prompts, *head(config, prompts * HELD_OUT * ANSWER, 2))


def rates(name: str, prompts: int, model: int, utilisation: float, repeats: int = 1) -> dict[str, Any]:
    """Contexts an hour on all chips, and the seconds of each part by what bounds it.

    Args:
      name: name of the model.
      prompts: side by side on a group of chips.
      model: chips of a group.
      utilisation: share that is used of the operations and of the memory's bytes.
      repeats: chips that all do the same for the teacher and the brackets: ``data`` divides only training.
    """
    parts: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for work in works(MODELS[name], prompts):
        products, memory, exchange = work.seconds(model, utilisation)
        times = 1 if work.name in ("steps", "evaluations") else repeats
        part = parts[work.name]
        part["products" if products > memory else "memory"] += times * max(products, memory)
        part["exchange"] += times * exchange
    total = sum(sum(part.values()) for part in parts.values())
    return {
        "model": name, "chips": model, "prompts": prompts, "utilisation": utilisation,
        "teacher_repeated": repeats, "seconds": parts, "total": total,
        "per_hour": 3600 * CHIPS / model / total,
    }  # fmt: skip


def step_seconds(name: str, model: int) -> dict[str, float]:
    """A step of one prompt with the weights on so many chips."""
    steps = [work for work in works(MODELS[name], 1) if work.name == "steps"]
    parts = [dataclasses.replace(work, times=1).seconds(model, UTILISATION) for work in steps]
    products, memory, exchange = map(sum, zip(*parts, strict=True))
    return {"chips": model, "products": products, "memory": memory, "exchange": exchange}


def spread_seconds(name: str, devices: int) -> dict[str, Any]:
    """A step of one prompt with its rows over so many chips."""
    config, packing = MODELS[name], PACKING.over(devices, ROW)
    flops = step_flops(config, SETTINGS.prompt.prompt_length, ROW, packing, readings=devices) / devices
    positions = SETTINGS.training.batch_size * ANSWER / devices
    size = 4 * layer_weights(config) + head(config, positions, 3)[1]
    return {
        "model": name, "chips": devices, "tokens": packing.rows * packing.length // devices,
        "products": flops / (UTILISATION * PEAK), "memory": size / (UTILISATION * BANDWIDTH),
        "exchange": all_reduce(devices, 1, 4 * (SETTINGS.prompt.prompt_length * config.width + 3)),
    }  # fmt: skip
