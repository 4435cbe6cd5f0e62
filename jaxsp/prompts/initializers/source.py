"""The things that an initializer is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxsp.typing import AnyArray, Array, Bool, Float, Int, KeyValues

ABSENT = -1e9
"""Bias of a slot that a head does not have: no query gives it any weight. Finite, so that gradients are."""

Own = Bool[Array, "n s"] | None
"""The slots of each query's own part of the context, which K slots are to replace for it; ``None``: all."""

Fit = Callable[
    [Float[Array, "n s"], Float[Array, " n"], Float[Array, "s f"], Int[Array, ""], Own],
    tuple[Int[Array, " k"], Float[Array, " k"], Float[Array, "k f"]],
]
"""Replaces a head's S slots by K. From the scores of N queries, their weights, the slots' values, how many of
the K the head has, and which slots are a query's own: the slots whose keys stay, their biases (``ABSENT`` for
the first ones, where it has fewer), and their new values."""

Probe = Callable[[Float[Array, "n s"], Float[Array, " n"], Float[Array, "s f"], Own], Float[Array, "..."]]
"""Finds something out about a head, from the same."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Things that a prompt may start from.

    Attributes:
      key: random key of this prompt.
      context_ids: ``[C]`` token ids of the context; of one in parts, theirs one after the other.
      prompt_length: K.
      heads: the model's layers and the key/value heads of each.
      embed: input vectors ``[n, D]`` of token ids ``[n]``.
      vocab_size: V.
      read: gives the keys and values of input vectors ``[K, D]``, read after the preamble.
      context: gives those of some tokens of the context, by their places in it in ascending order; it is
        read after the preamble, each of its parts by itself.
      written: gives K tokens that the model writes after some others, drawn with ``key``.
      probed: reads the training rows after the context and gives what ``Probe`` finds in every head,
        ``[L, G, ...]``; ``None`` if there are no rows.
      compacted: reads them layer by layer, each with what ``Fit`` makes of the context's slots there, and
        gives these; its second argument has the slots of each head ``[L, G]``. ``None`` as before.
      longest_part: tokens of the longest part of a context in parts.
    """

    key: Array
    context_ids: Int[np.ndarray, " c"]
    prompt_length: int
    heads: tuple[int, int]
    embed: Callable[[AnyArray], Float[Array, "n d"]]
    vocab_size: int
    read: Callable[[Float[Array, "k d"]], KeyValues]
    context: Callable[[Int[np.ndarray, " n"]], KeyValues]
    written: Callable[[Int[Array, " n"]], Int[np.ndarray, " k"]]
    probed: Callable[[Probe], Array] | None = None
    compacted: Callable[[Fit, Int[AnyArray, "l g"]], KeyValues] | None = None
    longest_part: int | None = None

    @property
    def context_length(self) -> int:
        """Tokens that z stands behind: those of the context, or of its longest part."""
        return len(self.context_ids) if self.longest_part is None else self.longest_part
