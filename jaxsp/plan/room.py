"""Weights that a described device has no room for, and the devices that would have it."""

from __future__ import annotations

import itertools
import math

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxsp.device import CHIPS, HOST, SLICES, Described
from jaxsp.files import size
from jaxsp.models import decoder, sharding
from jaxsp.models.config import DecoderConfig
from jaxsp.models.sharding import DATA, FSDP, MODEL
from jaxsp.typing import UserError

FILL = 0.9
"""Part of a device's memory to count on: programs and fragments take some, too."""

WEIGHTS = 0.6
"""Part of a device's memory that weights may take so that there is room for all else."""


def check_weights(config: DecoderConfig, mesh: Mesh | None, system: Described) -> None:
    """Refuses a model whose weights alone are too large, before anything is compiled.

    Args:
      config: configuration of the model.
      mesh: the devices that share the weights.
      system: the described devices.

    Raises:
      UserError: they are; it says what would hold them.
    """
    own = weight_bytes(config, mesh)
    if own > FILL * system.chip.memory:
        raise UserError(
            f"The model's weights take {size(own)} on a device, and a {system.kind} has"
            f" {size(system.chip.memory)}; {what_holds(config)}."
        )


def room_elsewhere(config: DecoderConfig, mesh: Mesh | None, system: Described) -> str | None:
    """The devices that have room for the weights and more, in words; ``None`` if these have it themselves."""
    return None if weight_bytes(config, mesh) <= WEIGHTS * system.chip.memory else what_holds(config)


def weight_bytes(config: DecoderConfig, mesh: Mesh | AbstractMesh | None) -> int:
    """Bytes of the weights on each device."""
    shapes = decoder.parameter_shapes(config)
    sizes = jax.tree.map(lambda leaf: leaf.size * leaf.dtype.itemsize, shapes)
    if mesh is not None:
        layout = sharding.layout(shapes, config, mesh)
        sizes = jax.tree.map(
            lambda leaf, where: math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize, shapes, layout
        )
    return sum(jax.tree.leaves(sizes))


def what_holds(config: DecoderConfig) -> str:
    """The smallest of the devices that can be described with room for the weights, in words."""
    parts = math.gcd(config.heads, config.kv_heads, config.mlp_width)
    axes = {count: MODEL if parts % count == 0 else FSDP for count in SLICES if count <= HOST}
    able = [count for count, axis in axes.items() if axis == MODEL or config.width % count == 0]
    own, least = config.quantization, math.inf
    for quantization, count in itertools.product(dict.fromkeys((own, "int8")), able):
        sizes = {DATA: 1, FSDP: 1, MODEL: 1} | {axes[count]: count}
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        share = weight_bytes(config.replace(quantization=quantization), mesh)
        least = min(least, share)
        for name, chip in CHIPS.items():
            if share <= WEIGHTS * chip.memory:
                over = f" --parallel mesh --mesh {axes[count]}={count}" if count > 1 else ""
                rounded = "" if quantization == own else f" --quantization {quantization}"
                return f"--device {name}-{count}{over}{rounded} has room for them"
    return (
        f"none of the devices that can be described has room for them: over {able[-1]} of them, the most that"
        f" its sizes allow, each takes {size(int(least))}"
    )
