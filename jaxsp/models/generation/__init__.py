"""Answers from the frozen model: many at once (``generate``), one token by token (``stream``), or those of
requests that come and go (``Live``)."""

from jaxsp.models.generation.answering import generate, generate_with_log_probs, stream
from jaxsp.models.generation.live import Live
from jaxsp.models.generation.sampling import Sampling

__all__ = ["Live", "Sampling", "generate", "generate_with_log_probs", "stream"]
