"""K free input vectors, read by the model like the embeddings of K tokens.

Reference: Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning
(arXiv:2104.08691).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp

from jaxsp.typing import AnyArray, Array, Float, KeyValues

Sigma = Mapping[str, Float[AnyArray, "k d"]]


def initial(vectors: Float[Array, "k d"], key_values: Callable[[], KeyValues]) -> Sigma:
    """σ that starts as these input vectors, float32."""
    del key_values
    return {"embeddings": jnp.asarray(vectors, jnp.float32)}


def prefix(sigma: Sigma, preamble: KeyValues, prefill: Callable[..., KeyValues]) -> KeyValues:
    """``preamble`` followed by σ, read by the model; differentiable in σ."""
    return prefill(sigma["embeddings"][None], preamble)


def prompt_length(sigma: Sigma) -> int:
    """K, in slots."""
    return sigma["embeddings"].shape[0]
