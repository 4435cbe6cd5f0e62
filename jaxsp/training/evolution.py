"""Evolution strategies: where to move σ, by the losses of prompts around it. No gradient is needed.

So an objective that is piecewise constant can be trained on, such as ``zero_one``. The prompts tried stand in
pairs on either side of σ, and count by their rank: by how much one is better says nothing. Directions of
matrices are of low rank.

References: Salimans et al. 2017, Evolution Strategies (arXiv:1703.03864), for pairs and ranks; Sarkar et al.
2025, Evolution Strategies at the Hyperscale (arXiv:2511.16652), for directions of low rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsp.typing import Array, Float, PyTree


@dataclasses.dataclass(frozen=True)
class Evolution:
    """An optimizer that is told losses in place of a gradient; else it is one of optax.

    Attributes:
      descent: takes the estimate in place of a gradient.
      pairs: P; a step reads its batch with 2·P prompts.
      scale: standard deviation of the prompts' entries around σ's, in sizes of a step at a learning rate of 1
        (``TrainState.rates``).
      rank: of the directions of each matrix; ``None``: any.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> evolution = Evolution(optax.sgd(1.0), pairs=64)
      >>> sigma, rates = {"x": jnp.array([3.0, 0.0])}, {"x": jnp.float32(1)}
      >>> directions = evolution.directions(sigma, jax.random.key(0))
      >>> losses = jnp.sum(evolution.around(sigma, rates, directions)["x"] ** 2, axis=-1)
      >>> found = evolution.estimate(directions, losses)["x"]
      >>> bool(found[0] > 3 * abs(found[1]))
      True
    """

    descent: optax.GradientTransformation
    pairs: int = 16
    scale: float = 0.1
    rank: int | None = 1

    @property
    def init(self) -> Any:
        """As of ``descent``."""
        return self.descent.init

    @property
    def update(self) -> Any:
        """As of ``descent``."""
        return self.descent.update

    def directions(self, sigma: PyTree, key: Array) -> PyTree:
        """P directions from σ, of entries of mean square 1: arrays ``[P, ...]``."""
        leaves, form = jax.tree.flatten(sigma)
        keys = jax.random.split(key, len(leaves))
        return form.unflatten([self._drawn(leaf, own) for leaf, own in zip(leaves, keys, strict=True)])

    def _drawn(self, leaf: Array, key: Array) -> Array:
        shape = (self.pairs, *leaf.shape)
        if self.rank is None or leaf.ndim < 2 or min(leaf.shape[-2:]) <= self.rank:
            return jax.random.normal(key, shape)
        *outer, rows, columns = shape
        left, right = (
            jax.random.normal(own, (*outer, size, self.rank))
            for own, size in zip(jax.random.split(key), (rows, columns), strict=True)
        )
        return left @ jnp.swapaxes(right, -1, -2) / self.rank**0.5

    def around(self, sigma: PyTree, rates: PyTree, directions: PyTree) -> PyTree:
        """The prompts to try, ``[2·P, ...]``: all on one side of σ, then all on the other."""

        def both(leaf: Array, rate: Array, some: Array) -> Array:
            away = self.scale * rate * some
            return jnp.concatenate([leaf + away, leaf - away])

        return jax.tree.map(both, sigma, rates, directions)

    def estimate(self, directions: PyTree, losses: Float[Array, " n"]) -> PyTree:
        """The direction in which the ranks of the losses of ``around`` grow.

        Prompts that are equally good have the same rank: if all are, the estimate is 0.
        """
        ranks = jnp.mean(jnp.sign(losses[:, None] - losses), axis=1) / 2
        shares = (ranks[: self.pairs] - ranks[self.pairs :]) / (2 * self.pairs * self.scale)
        return jax.tree.map(lambda some: jnp.tensordot(shares, some, axes=1), directions)
