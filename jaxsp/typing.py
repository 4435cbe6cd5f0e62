"""The shapes of the project: the glossary, array aliases, and the one structure everybody shares.

Symbols (in signatures as jaxtyping axes, inside model code as upper-case suffixes)::

    B batch · C context length · Z query length · T tokens of a row · A answer length · K prompt length
    V vocabulary · D width · L layers · H query heads · G key/value heads · F head width · S cached slots

Positions are absolute token positions in the sequence the model sees; ``EMPTY`` marks padding, which
nothing attends to.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array as Array

from jaxsp.errors import Interrupted as Interrupted, NonFiniteLoss as NonFiniteLoss, UserError as UserError

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool as Bool, Float as Float, Int as Int
else:
    # Annotations alone are no reason to load jaxtyping. Where it is loaded, as by the tests, which check
    # shapes at run time, its types are used.
    class Float:
        """A floating-point array of named axes; read, not checked."""

        def __class_getitem__(cls, array_and_axes: tuple[Any, str]) -> Any:
            array, axes = array_and_axes
            return Annotated[array, f"{cls.__name__}, {axes!r}"]

    class Int(Float):
        """An integer array of named axes; read, not checked."""

    class Bool(Float):
        """A boolean array of named axes; read, not checked."""


AnyArray = jax.Array | np.ndarray
"""JAX's or NumPy's array: what functions that are called from outside take."""

EMPTY = -1

Params = Any  # a Flax parameter tree
PyTree = Any


def ceil_div(a: int, b: int) -> int:
    """The quotient rounded up, as numbers of batches and chunks are.

    Example:
      >>> ceil_div(7, 2), ceil_div(6, 2)
      (4, 3)
    """
    return -(-a // b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys and values of already-read tokens, in every layer: a prefix, or a decoding cache.

    A context and a soft prompt are the same thing to the model: a ``KeyValues`` with batch size 1,
    attended to by every row of a batch without being copied per row.

    Attributes:
      keys: ``[L, B, S, G, F]``, rotated to their positions; ``B`` is 1 when the rows share it.
      values: ``[L, B, S, G, F]``.
      positions: ``[B, S]`` int32; ``EMPTY`` where a slot holds nothing.
      bias: ``[L, B, S, G]`` float32, added to the scores of a slot: the logarithm of the mass that it stands
        for; ``None``: 0.
    """

    keys: Float[Array, "l b s g f"]
    values: Float[Array, "l b s g f"]
    positions: Int[Array, "b s"]
    bias: Float[Array, "l b s g"] | None = None

    @property
    def next_position(self) -> Int[Array, " b"]:
        """The position of the token that comes next, ``[B]``."""
        return jnp.max(self.positions, axis=-1, initial=EMPTY) + 1

    @property
    def end(self) -> int:
        """The position of the token that comes next, of the first row, as a number."""
        return int(np.max(np.asarray(self.positions)[0], initial=EMPTY)) + 1

    def append(self, other: KeyValues) -> KeyValues:
        """This followed by ``other``, along the slots."""
        return _joined([self, other], slots=True)

    @staticmethod
    def joined(several: Sequence[KeyValues]) -> KeyValues:
        """Prefixes one after the other, along the slots."""
        return _joined(list(several), slots=True)

    @staticmethod
    def side_by_side(several: Sequence[KeyValues]) -> KeyValues:
        """Prefixes of one size as the rows of one."""
        return _joined(list(several), slots=False)

    @staticmethod
    def alike(several: Sequence[KeyValues]) -> list[KeyValues]:
        """The same prefixes of one size and with a bias if any has one, so that one program reads them.

        Shorter ones get slots that hold nothing at their end.
        """
        most = max(kv.positions.shape[1] for kv in several)
        biased = any(kv.bias is not None for kv in several)
        return [_grown(kv, most, biased) for kv in several]

    def rows(self, index: Int[Array, " n"]) -> KeyValues:
        """Those rows of it."""
        bias = None if self.bias is None else self.bias[:, index]
        return KeyValues(self.keys[:, index], self.values[:, index], self.positions[index], bias)


# Compiled as one, each: outside of a program every operation would be one of its own.


@functools.partial(jax.jit, static_argnames="slots", inline=True)
def _joined(pieces: Sequence[KeyValues], slots: bool) -> KeyValues:
    axis = 2 if slots else 1  # of keys, values and bias; positions have no layers
    bias = None
    if any(piece.bias is not None for piece in pieces):
        each = [jnp.zeros(p.keys.shape[:4]) if p.bias is None else p.bias for p in pieces]
        bias = jnp.concatenate(each, axis=axis)
    return KeyValues(
        jnp.concatenate([piece.keys for piece in pieces], axis=axis),
        jnp.concatenate([piece.values for piece in pieces], axis=axis),
        jnp.concatenate([piece.positions for piece in pieces], axis=axis - 1),
        bias,
    )


@functools.partial(jax.jit, static_argnames=("most", "biased"), inline=True)
def _grown(kv: KeyValues, most: int, biased: bool) -> KeyValues:
    more = most - kv.positions.shape[1]
    bias = jnp.zeros(kv.keys.shape[:4]) if biased and kv.bias is None else kv.bias

    def pad(x: Array, axis: int = 2, fill: int = 0) -> Array:
        widths = [(0, more if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, widths, constant_values=fill)

    own = None if bias is None else pad(bias)
    return KeyValues(pad(kv.keys), pad(kv.values), pad(kv.positions, 1, EMPTY), own)
