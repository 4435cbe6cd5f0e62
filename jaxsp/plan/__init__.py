"""The needs of a compression, before it is run: memory by the compiled update, time by arithmetic.

No weights are loaded, and nothing is executed but matrix products that measure this machine. For a described
TPU nothing at all is: its own compiler says what it needs.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxsp import device
from jaxsp.data.packing import Packing
from jaxsp.device import Described
from jaxsp.losses import as_objective
from jaxsp.models import decoder
from jaxsp.models.config import DecoderConfig
from jaxsp.models.output_head import OutputHead
from jaxsp.models.sharding import row_parts
from jaxsp.plan.arithmetic import matmul_rate, peak_rate, step_flops
from jaxsp.plan.program import PREAMBLE_TOKENS, compiled, prefix_shapes
from jaxsp.plan.room import FILL, check_weights, room_elsewhere
from jaxsp.plan.search import largest
from jaxsp.prompts import PROMPT_KINDS
from jaxsp.settings import Settings
from jaxsp.teacher.signals import Wanted
from jaxsp.training.drivers import mesh_of
from jaxsp.typing import UserError, ceil_div

__all__ = [
    "PREAMBLE_TOKENS",
    "UTILISATION",
    "Memory",
    "Plan",
    "compiled",
    "matmul_rate",
    "plan",
    "prompts_at_once",
    "step_flops",
]

UTILISATION = 0.56
"""Assumed part of the matrix-product rate. Measured (experiments/decoder_speed) for SmolLM2-135M in bfloat16
on two CPU cores, and nowhere else yet."""

DESCRIBED_TRIES = 5
"""Batches compiled for a described device, at most: its compiler takes several times as long as others."""


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
      memory: on each device; ``None`` if the device's compiler refuses the update for want of it.
      memory_limit: what a device has, in bytes.
      flops: operations of a step, on all devices.
      matmul_rate: speed of one device, in floating-point operations a second: measured, or the greatest of a
        described one.
      utilisation: assumed, of that rate.
      step_seconds: expected; communication is not counted.
      largest_rows: rows of the largest batch found to fit in ``FILL`` of the memory; 0 if none does.
      largest_batch_size: the setting whose batches take no more tokens than that one; 0 if none does.
      compiled_for: the described system and its compiler, in words; ``None``: this machine.
      room_elsewhere: if no batch was found to fit and the weights take most of the memory: what would hold
        them, in words.
    """

    device: str
    devices: int
    rows: int
    row_tokens: int
    memory: Memory | None
    memory_limit: int
    flops: float
    matmul_rate: float
    utilisation: float
    step_seconds: float
    largest_rows: int
    largest_batch_size: int
    compiled_for: str | None = None
    room_elsewhere: str | None = None

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.total <= FILL * self.memory_limit


