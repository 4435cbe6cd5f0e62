"""Argument checks shared by the losses: all at trace time, all naming the argument."""

from __future__ import annotations

import jax.numpy as jnp

from jaxsp.typing import Array


def check_logits(**named: Array) -> None:
    """Each array is floating ``[*b, t, v]``, and all have the same shape."""
    shapes = {}
    for name, array in named.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating-point logits, not {array.dtype}.")
        if array.ndim < 2:
            raise ValueError(f"{name} must have shape [*b, t, v], not {list(array.shape)}.")
        shapes[name] = array.shape
    if len(set(shapes.values())) > 1:
        told = " and ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"The logits must have one shape; got {told}.")


def check_mask(mask: Array | None, shape: tuple[int, ...]) -> Array:
    """The mask, boolean and of exactly the losses' shape; all True for ``None``."""
    if mask is None:
        return jnp.ones(shape, bool)
    if mask.shape != shape:
        raise ValueError(f"mask must have shape {list(shape)}, not {list(mask.shape)}.")
    if mask.dtype != jnp.bool_:
        raise ValueError(f"mask must be boolean, not {mask.dtype}.")
    return mask


def check_targets(targets: Array, shape: tuple[int, ...]) -> None:
    """Integer token ids of exactly the losses' shape."""
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets must be integer token ids, not {targets.dtype}.")
    if targets.shape != shape:
        raise ValueError(f"targets must have shape {list(shape)}, not {list(targets.shape)}.")


def check_positive(**named: float) -> None:
    for name, value in named.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, not {value}.")


def check_fraction(**named: float) -> None:
    for name, value in named.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, not {value}.")
