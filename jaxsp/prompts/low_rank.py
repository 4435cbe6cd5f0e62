"""Keys and values of low rank: those of a layer's K slots are combinations of R rows, which they share.

Reference: Hu et al. 2022, LoRA (arXiv:2106.09685), for the factors; the start is the best one of this rank
(Eckart & Young 1936).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxsp.prompts import key_value
from jaxsp.prompts.initializers import Start
from jaxsp.prompts.sizes import root_mean_square
from jaxsp.typing import Array, Float, KeyValues, PyTree

DEFAULTS = {**key_value.DEFAULTS}
IS_READ = False

Sigma = Mapping[str, Any]
"""``keys`` and ``values``: each ``mix`` ``[L, K, R]`` and ``rows`` ``[L, R, G, F]``; ``bias`` and
``context_length`` as of ``key_value``."""


def initial(start: Start) -> Sigma:
    """σ nearest to these keys and values, in each layer."""
    sigma = key_value.initial(start)
    rank = start.rank or max(1, key_value.prompt_length(sigma) // 2)
    return {**sigma, **{name: _factors(sigma[name], rank) for name in ("keys", "values")}}


def _factors(slots_LKGF: Float[Array, "l k g f"], rank: int) -> dict[str, Array]:
    """Factors of equal size whose product is nearest."""
    L, K, G, F = slots_LKGF.shape
    u, s, v = jnp.linalg.svd(slots_LKGF.reshape(L, K, G * F), full_matrices=False)
    root_LR = jnp.sqrt(s[:, :rank])
    mix, rows = u[:, :, :rank] * root_LR[:, None], root_LR[..., None] * v[:, :rank]
    return {"mix": mix, "rows": rows.reshape(L, -1, G, F)}


def prefix(sigma: Sigma, preamble: KeyValues, prefill: Any) -> KeyValues:
    """``preamble`` followed by σ; differentiable in σ."""
    return key_value.prefix(_whole(sigma), preamble, prefill)


def _whole(sigma: Sigma) -> key_value.Sigma:
    keys, values = (
        jnp.einsum("lkr,lrgf->lkgf", sigma[name]["mix"], sigma[name]["rows"]) for name in ("keys", "values")
    )
    return {**sigma, "keys": keys, "values": values}


def prompt_length(sigma: Sigma) -> int:
    """K, in slots."""
    return sigma["bias"].shape[1]


def rates(sigma: Sigma, factors: Mapping[str, float]) -> PyTree:
    """Sizes of a step of each entry at a learning rate of 1; ``first`` is the first slot's mix."""
    slot_K = jnp.ones(prompt_length(sigma)).at[0].set(factors.get("first", 1.0))

    def of(name: str) -> dict[str, Array]:
        factor, (mix, rows) = factors.get(name, 1.0), (sigma[name][part] for part in ("mix", "rows"))
        return {
            "mix": factor * root_mean_square(mix, axis=(1, 2)) * slot_K[:, None],
            "rows": factor * root_mean_square(rows, axis=(1, 2, 3)),
        }

    bias = jnp.full((len(sigma["bias"]), 1, 1), factors.get("bias", 1.0)) * slot_K[:, None]
    return {"keys": of("keys"), "values": of("values"), "bias": bias, "context_length": jnp.float32(0)}
