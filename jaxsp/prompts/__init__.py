"""The kinds of soft prompt: one file each, one line each in ``PROMPT_KINDS``.

A kind is a module with the three functions of ``PromptKind``. It reads dimensions, never weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from jaxsp.prompts import embedding
from jaxsp.typing import AnyArray, Array, Float, KeyValues, PyTree

Prefill = Callable[[Float[AnyArray, "1 k d"], KeyValues], KeyValues]


class PromptKind(Protocol):
    """Functions of a module in this folder. σ is a pytree of float32 arrays of any rank, in nested dicts."""

    def initial(self, vectors: Float[Array, "k d"], key_values: Callable[[], KeyValues]) -> PyTree:
        """σ that starts as these input vectors ``[K, D]``, or as their keys and values.

        ``key_values()`` reads the vectors after the preamble: K slots in every layer.
        """
        ...

    def prefix(self, sigma: PyTree, preamble: KeyValues, prefill: Prefill) -> KeyValues:
        """``preamble`` followed by σ's K slots; differentiable in σ.

        ``prefill(inputs [1, K, D], preamble)`` reads input vectors.
        """
        ...

    def prompt_length(self, sigma: PyTree) -> int:
        """K, in slots."""
        ...


PROMPT_KINDS: dict[str, PromptKind] = {"embedding": embedding}
