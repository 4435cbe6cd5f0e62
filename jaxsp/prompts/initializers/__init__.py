"""Where σ starts: one file an initializer, one line each in ``INITIALIZERS``.

An initializer is a module with ``vectors(source) -> [K, D]`` (input vectors), ``key_values(source)`` (K slots
of every layer), or both. Where it has no ``key_values``, they are those of its vectors. It may have
``uneven(source, most)``, slots that the heads share unevenly.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType

import jax.numpy as jnp

from jaxsp.prompts.initializers import first, match, noise, random_text, spread, vocabulary
from jaxsp.prompts.initializers.source import ABSENT as ABSENT, Source as Source
from jaxsp.typing import EMPTY, AnyArray, Array, Float, KeyValues, UserError

INITIALIZERS: dict[str, ModuleType] = {
    "first": first,
    "spread": spread,
    "match": match,
    "random_text": random_text,
    "vocabulary": vocabulary,
    "noise": noise,
}


def check_vectors(name: str) -> None:
    """Raises ``UserError`` if an initializer gives keys and values alone, and no input vectors."""
    if not hasattr(INITIALIZERS[name], "vectors"):
        able = ", ".join(name for name, module in INITIALIZERS.items() if hasattr(module, "vectors"))
        raise UserError(
            f"--initial {name} starts prompts of keys and values (--kind key_value), not input vectors;"
            f" choose one of {able}."
        )


@dataclasses.dataclass(frozen=True)
class Start:
    """One initializer and what it starts from; a prompt kind takes what it can use.

    ``rank`` is for kinds that have one; ``None``: they choose.

    Raises:
      UserError: there is no such initializer.
    """

    name: str
    source: Source
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.name not in INITIALIZERS:
            raise UserError(f"Unknown initializer {self.name!r}; choose one of {', '.join(INITIALIZERS)}.")

    def vectors(self) -> Float[Array, "k d"]:
        """K input vectors.

        Raises:
          UserError: the initializer gives keys and values alone.
        """
        check_vectors(self.name)
        return INITIALIZERS[self.name].vectors(self.source)

    def key_values(self) -> KeyValues:
        """K slots of every layer, batch size 1."""
        initializer = INITIALIZERS[self.name]
        if hasattr(initializer, "key_values"):
            return initializer.key_values(self.source)
        return self.source.read(initializer.vectors(self.source))

    def uneven(self, most: int) -> KeyValues:
        """K slots a head on average, batch size 1: ``most`` of every head, the first ones ``ABSENT``."""
        initializer = INITIALIZERS[self.name]
        if hasattr(initializer, "uneven"):
            return initializer.uneven(self.source, most)
        found = self.key_values()
        more = most - found.positions.shape[1]
        bias = jnp.zeros(found.keys.shape[:4]) if found.bias is None else found.bias

        def padded(x: AnyArray, fill: float = 0) -> Array:
            return jnp.pad(x, [(0, 0), (0, 0), (more, 0), *[(0, 0)] * (x.ndim - 3)], constant_values=fill)

        positions = jnp.pad(found.positions, [(0, 0), (more, 0)], constant_values=EMPTY)
        return KeyValues(padded(found.keys), padded(found.values), positions, padded(bias, ABSENT))
