"""Rotary position embeddings: the frequencies of each rope type, and the rotation.

References: Su et al. 2021 (arXiv:2104.09864); the ``llama3`` scaling is that of Llama 3.1
(arXiv:2407.21783) as configured by ``rope_parameters`` in ``config.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsp.typing import Array, Float, Int, UserError


def _plain(theta: float, head_width: int) -> np.ndarray:
    # float32 throughout, as the reference implementations do: at position 8,000 the rounding of a
    # frequency is a visible angle.
    exponent = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    return np.float32(1.0) / np.power(np.float32(theta), exponent)


def _llama3(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    factor = parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    window = parameters["original_max_position_embeddings"]
    turns = window * frequencies / (2 * math.pi)  # full turns within the original window
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0: stretch, 1: leave alone
    return ((1 - blend) * frequencies / factor + blend * frequencies).astype(np.float32)


def rope_frequencies(parameters: Mapping[str, Any], head_width: int) -> tuple[float, ...]:
    """Radians per position of each rotary pair.

    Args:
      parameters: ``rope_parameters`` of a ``transformers`` config: ``rope_theta``, ``rope_type`` and
        what that type needs.
      head_width: width of one attention head.

    Returns:
      ``head_width / 2`` frequencies, each exactly a float32 number.

    Raises:
      UserError: the rope type is not one of ``default``, ``llama3``.
    """
    kind = parameters.get("rope_type", "default")
    frequencies = _plain(parameters["rope_theta"], head_width)
    if kind == "llama3":
        frequencies = _llama3(frequencies, parameters)
    elif kind != "default":
        raise UserError(f"Rope type {kind!r} is not supported; jaxsp knows 'default' and 'llama3'.")
    return tuple(float(f) for f in frequencies)


def rotation(
    positions: Int[Array, "b t"], frequencies: tuple[float, ...]
) -> tuple[Float[Array, "b t half"], Float[Array, "b t half"]]:
    """Cosine and sine of every position's angles, float32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "b t heads f"],
    cos_sin: tuple[Float[Array, "b t half"], Float[Array, "b t half"]],
) -> Float[Array, "b t heads f"]:
    """Turns the pairs ``(x[i], x[i + F/2])`` by their angle (the layout of Hugging Face weights)."""
    cos, sin = (part[:, :, None, :].astype(x.dtype) for part in cos_sin)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
