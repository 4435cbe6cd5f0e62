"""Random tokens of the vocabulary.

Reference: Lester et al. 2021 (arXiv:2104.08691), section 3.2.
"""

from __future__ import annotations

import jax

from jaxsp.prompts.initializers.source import Source
from jaxsp.typing import Array, Float


def vectors(source: Source) -> Float[Array, "k d"]:
    """The embeddings of K random tokens of the vocabulary."""
    return source.embed(jax.random.randint(source.key, (source.prompt_length,), 0, source.vocab_size))
