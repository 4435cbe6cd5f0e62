"""Random vectors as large as the context's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsp.prompts.initializers.source import Source
from jaxsp.typing import Array, Float


def vectors(source: Source) -> Float[Array, "k d"]:
    """Gaussian vectors with the mean and the deviation, per coordinate, of the context's embeddings."""
    of_context = source.embed(source.context_ids).astype(jnp.float32)
    noise = jax.random.normal(source.key, (source.prompt_length, of_context.shape[-1]))
    return of_context.mean(axis=0) + of_context.std(axis=0) * noise
