"""Argument checks shared by the losses: at trace time where it can be known, naming the argument."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxsp.typing import AnyArray, Array, Bool, Float, Int

# Their docstrings write ``[*b, t, v]``. A single position, as inside of jax.vmap, has no axes but the last.
Logits: TypeAlias = Float[AnyArray, "*t v"]
Hidden: TypeAlias = Float[AnyArray, "*t d"]
Tokens: TypeAlias = Int[AnyArray, "*t"]
Mask: TypeAlias = Bool[AnyArray, "*t"] | Int[AnyArray, "*t"] | None
Losses: TypeAlias = Float[Array, "*t"]
Weights: TypeAlias = Float[AnyArray, "*w"] | None
Number: TypeAlias = float | Array
"""A Python number, or a scalar array, which may be traced."""


def prepare(mask: Mask, temperature: Any = 1.0, last: str = "v", /, **named: AnyArray) -> tuple[Array, ...]:
    """The mask and each array, checked; the arrays in float32, divided by the temperature.

    The teacher's get no gradient. Under the mask all are 0 before anything is computed: a NaN there
    must not reach the gradient through a multiplication by zero.
    """
    check_floating(last, **named)
    temperature = positive("temperature", temperature)
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
        if not array.ndim or array.shape[-1] == 0:
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


def check_heads(
    student_hidden: AnyArray, head: AnyArray, teacher_hidden: AnyArray | None, other: AnyArray | None
) -> int:
    """The number of tokens that the heads of student and teacher share."""
    tokens = check_head("student_hidden", student_hidden, "unembedding", head)
    if teacher_hidden is not None:
        name, other = ("unembedding", head) if other is None else ("teacher_unembedding", other)
        if check_head("teacher_hidden", teacher_hidden, name, other) != tokens:
            raise ValueError(
                f"unembedding has {tokens} rows and teacher_unembedding {other.shape[0]};"
                " teacher and student must share the vocabulary."
            )
    return tokens


def check_shape(name: str, array: AnyArray, shape: tuple[int, ...], *last: str) -> None:
    """Checks that the shape is ``shape``, followed by an axis of any size for each name in ``last``."""
    _check_array(name, array)
    if array.ndim != len(shape) + len(last) or array.shape[: len(shape)] != shape:
        raise ValueError(f"{name} must have shape {[*shape, *last]}, not {list(array.shape)}.")


def check_given(given: Mapping[str, AnyArray], live: AnyArray, tokens: int) -> None:
    """Checks what is given for each position ``[*b, t]``, as the objectives take it."""
    batch = live.shape
    for name, last in {"teacher_hidden": "d", "teacher_log_probs": "k", "teacher_ids": "k"}.items():
        if name in given:
            check_shape(name, given[name], batch, last)
    has_best = "teacher_log_probs" in given and "teacher_ids" in given
    if "targets" in given:
        check_ids(given["targets"], batch, tokens, live)
    if "teacher_tail" in given and (given["teacher_tail"].shape != batch or not has_best):
        raise ValueError(
            f"teacher_tail must have shape {list(batch)} and stand beside teacher_log_probs and"
            f" teacher_ids; it has {list(given['teacher_tail'].shape)}."
        )
    if has_best:
        check_entries(given["teacher_log_probs"], given["teacher_ids"], live, tokens)


def check_entries(log_probs: AnyArray, ids: AnyArray, mask: AnyArray, tokens: int) -> AnyArray:
    """The teacher's best tokens; gives True where an entry is there: neither ``-inf`` nor under the mask."""
    check_floating("k", teacher_log_probs=log_probs)
    check_shape("teacher_log_probs", log_probs, mask.shape, "k")
    there = mask[..., None] & (log_probs != -jnp.inf)
    check_ids(ids, log_probs.shape, tokens, there, name="teacher_ids")
    if _known(log_probs, ids, there):
        entries, which = np.asarray(log_probs, np.float32)[np.asarray(there)], np.asarray(there)
        if (entries > 1e-6).any():
            raise ValueError(f"teacher_log_probs must be at most 0, as logarithms; got {entries.max():g}.")
        fillers = -1 - np.arange(ids.shape[-1])
        ordered = np.sort(np.where(which, np.asarray(ids, np.int64), fillers), axis=-1)
        twice = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
        if twice.size:
            raise ValueError(f"teacher_ids must name a token once at a position; {twice[0]} is there twice.")
    return there


