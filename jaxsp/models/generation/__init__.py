"""Answers from the frozen model: many at once (``generate``), or one token by token (``stream``)."""

from jaxsp.models.generation.engine import generate, stream
from jaxsp.models.generation.sampling import Sampling

__all__ = ["Sampling", "generate", "stream"]
