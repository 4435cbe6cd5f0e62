"""The things that an initializer is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxsp.models.attention import AttentionInputs, Slots
from jaxsp.typing import AnyArray, Array, Float, Int, KeyValues

Compact = Callable[[AttentionInputs], Slots]
"""Gives the slots that replace the context's in one layer; ``inputs.slots`` are preamble, context, row."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Things that a prompt may start from.

    Attributes:
      key: random key of this prompt.
      context_ids: ``[C]`` token ids of the context.
      prompt_length: K.
      embed: input vectors ``[n, D]`` of token ids ``[n]``.
      vocab_size: V.
      read: gives the keys and values of input vectors ``[K, D]``, read after the preamble.
      context: gives those of the context, read after the preamble.
      compacted: reads the training rows after the context, layer by layer, each with what ``Compact`` makes
        of the context's slots there, and gives these; ``None`` if there are no rows.
    """

    key: Array
    context_ids: Int[np.ndarray, " c"]
    prompt_length: int
    embed: Callable[[AnyArray], Float[Array, "n d"]]
    vocab_size: int
    read: Callable[[Float[Array, "k d"]], KeyValues]
    context: Callable[[], KeyValues]
    compacted: Callable[[Compact], KeyValues] | None = None