def check_mask(mask: AnyArray | None, shape: tuple[int, ...]) -> Array:
    """The mask as booleans of exactly the losses' shape; all True for ``None``."""
    if mask is None:
        return jnp.ones(shape, bool)
    check_shape("mask", mask, shape)
    if mask.dtype != jnp.bool_ and not jnp.issubdtype(mask.dtype, jnp.integer):
        raise ValueError(f"mask must be boolean, or integers 0 and 1, not {mask.dtype}.")
    if mask.dtype != jnp.bool_ and _known(mask) and not np.isin(mask, (0, 1)).all():
        raise ValueError(f"mask must be boolean, or integers 0 and 1; it goes up to {np.max(mask)}.")
    return jnp.asarray(mask).astype(bool)


def weights_of(weights: AnyArray, shape: tuple[int, ...]) -> Array:
    """Weights of positions, or of sequences, as those of positions; float32, without a gradient."""
    if weights.shape != shape and weights.shape == shape[:-1]:
        weights = jnp.broadcast_to(weights[..., None], shape)
    if weights.shape != shape:
        raise ValueError(
            f"weights must have shape {list(shape)} (of positions) or {list(shape[:-1])} (of"
            f" sequences), not {list(weights.shape)}."
        )
    if _known(weights) and (np.asarray(weights) < 0).any():
        raise ValueError(f"weights must not be negative; the least is {np.min(weights)}.")
    return jax.lax.stop_gradient(jnp.asarray(weights)).astype(jnp.float32)


def check_ids(
    ids: AnyArray, shape: tuple[int, ...], vocabulary: int, mask: AnyArray, *, name: str = "targets"
) -> None:
    """Integer token ids of exactly this shape; in ``[0, vocabulary)`` where the mask is True.

    The range can't be known of a traced array; what is out of it then gives NaN, never another
    token's number.
    """
    check_shape(name, ids, shape)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name} must be integer token ids, not {ids.dtype}.")
    if _known(ids, mask):
        counted = np.asarray(ids)[np.asarray(mask)]
        wrong = counted[(counted < 0) | (counted >= vocabulary)]
        if wrong.size:
            raise ValueError(f"{name} must lie in [0, {vocabulary}); got {wrong.flat[0]}.")


def positive(name: str, value: Any) -> Any:
    """The number, which is positive and finite; a traced one reads NaN where it is not."""
    return _within(name, value, lambda x: (x > 0) & (x < math.inf), "be positive")


def fraction(name: str, value: Any) -> Any:
    """The number, which lies between 0 and 1; a traced one reads NaN where it does not."""
    return _within(name, value, lambda x: (x >= 0) & (x <= 1), "lie between 0 and 1")


def finite(name: str, value: Any) -> Any:
    """The number, which is finite; a traced one reads NaN where it is not."""
    return _within(name, value, lambda x: (-math.inf < x) & (x < math.inf), "be finite")


def _within(name: str, value: Any, allowed: Any, words: str) -> Any:
    if isinstance(value, jax.core.Tracer):
        value = jax.lax.stop_gradient(value).astype(jnp.float32)
        return jnp.where(allowed(value), value, jnp.nan)
    value = number(name, value)
    if not allowed(value):
        raise ValueError(f"{name} must {words}, not {value}.")
    return value


def check_count(name: str, value: Any) -> None:
    """A whole number of at least 1."""
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value}.")


def number(name: str, value: Any) -> float:
    """The number as a Python one: it decides what is compiled."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:  # jax's error of a traced value is one, too
        raise ValueError(
            f"{name} must be a number that is known when the program is traced, not {value}."
        ) from error


def _check_array(name: str, array: Any) -> None:
    if not hasattr(array, "dtype"):
        raise ValueError(f"{name} must be an array, not a {type(array).__name__}.")


def _known(*values: Any) -> bool:
    return all(
        not isinstance(value, jax.core.Tracer) and getattr(value, "is_fully_addressable", True)
        for value in values
    )
