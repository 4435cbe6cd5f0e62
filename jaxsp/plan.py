"""The needs of a compression, before it is run: memory by the compiled update, time by arithmetic.

No weights are loaded, and nothing is executed but a matrix product that measures the device.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxsp.data.examples import Rows
from jaxsp.data.packing import Packing
from jaxsp.losses import Objective, as_objective
from jaxsp.models import decoder, sharding
from jaxsp.models.config import DecoderConfig
from jaxsp.models.output_head import OutputHead
from jaxsp.models.sharding import DATA, along
from jaxsp.prompts import PROMPT_KINDS
from jaxsp.prompts.initializers import Source, Start
from jaxsp.settings import Settings
from jaxsp.teacher.signals import SIGNALS, Wanted
from jaxsp.training.drivers import cut_axis, mesh_of, sharded_update
from jaxsp.training.state import TrainState, initial_state
from jaxsp.training.update import Frozen, UpdateSettings
from jaxsp.typing import Array, KeyValues, PyTree, UserError

UTILISATION = 0.56
"""Assumed part of the matrix-product rate. Measured (experiments/decoder_speed) for SmolLM2-135M in bfloat16
on two CPU cores, and nowhere else yet."""

FILL = 0.9
"""Part of a device's memory to count on: programs and fragments take some, too."""

PREAMBLE_TOKENS = 32
"""Tokens of a chat's text before the context, about."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      arguments: the weights, the batch, and σ with its optimizer.
      temporaries: what the update holds beside them.
      output: σ with its optimizer after the step.
      context: keys and values of the context, or of a part of it, as the teacher reads it; as if whole on
        every device.
    """

    arguments: int
    temporaries: int
    output: int
    context: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.output + self.context


@dataclasses.dataclass(frozen=True)
class Plan:
    """The needs of a compression.

    Attributes:
      device: its kind.
      devices: number that share a step.
      rows: rows of a batch, on all devices.
      row_tokens: tokens of a row.
      memory: on each device.
      memory_limit: what a device has, in bytes.
      flops: operations of a step, on all devices.
      matmul_rate: speed of one device, measured, in floating-point operations a second.
      utilisation: assumed, of that rate.
      step_seconds: expected; communication is not counted.
      largest_rows: rows of the largest batch found to fit in ``FILL`` of the memory; 0 if none does.
      largest_batch_size: the setting whose batches take no more tokens than that one; 0 if none does.
    """

    device: str
    devices: int
    rows: int
    row_tokens: int
    memory: Memory
    memory_limit: int
    flops: float
    matmul_rate: float
    utilisation: float
    step_seconds: float
    largest_rows: int
    largest_batch_size: int

    @property
    def fits(self) -> bool:
        return self.memory.total <= FILL * self.memory_limit


