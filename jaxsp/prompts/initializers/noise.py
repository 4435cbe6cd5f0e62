"""Random vectors as large as the context's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsp.prompts.initializers.source import Source
from jaxsp.typing import Array, Float


def start(source: Source) -> Float[Array, "k d"]:
    """Gaussian vectors with the mean and the deviation, per coordinate, of the context's embeddings."""
    vectors = source.embed(source.context_ids).astype(jnp.float32)
    noise = jax.random.normal(source.key, (source.prompt_length, vectors.shape[-1]))
    return vectors.mean(axis=0) + vectors.std(axis=0) * noise
