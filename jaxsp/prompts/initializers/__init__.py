"""Where σ starts: one file an initializer, one line each in ``INITIALIZERS``.

An initializer is a function ``start(source) -> vectors [K, D]``; the prompt kind makes σ of them.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxsp.prompts.initializers import first, noise, spread, vocabulary
from jaxsp.prompts.initializers.source import Source
from jaxsp.typing import Array, Float

INITIALIZERS: dict[str, Callable[[Source], Float[Array, "k d"]]] = {
    "first": first.start,
    "spread": spread.start,
    "vocabulary": vocabulary.start,
    "noise": noise.start,
}
