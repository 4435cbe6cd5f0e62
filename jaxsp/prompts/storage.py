"""A prompt's arrays as they are stored: their names, their dtypes, and what rounding makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.typing import AnyArray, PyTree

DTYPES = ("float32", "bfloat16", "int8")

NARROW = 8
"""Arrays whose last axis is shorter are not stored as int8: their scales would take as much."""


def pack(sigma: PyTree, dtype: str) -> PyTree:
    """The arrays as they are stored: in int8 each row has a scale, its largest entry over 127.

    Single numbers stay float32: they are no parameters. Biases are few, and may hold one that is far from all
    others: they are not stored as int8.

    Args:
      sigma: float32 arrays, in nested dicts.
      dtype: one of ``DTYPES``.
    """

    def one(path: tuple[Any, ...], leaf: AnyArray) -> Any:
        array = np.asarray(leaf, np.float32)
        if dtype == "float32" or not array.ndim:
            return array
        if dtype == "bfloat16" or array.shape[-1] < NARROW or path[-1].key == "bias":
            return array.astype(jnp.bfloat16)
        scale = np.maximum(np.abs(array).max(axis=-1, keepdims=True) / 127, np.finfo(np.float32).tiny)
        return {"int8": np.rint(array / scale).astype(np.int8), "scale": scale}

    return jax.tree_util.tree_map_with_path(one, sigma)


def unpack(stored: PyTree) -> PyTree:
    """σ, float32, of what ``pack`` gave.

    Example:
      >>> unpack(pack({"keys": np.linspace(-127, 127, 8)}, "int8"))["keys"][:3].tolist()
      [-127.0, -91.0, -54.0]
    """
    if isinstance(stored, Mapping):
        if stored.keys() == {"int8", "scale"}:
            return stored["int8"].astype(np.float32) * stored["scale"]
        return {name: unpack(part) for name, part in stored.items()}
    return np.asarray(stored, np.float32)


def size(stored: PyTree) -> int:
    """Bytes of what ``pack`` gave."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(stored))


def rounded(sigma: PyTree, dtype: str) -> PyTree:
    """σ as it is read back after being saved in ``dtype``."""
    return unpack(pack(sigma, dtype))


def named_arrays(tree: PyTree) -> dict[str, np.ndarray]:
    """The arrays of a tree by their paths, in its order, as safetensors keeps them."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def nested(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The nested dicts that ``named_arrays`` was given."""
    sigma: dict[str, Any] = {}
    for path, array in arrays.items():
        *folders, name = path.split("/")
        node = sigma
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = array
    return sigma
