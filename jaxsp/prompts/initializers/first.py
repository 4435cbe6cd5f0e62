"""The context's first tokens."""

from __future__ import annotations

from jaxsp.prompts.initializers.source import Source
from jaxsp.typing import Array, Float


def vectors(source: Source) -> Float[Array, "k d"]:
    """The embeddings of the context's first K tokens."""
    return source.embed(source.context_ids[: source.prompt_length])
