"""The things that an initializer is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxsp.typing import AnyArray, Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Source:
    """Things that a prompt may start from.

    Attributes:
      key: random key of this prompt.
      context_ids: ``[C]`` token ids of the context.
      prompt_length: K.
      embed: input vectors ``[n, D]`` of token ids ``[n]``.
      vocab_size: V.
    """

    key: Array
    context_ids: Int[np.ndarray, " c"]
    prompt_length: int
    embed: Callable[[AnyArray], Float[Array, "n d"]]
    vocab_size: int