def plan(
    config: DecoderConfig,
    settings: Settings,
    *,
    context_tokens: int,
    query_tokens: int,
    memory_limit: int | None = None,
) -> Plan:
    """Memory, time and the largest batch of a compression.

    Args:
      config: configuration of the model.
      settings: as in ``compress``.
      context_tokens: tokens of the context.
      query_tokens: tokens of a query with its answer, about; half of them are taken to be the answer's.
      memory_limit: bytes of a device; by default what it says of itself, on a CPU the machine's memory.

    Raises:
      UserError: settings that are invalid, or that fit neither the model nor the devices.
    """
    if context_tokens < 1 or query_tokens < 2:
        raise UserError(
            "--context-tokens must be at least 1 and --query-tokens at least 2; got"
            f" {context_tokens} and {query_tokens}."
        )
    if (length := settings.prompt.prompt_length) >= context_tokens:
        raise UserError(
            f"The prompt must be shorter than the context: --prompt-length is {length}, --context-tokens"
            f" {context_tokens}."
        )
    config.check_length(PREAMBLE_TOKENS + query_tokens + 1)
    # A longer context is read part by part.
    most = min(config.window - PREAMBLE_TOKENS - query_tokens, settings.teacher.teacher_context or math.inf)
    part_tokens = int(min(context_tokens, most))
    mesh = mesh_of(settings)
    if mesh is not None:
        shares, devices = mesh.shape[DATA], mesh.size
    else:
        shares = devices = jax.local_device_count() if settings.devices.parallel == "pmap" else 1
    parts = shares * settings.devices.grad_accumulation

    def packing_of(batch_size: int) -> Packing:
        return Packing.of(np.array([query_tokens]), batch_size).over(parts, query_tokens)

    packing = packing_of(settings.training.batch_size)
    context = jax.eval_shape(lambda: decoder.empty_prefix(config, PREAMBLE_TOKENS + part_tokens))
    context_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(context))

    @functools.cache
    def memory(rows: int) -> Memory:
        # With pmap each device runs what it would alone, on its share of the rows.
        own = rows if mesh is not None else rows // shares
        found: Any = compiled(config, settings, Packing(own, packing.length), mesh).memory_analysis()
        sizes = found.argument_size_in_bytes, found.temp_size_in_bytes, found.output_size_in_bytes
        return Memory(*sizes, context_bytes)

    readings = parts if PROMPT_KINDS[settings.prompt.kind].IS_READ else 0
    wanted = Wanted.by(as_objective(settings.training.objective), config.vocab_size)
    heads = 3 if wanted.train == "hidden" else 2  # the teacher's part is known
    flops = step_flops(config, settings.prompt.prompt_length, query_tokens, packing, readings, heads)
    rate = matmul_rate(config)
    working = 1 if jax.default_backend() == "cpu" else devices  # a CPU's devices are one processor
    limit = memory_limit or device_memory(devices)
    total = _or_infinite(lambda rows: memory(rows).total)
    largest_rows = largest(total, FILL * limit, packing.rows, multiple=parts)
    room = Packing(largest_rows, packing.length).tokens
    sizes = range(1, room // query_tokens + 1)
    return Plan(
        device=jax.devices()[0].device_kind,
        devices=devices,
        rows=packing.rows,
        row_tokens=packing.length,
        memory=memory(packing.rows),
        memory_limit=limit,
        flops=flops,
        matmul_rate=rate,
        utilisation=UTILISATION,
        step_seconds=flops / (working * rate * UTILISATION),
        largest_rows=largest_rows,
        largest_batch_size=bisect.bisect_right(sizes, room, key=lambda size: packing_of(size).tokens),
    )


def prompts_at_once(
    config: DecoderConfig,
    settings: Settings,
    packing: Packing,
    mesh: Mesh | None,
    *,
    most: int,
    memory_limit: int | None = None,
    teacher_head: OutputHead | None = None,
) -> int:
    """Prompts, at most ``most``, that one step has room for: at least one for each part of ``data``.

    Args:
      config: configuration of the model.
      settings: settings of all prompts.
      packing: packing of a prompt's batches.
      mesh: over whose axis ``data`` the prompts go.
      most: a multiple of that axis.
      memory_limit: bytes of a device; by default what it says of itself, and without that no limit.
      teacher_head: head of the teacher, if it is another model.
    """
    limit = memory_limit or _memory_stats().get("bytes_limit", math.inf)
    parts = 1 if mesh is None else mesh.shape[DATA]

    @functools.cache
    @_or_infinite
    def size(prompts: int) -> float:
        found: Any = compiled(config, settings, packing, mesh, prompts, teacher_head).memory_analysis()
        return found.argument_size_in_bytes + found.temp_size_in_bytes  # the states are donated

    if limit == math.inf or size(most) <= FILL * limit:
        return most
    half = max(parts, most // 2 // parts * parts)
    return min(most, max(parts, largest(size, FILL * limit, half, multiple=parts)))


def _or_infinite(size_of: Callable[[int], float]) -> Callable[[int], float]:
    """The same sizes; infinite if the compiler refuses the program for want of room, as a TPU's does."""

    def checked(count: int) -> float:
        try:
            return size_of(count)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                return math.inf
            raise

    return checked


def compiled(
    config: DecoderConfig,
    settings: Settings,
    packing: Packing,
    mesh: Mesh | None,
    prompts: int = 1,
    teacher_head: OutputHead | None = None,
) -> jax.stages.Compiled:
    """The update of so many prompts with batches of this shape, as a driver runs it, from shapes alone."""
    chosen = UpdateSettings.of(config, settings)

    def start() -> TrainState:  # of any start: its shapes are the same
        kind, count = PROMPT_KINDS[settings.prompt.kind], settings.prompt.prompt_length

        def nothing(*_: Any) -> KeyValues:
            return decoder.empty_prefix(config, count)

        def zeros(ids: Any) -> Array:
            return jnp.zeros((len(ids), config.width))

        ids, key = np.zeros(count, np.int32), jax.random.key(0)
        source = Source(
            key,
            ids,
            count,
            (config.layers, config.kv_heads),
            zeros,
            config.vocab_size,
            read=nothing,
            context=nothing,
            written=lambda _: ids,
        )
        sigma = kind.initial(Start("first", source, settings.prompt.rank))
        rates = kind.rates(sigma, {})
        return initial_state(sigma, chosen.optimizer, key=jax.random.key(0), rates=rates)

    preamble = jax.eval_shape(lambda: decoder.empty_prefix(config, PREAMBLE_TOKENS))
    params = decoder.parameter_shapes(config)
    teacher_head = jax.eval_shape(lambda: teacher_head)
    states, batches = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((prompts, *leaf.shape), leaf.dtype),
        (jax.eval_shape(start), _batch(config, packing, teacher_head, chosen.objective)),
    )
    cut = 0
    if mesh is not None:
        cut = cut_axis(prompts, mesh.shape[DATA])

        def lie(axis: int | None, tree: PyTree) -> PyTree:
            where = NamedSharding(mesh, along(DATA, axis))
            return jax.tree.map(lambda leaf: leaf.update(sharding=where), tree)

        layout = sharding.layout(params, config, mesh)
        params = jax.tree.map(lambda leaf, where: leaf.update(sharding=where), params, layout)
        layout = sharding.head_layout(teacher_head, mesh)
        teacher_head = jax.tree.map(lambda leaf, where: leaf.update(sharding=where), teacher_head, layout)
        preamble, batches = lie(None, preamble), lie(cut, batches)
        states = lie(None if cut else 0, states)
    frozen = Frozen(params, preamble, teacher_head)
    return sharded_update.lower(states, batches, frozen=frozen, settings=chosen, mesh=mesh, cut=cut).compile()


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
    """The device's speed at a square matrix product in the model's dtype: operations a second, at best."""
    size = 2048 if jax.default_backend() == "cpu" else 8192  # width of the product that is timed
    product = jax.jit(functools.partial(jnp.matmul, precision=config.precision))
    matrix = jax.random.normal(jax.random.key(0), (size, size)).astype(config.dtype)
    product(matrix, matrix).block_until_ready()

    def seconds() -> float:
        started = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        return time.perf_counter() - started

    return 2 * size**3 / min(seconds() for _ in range(5))


def device_memory(devices: int) -> int:
    """The memory of a device, in bytes; ``devices`` of a CPU share the machine's memory."""
    own = _memory_stats().get("bytes_limit")
    return own or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // devices


def _memory_stats() -> dict[str, int]:
    return jax.local_devices()[0].memory_stats() or {}


def largest(size_of: Callable[[int], float], limit: float, rows: int, *, multiple: int = 1) -> int:
    """About the most rows whose size is within the limit; 0 if none are found.

    Size is nearly a line in the rows: it is followed to the limit, and computed there, until it fits to 5%.

    Args:
      size_of: so many rows in bytes, or infinite; not cheap.
      limit: in bytes.
      rows: where to start.
      multiple: what the rows must be a multiple of.

    Example:
      >>> largest(lambda rows: 1000 + 30 * rows, 2000, 2)
      33
    """
    known = {n: size_of(n) for n in (rows, 2 * rows)}
    while len(known) < 8 and not any(0.95 * limit <= size <= limit for size in known.values()):
        fitting = {n for n, size in known.items() if size <= limit}
        low = max(fitting, default=0)
        high = min(known.keys() - fitting, default=64 * max(known))
        a, b = sorted(known, key=lambda n: abs(known[n] - limit))[:2]
        if low in known and high in known:
            a, b = low, high
        rise = known[b] - known[a]
        guess = (low + high) / 2
        if math.isfinite(rise) and rise:
            guess = a + (limit - known[a]) * (b - a) / rise
        guess = int(min(max(guess, low, multiple), high - 1)) // multiple * multiple
        if guess in (0, *known):
            break
        known[guess] = size_of(guess)
    return max((n for n, size in known.items() if size <= limit), default=0)


def _batch(
    config: DecoderConfig, packing: Packing, teacher_head: OutputHead | None, objective: Objective
) -> Rows:
    """The shapes of a packed batch with what the objective needs of the teacher."""
    shape = packing.rows, packing.length
    of: Any = jax.ShapeDtypeStruct  # stands for an array
    ids, live = of(shape, jnp.int32), of(shape, jnp.bool_)
    width, dtype = config.width, config.dtype
    if teacher_head is not None:
        width, dtype = teacher_head.unembedding.shape[1], teacher_head.unembedding.dtype
    rows = Rows(ids, ids, ids, live, {"tokens": ids}, ids)
    tokens = config.vocab_size if teacher_head is None else teacher_head.unembedding.shape[0]
    wanted = Wanted.by(objective, tokens)
    if wanted.train == "hidden":
        return rows.with_targets(hidden=of((*shape, width), dtype))
    say = functools.partial(SIGNALS[wanted.train].at_positions, **dict(wanted.options))
    given = decoder.parameter_shapes(config), decoder.empty_prefix(config), rows
    said = jax.eval_shape(lambda params, prefix, rows: say(params, config, prefix, rows), *given)
    return rows.with_targets(**{wanted.train: said})
