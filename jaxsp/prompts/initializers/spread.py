"""Tokens spread over the context."""

from __future__ import annotations

import numpy as np

from jaxsp.prompts.initializers.source import Source
from jaxsp.typing import Array, Float, Int, KeyValues


def vectors(source: Source) -> Float[Array, "k d"]:
    """The embeddings of K tokens spread evenly over the context."""
    return source.embed(source.context_ids[_places(source)])


def key_values(source: Source) -> KeyValues:
    """Their keys and values where they stand in the context, which has read all before them in its part."""
    return source.context(_places(source))


def _places(source: Source) -> Int[np.ndarray, " k"]:
    return np.linspace(0, len(source.context_ids) - 1, source.prompt_length).round().astype(int)
