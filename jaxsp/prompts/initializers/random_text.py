"""A text that has nothing to do with the context: the model's own, sampled at a temperature of 1.

Reference: Eyuboglu et al. 2025, Cartridges (arXiv:2506.06266), which compares with the start from some text.
"""

from __future__ import annotations

import jax

from jaxsp.prompts.initializers.source import Source
from jaxsp.typing import Array, Float


def vectors(source: Source) -> Float[Array, "k d"]:
    """The embeddings of K tokens that the model writes after a random one."""
    first = jax.random.randint(source.key, (1,), 0, source.vocab_size)
    return source.embed(source.written(first))
