"""Keys, values and biases of K slots a head on average: each head has as many as its attention needs.

Some heads look at one or two places of a text whatever is asked, others all over it. In the memory of K slots
each, most heads have too many and a few far too few.

Reference: Feng et al. 2024, Ada-KV (arXiv:2407.11550); Zweiger et al. 2026, Fast KV Compaction via Attention
Matching.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsp.prompts import key_value
from jaxsp.prompts.initializers import ABSENT, Start
from jaxsp.typing import Array, Bool, Float, Int, KeyValues, PyTree

DEFAULTS = key_value.DEFAULTS
IS_READ = False
FORM = {"keys": "n f", "values": "n f", "bias": "l w g", "context_length": ""}

WIDEST = 4
"""A head has at most so many times K slots."""

Sigma = Mapping[str, Any]
"""``keys`` and ``values`` ``[N, F]`` of all N = K L G slots, ordered by layer, head and slot; ``bias``
``[L, 4K, G]``, ``ABSENT`` before a head's slots; ``context_length`` as in ``key_value``."""


def initial(start: Start) -> Sigma:
    """σ that starts as these keys and values, float32."""
    keys, values, bias = _packed(start.uneven(WIDEST * start.source.prompt_length))
    length = jnp.float32(start.source.context_length)
    return {"keys": keys, "values": values, "bias": bias, "context_length": length}


@jax.jit
def _packed(found: KeyValues) -> tuple[Array, Array, Array]:
    """Keys and values of the slots that are there, one head after the other; and all biases."""
    assert found.bias is not None
    bias_LWG = found.bias[:, 0].astype(jnp.float32)
    L, W, G = bias_LWG.shape
    there = _there(bias_LWG).swapaxes(1, 2).reshape(-1)
    (at_N,) = jnp.nonzero(there, size=L * G * W // WIDEST)

    def slots(leaf: Array) -> Array:
        return leaf[:, 0].astype(jnp.float32).swapaxes(1, 2).reshape(L * G * W, -1)[at_N]

    return slots(found.keys), slots(found.values), bias_LWG


def _there(bias_LWG: Float[Array, "l w g"]) -> Bool[Array, "l w g"]:
    return jnp.asarray(bias_LWG) > ABSENT / 2


def _index(there_LWG: Bool[Array, "l w g"]) -> Int[Array, "l w g"]:
    """The place of each slot among all; of those that are not there, any."""
    there_LGW = there_LWG.swapaxes(1, 2)
    before = jnp.cumsum(there_LGW.reshape(-1)).reshape(there_LGW.shape) - 1
    return jnp.maximum(before, 0).swapaxes(1, 2)


def prefix(sigma: Sigma, preamble: KeyValues, prefill: Any) -> KeyValues:
    """``preamble`` followed by σ; differentiable in σ."""
    bias_LWG = jnp.asarray(sigma["bias"])
    there_LWG = _there(bias_LWG)
    index_LWG = _index(there_LWG)
    keys, values = (
        jnp.where(there_LWG[..., None], jnp.asarray(sigma[name])[index_LWG], 0) for name in ("keys", "values")
    )
    return key_value.prefix({**sigma, "keys": keys, "values": values}, preamble, prefill)


def prompt_length(sigma: Sigma) -> int:
    """K, in slots: those of a head on average."""
    return sigma["bias"].shape[1] // WIDEST


def rates(sigma: Sigma, factors: Mapping[str, float]) -> PyTree:
    """Sizes of a step of each entry at a learning rate of 1."""
    there_LWG = _there(sigma["bias"])
    index_LWG = _index(there_LWG)
    first_LWG = there_LWG & (jnp.cumsum(there_LWG, axis=1) == 1)
    slot_LWG = jnp.where(first_LWG, factors.get("first", 1.0), 1.0) * there_LWG
    at = jnp.where(there_LWG, index_LWG, len(sigma["keys"])).reshape(-1)

    def unit(name: str) -> Array:
        squares_LWG = jnp.mean(jnp.square(jnp.asarray(sigma[name])), axis=-1)[index_LWG] * there_LWG
        mean_L = squares_LWG.sum(axis=(1, 2)) / jnp.maximum(there_LWG.sum(axis=(1, 2)), 1)
        size_L = jnp.where(mean_L > 0, jnp.sqrt(mean_L), 1.0)
        each_LWG = factors.get(name, 1.0) * size_L[:, None, None] * slot_LWG
        flat = jnp.zeros(len(sigma[name])).at[at].set(each_LWG.reshape(-1), mode="drop")
        return flat[:, None]

    bias = factors.get("bias", 1.0) * slot_LWG
    return {"keys": unit("keys"), "values": unit("values"), "bias": bias, "context_length": jnp.float32(0)}
