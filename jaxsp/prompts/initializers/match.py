"""Attention matching: in closed form, the K slots of each head that serve the training rows like the context.

Each layer's slots are found with the queries that come from the layers below, whose context is already
replaced (on-policy).

Reference: Zweiger et al. 2026, Fast KV Compaction via Attention Matching.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from jaxsp.prompts.initializers.source import Fit, Source
from jaxsp.typing import Array, Float, Int, KeyValues, UserError

MASS = math.exp(-3), math.exp(3)
"""Bounds of the mass that a slot stands for, in that of its own token; its bias is the logarithm."""

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths tried of the pull of values towards those of the slots chosen, relative to the mean of the
diagonal; queries left out decide."""

HELD_OUT = 4  # every so many-th query decides

CANDIDATES = 256
"""Slots that are chosen from at least: those with the most mass."""


def key_values(source: Source) -> KeyValues:
    """Keys, values and biases fitted to the queries of the training rows.

    Raises:
      UserError: there are no rows.
    """
    if source.compacted is None:
        raise UserError("--initial match needs training queries; choose another start.")
    return source.compacted(_fit_to(source.prompt_length))


@functools.cache
def _fit_to(count: int) -> Fit:
    """One object for one K: what is compiled with it is compiled once."""
    return functools.partial(fit, count=count)


def fit(
    scores_NS: Float[Array, "n s"],
    weight_N: Float[Array, " n"],
    values_SF: Float[Array, "s f"],
    *,
    count: int,
) -> tuple[Int[Array, " k"], Float[Array, " k"], Float[Array, "k f"]]:
    """K slots in place of the S of one head.

    Args:
      scores_NS: scores of N queries before the softmax.
      weight_N: how much of a query's attention goes to these slots: what an error there costs.
      values_SF: values of the slots.
      count: K.

    Returns:
      The slots chosen, their biases, and their new values.
    """
    part_NS = jax.nn.softmax(scores_NS, axis=-1)  # of the mass of all slots
    chosen_K, mass_K = choose(part_NS * weight_N[:, None], weight_N, count)
    bias_K = jnp.log(mass_K)
    own_NK = jax.nn.softmax(scores_NS[:, chosen_K] + bias_K, axis=-1)
    return chosen_K, bias_K, _values(own_NK, part_NS @ values_SF, weight_N, values_SF[chosen_K])


def choose(
    parts_NS: Float[Array, "n s"], target_N: Float[Array, " n"], count: int
) -> tuple[Int[Array, " k"], Float[Array, " k"]]:
    """Orthogonal matching pursuit: columns, one after the other, whose weighted sum is the target.

    Args:
      parts_NS: a column a slot.
      target_N: the sum of all columns.
      count: K.

    Returns:
      The columns' indices in the order chosen, and their weights.
    """
    norms_S = jnp.sqrt(jnp.sum(parts_NS**2, axis=0))
    norms_C, candidates_C = jax.lax.top_k(norms_S, min(len(norms_S), max(CANDIDATES, 4 * count)))
    parts_NC = parts_NS[:, candidates_C]
    gram_CC, right_C = parts_NC.T @ parts_NC, target_N @ parts_NC

    def step(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        chosen_K, mass_K = carry
        gain_C = (right_C - gram_CC[:, chosen_K] @ mass_K) / jnp.maximum(norms_C, 1e-12)
        taken_K = jnp.where(jnp.arange(count) < k, chosen_K, len(gain_C))
        best = jnp.argmax(gain_C.at[taken_K].set(-jnp.inf, mode="drop"))
        chosen_K = chosen_K.at[k].set(best)
        return chosen_K, weights(chosen_K, jnp.arange(count) <= k, 10)

    def weights(chosen_K: Array, there_K: Array, steps: int) -> Array:
        return _weights(gram_CC[chosen_K][:, chosen_K], right_C[chosen_K], there_K, steps)

    chosen_K = jax.lax.fori_loop(0, count, step, (jnp.zeros(count, jnp.int32), jnp.zeros(count)))[0]
    return candidates_C[chosen_K], weights(chosen_K, jnp.ones(count, bool), 400)


def _weights(gram_KK: Array, right_K: Array, there_K: Array, steps: int) -> Array:
    """Weights within the bounds ``MASS``, the least squares' among those that are there.

    The unbounded solution cut to the bounds, then accelerated projected gradient.
    """
    ridge = 1e-6 * jnp.trace(gram_KK) / len(gram_KK) + 1e-20
    gram_KK = jnp.where(there_K & there_K[:, None], gram_KK, 0)
    full_KK = gram_KK + jnp.diag(jnp.where(there_K, ridge, 1.0))
    start_K = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(full_KK), right_K * there_K)
    start_K = jnp.clip(start_K, *MASS) * there_K
    largest = jnp.maximum(jnp.max(jnp.sum(jnp.abs(gram_KK), axis=0)), 1e-20)

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x_K, y_K = carry
        new_K = jnp.clip(y_K - (gram_KK @ y_K - right_K) / largest, *MASS) * there_K
        return new_K, new_K + (i / (i + 3.0)) * (new_K - x_K)

    return jax.lax.fori_loop(0, steps, step, (start_K, start_K))[0]


def _values(own_NK: Array, target_NF: Array, weight_N: Array, near_KF: Array) -> Array:
    """Values near ``near_KF`` by which the slots' attention gives the target: ridge regression."""
    held_out_N = jnp.arange(len(weight_N)) % HELD_OUT == 0
    left_NF = target_NF - own_NK @ near_KF

    def solve(weight_N: Array, ridge: Array) -> Array:
        weighted_NK = own_NK * (weight_N**2)[:, None]
        gram_KK = weighted_NK.T @ own_NK
        size = jnp.trace(gram_KK) / len(gram_KK) + 1e-20
        full_KK = gram_KK + ridge * size * jnp.eye(len(gram_KK))
        return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(full_KK), weighted_NK.T @ left_NF)

    def error(ridge: Array) -> Array:
        off_NF = left_NF - own_NK @ solve(weight_N * ~held_out_N, ridge)
        return jnp.sum(((weight_N * held_out_N)[:, None] * off_NF) ** 2)

    ridges = jnp.array(RIDGES)
    best = ridges[jnp.argmin(jax.lax.map(error, ridges))]
    return near_KF + solve(weight_N, best)
