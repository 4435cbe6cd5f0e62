"""K free slots of keys, values and a bias in every layer: nothing of σ is read by the model.

Each key stays turned to the position that it stood for; z stands where it stood after the whole context, and
the slots right before it, so that no sliding window hides them.

Reference: Li & Liang 2021, Prefix-Tuning (arXiv:2101.00190); Eyuboglu et al. 2025, Cartridges
(arXiv:2506.06266).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxsp.prompts.initializers import Start
from jaxsp.prompts.sizes import root_mean_square
from jaxsp.typing import EMPTY, Array, KeyValues, PyTree

DEFAULTS = {"initial": "match", "optimizer": "adam", "learning_rate": 0.02, "steps": 100, "keep": "best"}
IS_READ = False
FORM = {"keys": "l k g f", "values": "l k g f", "bias": "l k g", "context_length": ""}

Sigma = Mapping[str, Any]
"""``keys`` and ``values`` ``[L, K, G, F]``, ``bias`` ``[L, K, G]``, and ``context_length``, which is no
parameter: the tokens that σ stands for."""


def initial(start: Start) -> Sigma:
    """σ that starts as these keys and values, float32."""
    found = start.key_values()
    keys, values = (leaf[:, 0].astype(jnp.float32) for leaf in (found.keys, found.values))
    bias = jnp.zeros(keys.shape[:3]) if found.bias is None else found.bias[:, 0]
    length = jnp.float32(start.source.context_length)
    return {"keys": keys, "values": values, "bias": bias, "context_length": length}


def prefix(sigma: Sigma, preamble: KeyValues, prefill: Any) -> KeyValues:
    """``preamble`` followed by σ; differentiable in σ."""
    del prefill
    end = preamble.next_position + jnp.round(sigma["context_length"]).astype(jnp.int32)
    count = prompt_length(sigma)
    # More slots than positions are kinds' own, whose first ones are not there.
    positions = jnp.maximum(end[:, None] - count + jnp.arange(count)[None], EMPTY)
    keys, values, bias = (jnp.asarray(sigma[name])[:, None] for name in ("keys", "values", "bias"))
    dtype = preamble.keys.dtype
    return preamble.append(KeyValues(keys.astype(dtype), values.astype(dtype), positions, bias))


def prompt_length(sigma: Sigma) -> int:
    """K, in slots."""
    return sigma["keys"].shape[1]


def rates(sigma: Sigma, factors: Mapping[str, float]) -> PyTree:
    """Sizes of a step of each entry at a learning rate of 1."""

    def unit(name: str) -> Array:
        return factors.get(name, 1.0) * root_mean_square(sigma[name], axis=(1, 2, 3))

    slot_K = jnp.ones(prompt_length(sigma)).at[0].set(factors.get("first", 1.0))
    keys, values = (unit(name) * slot_K[:, None, None] for name in ("keys", "values"))
    bias = jnp.full((len(sigma["bias"]), 1, 1), factors.get("bias", 1.0)) * slot_K[:, None]
    return {"keys": keys, "values": values, "bias": bias, "context_length": jnp.float32(0)}
