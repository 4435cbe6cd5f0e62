"""The things that an initializer is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxsp.typing import AnyArray, Array, Float, Int, KeyValues

Fit = Callable[
    [Float[Array, "n s"], Float[Array, " n"], Float[Array, "s f"]],
    tuple[Int[Array, " k"], Float[Array, " k"], Float[Array, "k f"]],
]
"""Replaces a head's S slots by K. From the scores of N queries, their weights and the slots' values: the
slots whose keys stay, their biases, and their new values."""


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
      written: gives K tokens that the model writes after some others, drawn with ``key``.
      compacted: reads the training rows after the context, layer by layer, each with what ``Fit`` makes of
        the context's slots there, and gives these; ``None`` if there are no rows.
    """

    key: Array
    context_ids: Int[np.ndarray, " c"]
    prompt_length: int
    embed: Callable[[AnyArray], Float[Array, "n d"]]
    vocab_size: int
    read: Callable[[Float[Array, "k d"]], KeyValues]
    context: Callable[[], KeyValues]
    written: Callable[[Int[Array, " n"]], Int[np.ndarray, " k"]]
    compacted: Callable[[Fit], KeyValues] | None = None
