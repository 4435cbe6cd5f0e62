"""Tokens spread over the context."""

from __future__ import annotations

import numpy as np

from jaxsp.prompts.initializers.source import Source
from jaxsp.typing import Array, Float


def start(source: Source) -> Float[Array, "k d"]:
    """The embeddings of K tokens spread evenly over the context."""
    places = np.linspace(0, len(source.context_ids) - 1, source.prompt_length).round().astype(int)
    return source.embed(source.context_ids[places])
