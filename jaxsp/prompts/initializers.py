"""Where σ starts: K input vectors from the context, the vocabulary, or noise."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.typing import Array, Float, Int

Embed = Callable[[Int[Array, " n"]], Float[Array, "n d"]]


def from_first(
    key: Array, context: np.ndarray, length: int, embed: Embed, vocab_size: int
) -> Array:
    """The embeddings of the context's first K tokens."""
    return embed(jnp.asarray(context[:length]))


def from_spread(
    key: Array, context: np.ndarray, length: int, embed: Embed, vocab_size: int
) -> Array:
    """The embeddings of K tokens spread evenly over the context."""
    return embed(jnp.asarray(context[np.linspace(0, len(context) - 1, length).round().astype(int)]))


def from_vocabulary(
    key: Array, context: np.ndarray, length: int, embed: Embed, vocab_size: int
) -> Array:
    """The embeddings of K random tokens of the vocabulary."""
    return embed(jax.random.randint(key, (length,), 0, vocab_size))


def from_noise(
    key: Array, context: np.ndarray, length: int, embed: Embed, vocab_size: int
) -> Array:
    """Gaussian vectors with the mean and the deviation, per coordinate, of the context's embeddings."""
    vectors = embed(jnp.asarray(context)).astype(jnp.float32)
    noise = jax.random.normal(key, (length, vectors.shape[-1]))
    return vectors.mean(axis=0) + vectors.std(axis=0) * noise


INITIALIZERS: dict[str, Callable[[Array, np.ndarray, int, Embed, int], Array]] = {
    "first": from_first,
    "spread": from_spread,
    "vocabulary": from_vocabulary,
    "noise": from_noise,
}
"""Each takes (key, context ids, K, embed, vocabulary size) and returns ``[K, D]``."""
