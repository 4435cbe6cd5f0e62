"""Where σ starts: one file an initializer, one line each in ``INITIALIZERS``.

An initializer is a function ``start(source) -> vectors [K, D]``; the prompt kind makes σ of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxsp.prompts.initializers import first, noise, spread, vocabulary
from jaxsp.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Source:
    """Things that a prompt may start from.

    Attributes:
      key: random key of this prompt.
      context_ids: ``[C]`` token ids of the context.
      length: K.
      embed: input vectors ``[n, D]`` of token ids ``[n]``.
      vocab_size: V.
    """

    key: Array
    context_ids: Int[np.ndarray, " c"]
    length: int
    embed: Callable[[Array | np.ndarray], Float[Array, "n d"]]
    vocab_size: int


INITIALIZERS: dict[str, Callable[[Source], Float[Array, "k d"]]] = {
    "first": first.start,
    "spread": spread.start,
    "vocabulary": vocabulary.start,
    "noise": noise.start,
}
