"""Attention matching: in closed form, the K slots of each head that serve the training rows like the context.

Each layer's slots are found with the queries that come from the layers below, whose context is already
replaced (on-policy).

Reference: Zweiger et al. 2026, Fast KV Compaction via Attention Matching.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsp.models.attention import AttentionInputs, Slots
from jaxsp.models.attention.inputs import visible
from jaxsp.prompts.initializers.source import Source
from jaxsp.typing import Array, Float, Int, KeyValues, UserError

MASS = math.exp(-3), math.exp(3)
"""Bounds of the mass that a slot stands for, in that of its own token; its bias is the logarithm."""

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths tried of the pull of values towards those of the slots chosen, relative to the mean of the
diagonal; queries left out decide."""

HELD_OUT = 4  # every so many-th query decides

CANDIDATES = 256
"""Slots that are chosen from at least: those with the most mass."""

UNSEEN = -1e30


class _Head(NamedTuple):
    """One key/value head: n queries, S slots of the context."""

    scores_NS: Array  # before the softmax; ``UNSEEN`` where the query doesn't see the slot
    weight_N: Array  # part of the query's attention that goes to the context
    values_SF: Array


def key_values(source: Source) -> KeyValues:
    """Keys, values and biases fitted to the queries of the training rows.

    Raises:
      UserError: there are no rows.
    """
    if source.compacted is None:
        raise UserError("--initial match needs training queries; choose another start.")
    return source.compacted(functools.partial(compact, prompt_length=source.prompt_length))


def compact(inputs: AttentionInputs, prompt_length: int) -> Slots:
    """The slots that replace the context's (the second piece) in one layer; float32."""
    context = inputs.slots[1]
    heads_G, keys_SGF = _heads(inputs), context.keys[0].astype(jnp.float32)
    chosen_GK, bias_GK, values_GKF = jax.vmap(functools.partial(fit, count=prompt_length))(heads_G)
    keys_GKF = jax.vmap(lambda keys_SF, k: keys_SF[k], in_axes=(1, 0))(keys_SGF, chosen_GK)
    end = jnp.max(context.positions, axis=-1, keepdims=True)
    positions = end - prompt_length + 1 + jnp.arange(prompt_length)[None]
    return Slots(
        keys_GKF.swapaxes(0, 1)[None], values_GKF.swapaxes(0, 1)[None], positions, bias=bias_GK.T[None]
    )


def _heads(inputs: AttentionInputs) -> _Head:
    """The key/value heads, stacked ``[G, ...]``; the queries of a group's query heads are one list."""
    B, T, H, F = inputs.q_BTHF.shape
    context = inputs.slots[1]
    G = context.keys.shape[2]
    X = T * (H // G)  # queries of a row
    q_BTGRF = inputs.scale * inputs.q_BTHF.astype(jnp.float32).reshape(B, T, G, H // G, F)
    q_GBXF = q_BTGRF.transpose(2, 0, 1, 3, 4).reshape(G, B, X, F)

    def scores(slots: Slots) -> Array:
        keys = slots.keys.astype(jnp.float32)
        if slots.keys.shape[0] == 1:  # the same for all rows
            q_GNF, keys_GSF = q_GBXF.reshape(G, B * X, F), keys[0].swapaxes(0, 1)
            found = jnp.einsum("gnf,gsf->gns", q_GNF, keys_GSF).reshape(G, B, X, -1)
        else:
            found = jnp.einsum("gbxf,bsgf->gbxs", q_GBXF, keys)
        if inputs.softcap is not None:
            found = inputs.softcap * jnp.tanh(found / inputs.softcap)
        seen_BTS = visible(inputs.positions_BT, inputs.segment_ids_BT, slots, inputs.sliding_window)
        return jnp.where(jnp.repeat(seen_BTS, H // G, axis=1), found, UNSEEN)

    own_GBXS = scores(context)
    others = [jax.nn.logsumexp(scores(s), axis=-1) for i, s in enumerate(inputs.slots) if i != 1]
    rest_GBX = functools.reduce(jnp.logaddexp, others)
    weight_GBX = jax.nn.sigmoid(jax.nn.logsumexp(own_GBXS, axis=-1) - rest_GBX)
    real_BX = jnp.repeat(inputs.positions_BT >= 0, H // G, axis=1)
    values_GSF = context.values[0].astype(jnp.float32).swapaxes(0, 1)
    return _Head(own_GBXS.reshape(G, B * X, -1), (weight_GBX * real_BX).reshape(G, B * X), values_GSF)


def fit(head: _Head, count: int) -> tuple[Int[Array, " k"], Float[Array, " k"], Float[Array, "k f"]]:
    """The slots chosen, their biases, and their values."""
    part_NS = jax.nn.softmax(head.scores_NS, axis=-1)  # of the context's mass
    weight_N = head.weight_N
    chosen_K, mass_K = choose(part_NS * weight_N[:, None], weight_N, count)
    bias_K = jnp.log(mass_K)
    own_NK = jax.nn.softmax(head.scores_NS[:, chosen_K] + bias_K, axis=-1)
    values_KF = _values(own_NK, part_NS @ head.values_SF, head.weight_N, head.values_SF[chosen_K])
    return chosen_K, bias_K, values_KF


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
