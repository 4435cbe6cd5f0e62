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
from jaxsp.typing import Array, Float, KeyValues, PyTree, UserError

DEFAULTS = key_value.DEFAULTS
IS_READ = False
FORM = {
    **{
        f"{side}.{part}": axes
        for side in ("keys", "values")
        for part, axes in (("mix", "l k r"), ("rows", "l r g f"))
    },
    "bias": "l k g",
    "context_length": "",
}

Sigma = Mapping[str, Any]
"""``keys`` and ``values``: each ``mix`` ``[L, K, R]`` and ``rows`` ``[L, R, G, F]``; ``bias`` and
``context_length`` as in ``key_value``."""


def initial(start: Start) -> Sigma:
    """σ nearest to the keys and values that the start gives, in each layer.

    Raises:
      UserError: with the rank asked for it would be no smaller than these.
    """
    sigma = key_value.initial(start)
    _, K, G, F = sigma["keys"].shape
    if start.rank is not None:
        check_rank(start.rank, K, G * F)
    rank = start.rank or max(1, K * G * F // (2 * (K + G * F)))
    return {**sigma, **{name: _factors(sigma[name], rank) for name in ("keys", "values")}}


def check_rank(rank: int, prompt_length: int, entries: int) -> None:
    """Raises ``UserError`` if a rank makes so many slots, each of so many entries in a layer, no smaller."""
    both = prompt_length + entries
    if rank * both >= prompt_length * entries:
        most = (prompt_length * entries - 1) // both
        advice = f"take at most {most}" if most else "take --kind key_value"
        raise UserError(
            f"--rank {rank} makes {prompt_length} slots of {entries} entries no smaller; {advice}."
        )


def _factors(slots_LKGF: Float[Array, "l k g f"], rank: int) -> dict[str, Array]:
    """Factors of equal size whose product is nearest."""
    L, K, G, F = slots_LKGF.shape
    u, s, v = jnp.linalg.svd(slots_LKGF.reshape(L, K, G * F), full_matrices=False)
    size_LR = jnp.sqrt(s[:, :rank])  # both sides get an equal part of a singular value
    mix, rows = u[:, :, :rank] * size_LR[:, None], size_LR[..., None] * v[:, :rank]
    return {"mix": mix, "rows": rows.reshape(L, -1, G, F)}


def prefix(sigma: Sigma, preamble: KeyValues, prefill: Any) -> KeyValues:
    """``preamble`` followed by σ; differentiable in σ."""
    return key_value.prefix(_whole(sigma), preamble, prefill)


def _whole(sigma: Sigma) -> key_value.Sigma:
    keys, values = (
        jnp.einsum("lkr,lrgf->lkgf", sigma[name]["mix"], sigma[name]["rows"], precision="highest")
        for name in ("keys", "values")
    )
    return {**sigma, "keys": keys, "values": values}


def prompt_length(sigma: Sigma) -> int:
    """K, in slots."""
    return sigma["bias"].shape[1]


def rates(sigma: Sigma, factors: Mapping[str, float]) -> PyTree:
    """Sizes of a step of each entry at a learning rate of 1.

    Raises:
      UserError: the first slot is to have a rate of its own.
    """
    if "first" in factors:
        raise UserError("--rates: the slots of a prompt of kind low_rank share their rows; leave out first.")

    def of(name: str) -> dict[str, Array]:
        factor, (mix, rows) = factors.get(name, 1.0), (sigma[name][part] for part in ("mix", "rows"))
        return {
            "mix": factor * root_mean_square(mix, axis=(1, 2)),
            "rows": factor * root_mean_square(rows, axis=(1, 2, 3)),
        }

    bias = jnp.full((1, 1, 1), factors.get("bias", 1.0))
    return {"keys": of("keys"), "values": of("values"), "bias": bias, "context_length": jnp.float32(0)}
