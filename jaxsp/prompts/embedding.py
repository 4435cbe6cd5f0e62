"""K free input vectors, read by the model like the embeddings of K tokens.

Reference: Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning
(arXiv:2104.08691).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp

from jaxsp.prompts.initializers import Start
from jaxsp.prompts.sizes import root_mean_square
from jaxsp.typing import AnyArray, Array, Float, KeyValues

Sigma = Mapping[str, Float[AnyArray, "k d"]]

DEFAULTS = {"initial": "first", "optimizer": "muon", "learning_rate": 0.5, "steps": 500, "keep": "best"}
IS_READ = True
FORM = {"embeddings": "k d"}


def initial(start: Start) -> Sigma:
    """σ that starts as these input vectors, float32."""
    return {"embeddings": jnp.asarray(start.vectors(), jnp.float32)}


def prefix(sigma: Sigma, preamble: KeyValues, prefill: Callable[..., KeyValues]) -> KeyValues:
    """``preamble`` followed by σ, read by the model; differentiable in σ."""
    return prefill(sigma["embeddings"][None], preamble)


def prompt_length(sigma: Sigma) -> int:
    """K, in slots."""
    return sigma["embeddings"].shape[0]


def rates(sigma: Sigma, factors: Mapping[str, float]) -> Mapping[str, Array]:
    """Sizes of a step of each entry at a learning rate of 1."""
    slot_K = jnp.ones(prompt_length(sigma)).at[0].set(factors.get("first", 1.0))
    return {"embeddings": root_mean_square(sigma["embeddings"]) * slot_K[:, None]}