def plan(
    config: DecoderConfig,
    settings: Settings,
    *,
    context_tokens: int,
    query_tokens: int,
    memory_limit: int | None = None,
    system: Described | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Memory, time and the largest batch of a compression.

    Args:
      config: configuration of the model.
      settings: as in ``compress``.
      context_tokens: tokens of the context.
      query_tokens: tokens of a query with its answer, about; half of them are taken to be the answer's.
      memory_limit: bytes of a device; by default what it says of itself, on a CPU the machine's memory.
      system: the described devices to plan for; by default this machine's.
      on_progress: called with what goes on.

    Raises:
      UserError: settings that are invalid, or that fit neither the model nor the devices; or weights that
        the described devices have no room for.
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
    with device.programs_for(system):
        return _planned(config, settings, context_tokens, query_tokens, memory_limit, system, on_progress)


def _planned(
    config: DecoderConfig,
    settings: Settings,
    context_tokens: int,
    query_tokens: int,
    memory_limit: int | None,
    system: Described | None,
    on_progress: Callable[[str], None],
) -> Plan:
    """The plan, where the devices planned for are those that programs are for."""
    # A longer context is read part by part.
    most = min(config.window - PREAMBLE_TOKENS - query_tokens, settings.teacher.teacher_context or math.inf)
    part_tokens = int(min(context_tokens, most))
    mesh = mesh_of(settings)
    if mesh is not None:
        shares, devices = row_parts(mesh), mesh.size
    else:
        shares = devices = len(device.local()) if settings.devices.parallel == "pmap" else 1
    parts = shares * settings.devices.grad_accumulation
    if system is not None:
        check_weights(config, mesh, system)

    def packing_of(batch_size: int) -> Packing:
        return Packing.of(np.array([query_tokens]), batch_size).over(parts, query_tokens)

    packing = packing_of(settings.training.batch_size)
    context_bytes = _context_bytes(config, PREAMBLE_TOKENS + part_tokens)

    @functools.cache
    def memory(rows: int) -> Memory | None:
        on_progress(f"compiling the update of {rows} rows of {packing.length} tokens")
        # With pmap each device runs what it would alone, on its share of the rows.
        own = Packing(rows if mesh is not None else rows // shares, packing.length)
        with _accepted():
            found: Any = compiled(config, settings, own, mesh).memory_analysis()
            sizes = found.argument_size_in_bytes, found.temp_size_in_bytes, found.output_size_in_bytes
            return Memory(*sizes, context_bytes)
        return None

    def total(rows: int) -> float:
        found = memory(rows)
        return math.inf if found is None else found.total

    readings = parts if PROMPT_KINDS[settings.prompt.kind].IS_READ else 0
    wanted = Wanted.by(as_objective(settings.training.objective, by_gradient=False), config.vocab_size)
    heads = 3 if wanted.train == "hidden" else 2  # the teacher's part is known
    flops = step_flops(config, settings.prompt.prompt_length, query_tokens, packing, readings, heads)
    if system is None:
        on_progress("timing this machine's matrix products")
        rate, limit = matmul_rate(config), memory_limit or device_memory(devices)
    else:
        rate, limit = peak_rate(config, system), memory_limit or system.chip.memory
    working = 1 if device.platform() == "cpu" else devices  # a CPU's devices are one processor
    tries = 8 if system is None else DESCRIBED_TRIES
    largest_rows = largest(total, FILL * limit, packing.rows, multiple=parts, tries=tries)
    room = Packing(largest_rows, packing.length).tokens
    sizes = range(1, room // query_tokens + 1)
    return Plan(
        device=device.current().device_kind,
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
        compiled_for=None if system is None else f"{system.name} in {config.dtype}, by {system.compiler}",
        room_elsewhere=None if system is None or largest_rows else room_elsewhere(config, mesh, system),
    )


_TILE = 128
"""Slots that a TPU fills an array up to a multiple of, at most."""


def _context_bytes(config: DecoderConfig, slots: int) -> int:
    """Bytes of keys and values of so many slots; a TPU fills up the last axes of an array."""
    if device.platform() == "tpu":
        # All may not fit one chip, which the compiler refuses; so many take as much as the first of them.
        found: Any = decoder.empty_prefix.lower(config, _TILE).compile().memory_analysis()
        return found.output_size_in_bytes * ceil_div(slots, _TILE)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(prefix_shapes(config, slots)))


@contextlib.contextmanager
def _accepted() -> Iterator[None]:
    """Leaves its block where the compiler refuses a program for want of room, as a TPU's does."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise


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
    """Prompts, at most ``most``, that one step has room for: at least one for each part of the rows.

    Args:
      config: configuration of the model.
      settings: settings of all prompts.
      packing: packing of a prompt's batches.
      mesh: over whose axes ``data`` and ``fsdp`` the prompts go.
      most: a multiple of their parts.
      memory_limit: bytes of a device; by default what it says of itself, and without that no limit.
      teacher_head: head of the teacher, if it is another model.
    """
    limit = memory_limit or _memory_stats().get("bytes_limit", math.inf)
    parts = 1 if mesh is None else row_parts(mesh)

    @functools.cache
    def size(prompts: int) -> float:
        with _accepted():
            found: Any = compiled(config, settings, packing, mesh, prompts, teacher_head).memory_analysis()
            return found.argument_size_in_bytes + found.temp_size_in_bytes  # the states are donated
        return math.inf

    if limit == math.inf or size(most) <= FILL * limit:
        return most
    half = max(parts, most // 2 // parts * parts)
    return min(most, max(parts, largest(size, FILL * limit, half, multiple=parts)))


def device_memory(devices: int) -> int:
    """The memory of a device, in bytes; ``devices`` of a CPU share the machine's memory."""
    own = _memory_stats().get("bytes_limit")
    return own or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // devices


def _memory_stats() -> dict[str, int]:
    return device.local()[0].memory_stats() or {}
