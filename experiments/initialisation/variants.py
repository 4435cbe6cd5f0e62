"""Ways to fit the training questions less closely: decay towards the start, and slots left out at random."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsp.prompts import PROMPT_KINDS, key_value
from jaxsp.prompts.sizes import root_mean_square
from jaxsp.typing import EMPTY, Array, KeyValues, PyTree

LEFT_OUT = 0.15
"""Chance of a slot to be left out of a step."""


def _prefix(sigma: Mapping[str, Any], preamble: KeyValues, prefill: Any) -> KeyValues:
    whole = key_value.prefix(sigma, preamble, prefill)
    if "drawn" not in sigma:
        return whole
    count = key_value.prompt_length(sigma)
    own_K = jnp.where(sigma["drawn"], whole.positions[0, -count:], EMPTY)
    return KeyValues(whole.keys, whole.values, whole.positions.at[:, -count:].set(own_K), whole.bias)


def _drawn(sigma: Mapping[str, Any], key: Array) -> Mapping[str, Any]:
    there = jax.random.bernoulli(key, 1 - LEFT_OUT, (key_value.prompt_length(sigma),))
    return {**sigma, "drawn": there.at[-1].set(True)}  # the last one says where the queries stand


def register() -> None:
    """Adds the kind ``slots_left_out`` to the table."""
    parts = {**vars(key_value), "prefix": _prefix, "drawn": _drawn}
    kind: Any = types.SimpleNamespace(**parts)
    PROMPT_KINDS["slots_left_out"] = kind


def towards_start(strength: float) -> optax.GradientTransformation:
    """Decay of σ towards where it started, in units of the size of σ's entries there."""

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        def one(change: Array, own: Array, now: Array) -> Array:
            axes = tuple(range(1, own.ndim)) if own.ndim > 3 else None
            return change - strength * (now - own) / root_mean_square(own, axis=axes)

        return jax.tree.map(one, updates, state, params), state

    return optax.GradientTransformation(lambda params: params, update)
