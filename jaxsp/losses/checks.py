"""Argument checks shared by the losses: at trace time where it can be known, naming the argument."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxsp.typing import AnyArray, Array, Bool, Float, Int

Logits: TypeAlias = Float[AnyArray, "*b t v"]
Hidden: TypeAlias = Float[AnyArray, "*b t d"]
Tokens: TypeAlias = Int[AnyArray, "*b t"]
Mask: TypeAlias = Bool[AnyArray, "*b t"] | None
Losses: TypeAlias = Float[Array, "*b t"]
AnswerLosses: TypeAlias = Float[Array, "*b"]


def prepare(mask: Mask, temperature: float = 1.0, last: str = "v", /, **named: AnyArray) -> tuple[Array, ...]:
    """The mask and each array, checked; the arrays in float32, divided by the temperature.

    The teacher's get no gradient. Under the mask all are 0 before anything is computed: a NaN there
    must not reach the gradient through a multiplication by zero.
    """
    check_floating(last, **named)
    check_positive("temperature", temperature)
    mask = check_mask(mask, next(iter(named.values())).shape[:-1])
    sides = [mask]
    for name, array in named.items():
        array = jax.lax.stop_gradient(array) if name.startswith("teacher") else array
        scaled = (array.astype(jnp.float32) / temperature).astype(jnp.float32)
        sides.append(jnp.where(mask[..., None], scaled, 0.0))
    return tuple(sides)


def check_floating(last: str = "v", /, **named: AnyArray) -> None:
    """Each array is floating ``[*b, t, last]``, and all have the same shape."""
    kind = "logits" if last == "v" else "vectors"
    for name, array in named.items():
        _check_array(name, array)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating-point {kind}, not {array.dtype}.")
        if array.ndim < 2 or array.shape[-1] == 0:
            raise ValueError(f"{name} must have shape [*b, t, {last}], not {list(array.shape)}.")
    if len({array.shape for array in named.values()}) > 1:
        shapes = " and ".join(f"{name} {list(array.shape)}" for name, array in named.items())
        raise ValueError(f"The {kind} must have one shape; got {shapes}.")


def check_head(name: str, hidden: AnyArray, head_name: str, head: AnyArray) -> int:
    """The number of the head's tokens, which is floating ``[v, d]`` for floating vectors ``[*b, t, d]``."""
    check_floating("d", **{name: hidden})
    if head.ndim != 2 or 0 in head.shape or not jnp.issubdtype(head.dtype, jnp.floating):
        raise ValueError(f"{head_name} must be floating [v, d], not {head.dtype} {list(head.shape)}.")
    if head.shape[1] != hidden.shape[-1]:
        raise ValueError(f"{name} has vectors of {hidden.shape[-1]} and {head_name} rows of {head.shape[1]}.")
    return head.shape[0]


def check_batch(name: str, array: AnyArray, batch: tuple[int, ...], last: str) -> None:
    """The array is ``[*batch, last]``."""
    if array.shape[:-1] != batch:
        raise ValueError(f"{name} must have shape {[*batch, last]}, not {list(array.shape)}.")


def check_mask(mask: AnyArray | None, shape: tuple[int, ...]) -> Array:
    """The mask, boolean and of exactly the losses' shape; all True for ``None``."""
    if mask is None:
        return jnp.ones(shape, bool)
    _check_array("mask", mask)
    if mask.shape != shape:
        raise ValueError(f"mask must have shape {list(shape)}, not {list(mask.shape)}.")
    if mask.dtype != jnp.bool_:
        raise ValueError(f"mask must be boolean, not {mask.dtype}.")
    return jnp.asarray(mask)


def check_ids(
    ids: AnyArray, shape: tuple[int, ...], vocabulary: int, mask: AnyArray, *, name: str = "targets"
) -> None:
    """Integer token ids of exactly this shape; in ``[0, vocabulary)`` where the mask is True.

    The range can't be known of a traced array; what is out of it then gives NaN, never another
    token's number.
    """
    _check_array(name, ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name} must be integer token ids, not {ids.dtype}.")
    if ids.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(ids.shape)}.")
    if _known(ids) and _known(mask):
        counted = np.asarray(ids)[np.asarray(mask)]
        wrong = counted[(counted < 0) | (counted >= vocabulary)]
        if wrong.size:
            raise ValueError(f"{name} must lie in [0, {vocabulary}); got {wrong.flat[0]}.")


def check_positive(name: str, value: Any) -> None:
    if _known(value) and not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, not {value}.")


def fraction(name: str, value: Any) -> float:
    """The number, which lies between 0 and 1."""
    value = number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, not {value}.")
    return value


def check_not_negative(name: str, array: AnyArray) -> None:
    if _known(array) and (np.asarray(array) < 0).any():
        raise ValueError(f"{name} must not be negative; the least is {np.min(array)}.")


def check_count(name: str, value: int) -> None:
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value}.")


def number(name: str, value: Any) -> float:
    """The number as a Python one: it decides what is compiled."""
    try:
        return float(value)
    except TypeError as error:  # jax's error of a traced value is one, too
        raise ValueError(
            f"{name} must be a number that is known when the program is traced, not {value}."
        ) from error


def _check_array(name: str, array: Any) -> None:
    if not hasattr(array, "dtype"):
        raise ValueError(f"{name} must be an array, not a {type(array).__name__}.")


def _known(value: Any) -> bool:
    return not isinstance(value, jax.core.Tracer) and getattr(value, "is_fully_addressable", True)
