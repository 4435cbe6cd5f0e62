"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864): each rope type, and the rotation.

Types are those of ``rope_parameters`` in ``config.json``: ``linear`` (Chen et al. 2023,
arXiv:2306.15595), ``yarn`` (Peng et al. 2023, arXiv:2309.00071) and ``llama3`` (Grattafiori et al.
2024, arXiv:2407.21783).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsp.typing import Array, Float, Int, UserError


@dataclasses.dataclass(frozen=True)
class Rope:
    """The angle that each pair of a head's coordinates turns by from one position to the next.

    Attributes:
      frequencies: radians per position, each exactly a float32 number; ``n`` of them turn the first
        ``2n`` coordinates. All 0: no positions at all (NoPE).
      magnitude: factor on the rotated queries and keys.
    """

    frequencies: tuple[float, ...]
    magnitude: float = 1.0

    def __repr__(self) -> str:
        """To three digits: other angles show, other rounding on another machine does not."""
        ends = " to ".join(f"{f:.3g}" for f in self.frequencies[:1] + self.frequencies[-1:])
        if all(self.frequencies):
            ends += f", mean {math.exp(sum(map(math.log, self.frequencies)) / len(self.frequencies)):.3g}"
        magnitude = "" if self.magnitude == 1 else f", magnitude={self.magnitude:.3g}"
        return f"Rope({len(self.frequencies)} frequencies, {ends}{magnitude})"

    def without_positions(self) -> Rope:
        """The same width turned by nothing, for layers that ignore positions."""
        return Rope((0.0,) * len(self.frequencies))


# Each takes the plain frequencies and the parameters, and returns frequencies and a magnitude. float32
# throughout, as the reference implementations: at position 8,000 the rounding of a frequency is a
# visible angle.
_Scaled = tuple[np.ndarray, float]
_Scaling = Callable[[np.ndarray, Mapping[str, Any]], _Scaled]


def _default(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> _Scaled:
    return frequencies, 1.0


def _linear(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> _Scaled:
    return frequencies / np.float32(parameters["factor"]), 1.0


def _llama3(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> _Scaled:
    factor = parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    window = parameters["original_max_position_embeddings"]
    turns = window * frequencies / (2 * math.pi)  # full turns within the original window
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0: stretch, 1: leave alone
    return (1 - keep) * frequencies / factor + keep * frequencies, 1.0


def _yarn(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> _Scaled:
    window, theta = parameters["original_max_position_embeddings"], parameters["rope_theta"]
    factor = parameters["factor"]
    pairs = len(frequencies)

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(window / (times * 2 * math.pi)) / math.log(theta)

    first = pair_that_turns(parameters.get("beta_fast") or 32)
    last = pair_that_turns(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    ramp = (np.arange(pairs, dtype=np.float32) - first) / max(last - first, 0.001)
    stretch = np.clip(ramp, 0.0, 1.0).astype(np.float32)  # 1: slow pairs, interpolated
    scaled = stretch * frequencies / np.float32(factor) + (1 - stretch) * frequencies

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        both = parameters.get("mscale"), parameters.get("mscale_all_dim")
        magnitude = temperature(both[0]) / temperature(both[1]) if both[0] and both[1] else temperature(1.0)
    return scaled, float(magnitude)


ROPE_TYPES: dict[str, _Scaling] = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}

_POSITIVE = {"rope_theta", "factor", "original_max_position_embeddings"}


def make_rope(parameters: Mapping[str, Any], head_width: int, turned: float = 1.0) -> Rope:
    """The rotation that a ``transformers`` config asks for.

    Args:
      parameters: ``rope_parameters`` of the config: ``rope_theta``, ``rope_type`` and what that type
        needs.
      head_width: width of one attention head.
      turned: the part of it that turns.

    Raises:
      UserError: the rope type is not a key of ``ROPE_TYPES``, or a parameter is missing or no number.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise UserError(f"Rope type {kind!r} is not supported; jaxsp knows {', '.join(ROPE_TYPES)}.")
    for name in _POSITIVE & set(parameters):
        if not isinstance(parameters[name], int | float) or not 0 < parameters[name] < math.inf:
            raise UserError(f"{name} in rope_parameters must be a positive number; got {parameters[name]!r}.")
    size = int(head_width * turned)
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    try:
        plain = np.float32(1.0) / np.power(np.float32(parameters["rope_theta"]), exponents)
        frequencies, magnitude = ROPE_TYPES[kind](plain, parameters)
    except KeyError as error:
        raise UserError(f"rope_parameters of type {kind!r} lack {error}.") from error
    return Rope(tuple(float(f) for f in frequencies.astype(np.float32)), magnitude)


def rotation(positions: Int[Array, "b t"], rope: Rope) -> tuple[Float[Array, "b t n"], Float[Array, "b t n"]]:
    """Cosine and sine of every position's angles, times the magnitude, float32."""
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * rope.magnitude, jnp.sin(angles) * rope.magnitude


def rotate(
    x: Float[Array, "b t heads f"], cos_sin: tuple[Float[Array, "b t n"], Float[Array, "b t n"]]
) -> Float[Array, "b t heads f"]:
    """Turns the pairs ``(x[i], x[i + n])`` by their angle (the layout of Hugging Face weights).

    Coordinates from ``2n`` on stay as they are.
    """
    cos, sin = (part[:, :, None, :].astype(x.dtype) for part in cos_sin)
    n = cos.shape[-1]
    first, second, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
