"""The context's first tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxsp.typing import Array, Float

if TYPE_CHECKING:
    from jaxsp.prompts.initializers import Source


def start(source: Source) -> Float[Array, "k d"]:
    """The embeddings of the context's first K tokens."""
    return source.embed(source.context_ids[: source.length])
