"""The kinds of soft prompt: one file each, one line each in ``PROMPT_KINDS``.

A kind is a module with:

* ``initial(embeddings_KD) -> σ``: the parameters (float32) that start as these input vectors;
* ``prefix(sigma, before, prefill) -> KeyValues``: what the model attends to, built after ``before`` by
  ``prefill(inputs_1KD, before)``;
* ``length(sigma) -> K``.

Kinds read dimensions, never weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from jaxsp.prompts import embedding
from jaxsp.typing import Array, KeyValues, PyTree

Prefill = Callable[[Array, KeyValues], KeyValues]


class PromptKind(Protocol):
    """What a module in this folder provides."""

    def initial(self, embeddings: Array) -> PyTree: ...

    def prefix(self, sigma: PyTree, before: KeyValues, prefill: Prefill) -> KeyValues: ...

    def length(self, sigma: PyTree) -> int: ...


PROMPT_KINDS: dict[str, PromptKind] = {
    "embedding": embedding,
}
