"""Attention matching: in closed form, the K slots of each head that serve the training rows like the context.

Each layer's slots are found with the queries that come from the layers below, whose context is already
replaced (on-policy). Where heads may have slots of unequal number, each gets them as long as they lessen its
error by more than they would another's.

Reference: Zweiger et al. 2026, Fast KV Compaction via Attention Matching; for unequal numbers also Feng et
al. 2024, Ada-KV (arXiv:2407.11550).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.prompts.initializers.source import ABSENT, Fit, Own, Probe, Source
from jaxsp.typing import Array, Bool, Float, Int, KeyValues, UserError

MASS = math.exp(-3), math.exp(3)
"""Bounds of the mass that a slot stands for, in that of its own token; its bias is the logarithm."""

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths tried of the pull of values towards those of the slots chosen, relative to the mean of the
diagonal; queries left out decide."""

HELD_OUT = 4  # every so many-th query decides

CANDIDATES = 256
"""Slots that are chosen from at least: those with the most mass."""

LOUDEST = 20.0
"""Logarithm of a slot's mass in that of a query's own ones, at most: others may be far louder."""

AT_ONCE = 8
"""A head's first slots are chosen one by one; beyond twice as many, one for every so many that it has."""

_NO_ROWS = "--initial match needs training queries; choose another start."

CURVE_RIDGE, CURVE_STEPS = 1e-2, 50
"""The strength of the pull, and the steps towards the masses, with which numbers of slots are compared."""


@contextlib.contextmanager
def _blas_in_one_thread() -> Iterator[None]:
    """On a CPU linear systems are solved by scipy's BLAS: its threads and XLA's would wait for each other."""
    from threadpoolctl import threadpool_limits

    importlib.import_module("scipy.linalg")  # the limit reaches what is loaded; jax loads it when it needs it
    with threadpool_limits(1, user_api="blas"):
        yield


@_blas_in_one_thread()
def key_values(source: Source) -> KeyValues:
    """Keys, values and biases fitted to the queries of the training rows.

    Raises:
      UserError: there are no rows.
    """
    K = source.prompt_length
    return _compacted(source, K, np.full(source.heads, K))


@_blas_in_one_thread()
def uneven(source: Source, most: int) -> KeyValues:
    """The same with K slots a head on average: from 1 to ``most`` of them, where they lessen the error most.

    Raises:
      UserError: there are no rows.
    """
    if source.probed is None:
        raise UserError(_NO_ROWS)
    levels = slot_levels(most)
    errors_LGN = np.asarray(source.probed(_probe_of(levels)))
    room = min(most, len(source.context_ids))
    return _compacted(source, most, share(levels, errors_LGN, source.prompt_length, room))


def _compacted(source: Source, size: int, counts_LG: Int[np.ndarray, "l g"]) -> KeyValues:
    if source.compacted is None:
        raise UserError(_NO_ROWS)
    return jax.block_until_ready(source.compacted(fit_to(size), counts_LG))


# One object for one number: what is compiled with it is compiled once.
@functools.cache
def fit_to(size: int) -> Fit:
    """``fit`` to so many slots."""
    return functools.partial(fit, size=size)


@functools.cache
def _probe_of(levels: tuple[int, ...]) -> Probe:
    return functools.partial(errors, levels=levels)


def slot_levels(most: int) -> tuple[int, ...]:
    """Numbers of slots that are tried, each about twice the one before.

    Example:
      >>> slot_levels(24)
      (1, 3, 6, 12, 24)
    """
    return tuple(sorted({most >> i for i in range(most.bit_length())}))


def share(
    levels: tuple[int, ...], errors_LGN: Float[np.ndarray, "l g n"], mean: int, most: int
) -> Int[np.ndarray, "l g"]:
    """The slots of each head, ``mean`` on average, that make the sum of the heads' errors smallest.

    Between the levels the errors are taken to fall along their convex hull, so that slot after slot goes
    where it lessens the error most.

    Args:
      levels: numbers of slots, ascending from 1.
      errors_LGN: error of each head with so many.
      mean: slots of a head on average.
      most: slots of a head at most; at least ``mean``.

    Example:
      >>> share((1, 2, 4), np.array([[[8.0, 4.0, 0.0], [8.0, 7.0, 6.9]]]), 2, 4).tolist()
      [[3, 1]]
    """
    L, G, _ = errors_LGN.shape
    gains = np.array([_hull_gains(levels, errors_N) for errors_N in errors_LGN.reshape(L * G, -1)])
    gains[:, most - 1 :] = -np.inf
    best = np.argsort(-gains, axis=None, kind="stable")[: (mean - 1) * L * G]
    return 1 + np.bincount(best // gains.shape[1], minlength=L * G).reshape(L, G)


def _hull_gains(levels: tuple[int, ...], errors_N: np.ndarray) -> np.ndarray:
    """Gains of each slot after the first, along the lower convex hull of the error: none is larger than the
    one before."""
    gains, i = [], 0
    while i < len(levels) - 1:
        more = np.array(levels[i + 1 :]) - levels[i]
        slopes = (errors_N[i] - errors_N[i + 1 :]) / more
        best = int(np.argmax(slopes))
        gains += [max(slopes[best], 0.0)] * int(more[best])
        i += 1 + best
    return np.array(gains)


def fit(
    scores_NS: Float[Array, "n s"],
    weight_N: Float[Array, " n"],
    values_SF: Float[Array, "s f"],
    count: Int[Array, ""],
    own_NS: Own = None,
    *,
    size: int,
) -> tuple[Int[Array, " k"], Float[Array, " k"], Float[Array, "k f"]]:
    """K slots in place of the S of one head.

    Args:
      scores_NS: scores of N queries before the softmax.
      weight_N: how much of a query's attention goes to these slots: what an error there costs.
      values_SF: values of the slots.
      count: slots that the head has, at most K.
      own_NS: the slots in whose place a query is served; None: all. It will see those of other queries, too.
      size: K.

    Returns:
      The slots chosen, their biases, and their new values. Those that the head does not have come first.
    """
    with jax.default_matmul_precision("highest"):
        part_NS, norms_S = _parts(scores_NS, weight_N, own_NS)
        chosen_K, products = choose(part_NS * weight_N[:, None], weight_N, size, norms_S)
        there_K = jnp.arange(size) < count
        bias_K = _bias(weights(products, there_K, 400), there_K)
        own_NK = jax.nn.softmax(scores_NS[:, chosen_K] + bias_K, axis=-1)
        near_KF = values_SF[chosen_K]
        target_NF = _of_own(part_NS, own_NS) @ values_SF
        values_KF = near_KF + _changes(own_NK, target_NF - own_NK @ near_KF, weight_N)
    chosen_K, bias_K, values_KF = (jnp.roll(x, size - count, axis=0) for x in (chosen_K, bias_K, values_KF))
    return chosen_K, bias_K, values_KF


def errors(
    scores_NS: Float[Array, "n s"],
    weight_N: Float[Array, " n"],
    values_SF: Float[Array, "s f"],
    own_NS: Own = None,
    *,
    levels: tuple[int, ...],
) -> Float[Array, " c"]:
    """The weighted squared error of a head's output at the queries left out, with each number of slots."""
    with jax.default_matmul_precision("highest"):
        part_NS, norms_S = _parts(scores_NS, weight_N, own_NS)
        chosen_K, products = choose(part_NS * weight_N[:, None], weight_N, levels[-1], norms_S)
        target_NF = _of_own(part_NS, own_NS) @ values_SF
        near_KF, scores_NK = values_SF[chosen_K], scores_NS[:, chosen_K]

        def error(count: Array, size: int) -> Array:
            there_K = jnp.arange(size) < count
            first = Products(products.gram_KK[:size, :size], products.right_K[:size])
            bias_K = _bias(weights(first, there_K, CURVE_STEPS), there_K)
            own_NK = jax.nn.softmax(scores_NK[:, :size] + bias_K, axis=-1)
            every, left_out = _regressions(own_NK, target_NF - own_NK @ near_KF[:size], weight_N)
            return left_out.error(every.without(left_out).solved(CURVE_RIDGE))

        found = [
            jax.lax.map(functools.partial(error, size=some[-1]), jnp.array(some))
            for some in _of_one_size(levels)
        ]
        return jnp.concatenate(found)


def _of_one_size(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers in groups; the arrays of a group have one size, that of its last number.

    Small arrays are solved much faster, but each size is a program of its own.

    Example:
      >>> _of_one_size([1, 2, 5, 10, 20, 40, 80, 160])
      [[1, 2, 5, 10, 20], [40, 80], [160]]
    """
    groups = itertools.groupby(numbers, lambda number: (max(number, 16) - 1).bit_length() // 2)
    return [list(group) for _, group in groups]


def _parts(scores_NS: Array, weight_N: Array, own_NS: Own) -> tuple[Array, Array | None]:
    """The mass of each slot in that of a query's own slots, and the size of the own ones' columns."""
    if own_NS is None:
        return jax.nn.softmax(scores_NS, axis=-1), None
    whole_N1 = jax.nn.logsumexp(scores_NS, axis=-1, keepdims=True, where=own_NS)
    part_NS = jnp.exp(jnp.minimum(scores_NS - whole_N1, LOUDEST))
    return part_NS, _norms(_of_own(part_NS, own_NS) * weight_N[:, None])


def _of_own(part_NS: Array, own_NS: Own) -> Array:
    return part_NS if own_NS is None else jnp.where(own_NS, part_NS, 0)


def _norms(columns_NS: Array) -> Array:
    return jnp.sqrt(jnp.sum(columns_NS**2, axis=0))


def _bias(mass: Array, there: Array) -> Array:
    return jnp.where(there, jnp.log(jnp.where(there, mass, 1.0)), ABSENT)


class Products(NamedTuple):
    """Products of columns with each other, and with the target that their weighted sum is to be."""

    gram_KK: Array
    right_K: Array


def choose(
    parts_NS: Float[Array, "n s"],
    target_N: Float[Array, " n"],
    count: int,
    sizes_S: Float[Array, " s"] | None = None,
) -> tuple[Int[Array, " k"], Products]:
    """Orthogonal matching pursuit: columns, one after the other, whose weighted sum is the target.

    Args:
      parts_NS: a column a slot.
      target_N: the sum of all columns, or of those that each query is to be served like.
      count: K.
      sizes_S: sizes of the columns by which they are candidates; by default their norms.

    Returns:
      The columns' indices in the order chosen, and their products.
    """
    norms_S = _norms(parts_NS)
    sizes_S = norms_S if sizes_S is None else sizes_S
    candidates_C = jax.lax.top_k(sizes_S, min(len(sizes_S), max(CANDIDATES, 2 * count)))[1]
    parts_NC, norms_C = parts_NS[:, candidates_C], norms_S[candidates_C]
    gram_CC, right_C = parts_NC.T @ parts_NC, target_N @ parts_NC

    def products(chosen_K: Array) -> Products:
        return Products(gram_CC[chosen_K][:, chosen_K], right_C[chosen_K])

    def step(carry: tuple[Array, Array], ends: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        (chosen_K, mass_K), (start, end) = carry, ends
        size = len(chosen_K)
        gain_C = (right_C - gram_CC[:, chosen_K] @ mass_K) / jnp.maximum(norms_C, 1e-12)
        taken_K = jnp.where(jnp.arange(size) < start, chosen_K, len(gain_C))
        gain_C = gain_C.at[taken_K].set(-jnp.inf, mode="drop")
        best = jax.lax.top_k(gain_C, min(most, len(gain_C)))[1]
        at = start + jnp.arange(len(best))
        chosen_K = chosen_K.at[jnp.where(at < end, at, size)].set(best, mode="drop")
        there_K = jnp.arange(size) < end
        return (chosen_K, weights(products(chosen_K), there_K, 10)), None

    chosen_K, mass_K = jnp.zeros(0, jnp.int32), jnp.zeros(0)
    starts = _numbers_chosen(count)
    for ends in _of_one_size(starts[1:]):
        begin, size = starts.index(ends[0]) - 1, ends[-1]
        befores = starts[begin : begin + len(ends)]
        most = max(end - start for start, end in zip(befores, ends, strict=True))
        room = (0, size - len(chosen_K))
        carry = jnp.pad(chosen_K, room), jnp.pad(mass_K, room)
        (chosen_K, mass_K), _ = jax.lax.scan(step, carry, (jnp.array(befores), jnp.array(ends)))
    return candidates_C[chosen_K], products(chosen_K)


def _numbers_chosen(count: int) -> list[int]:
    """Numbers of slots chosen after each step, from 0 on.

    Example:
      >>> _numbers_chosen(20)
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20]
    """
    starts = [0]
    while starts[-1] < count:
        starts.append(min(count, starts[-1] + max(1, starts[-1] // AT_ONCE)))
    return starts


def weights(products: Products, there_K: Bool[Array, " k"], steps: int) -> Float[Array, " k"]:
    """Weights within the bounds ``MASS``, the least squares' among those that are there.

    The unbounded solution cut to the bounds, then accelerated projected gradient.
    """
    gram_KK, right_K = products
    gram_KK = jnp.where(there_K & there_K[:, None], gram_KK, 0)
    ridge = 1e-6 * jnp.trace(gram_KK) / jnp.maximum(jnp.sum(there_K), 1) + 1e-20
    full_KK = gram_KK + jnp.diag(jnp.where(there_K, ridge, 1.0))
    start_K = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(full_KK), right_K * there_K)
    # With more slots than the queries tell apart float32 may find no factor: the gradient starts from 1.
    start_K = jnp.where(jnp.all(jnp.isfinite(start_K)), start_K, 1.0)
    start_K = jnp.clip(start_K, *MASS) * there_K
    largest = jnp.maximum(jnp.max(jnp.sum(jnp.abs(gram_KK), axis=0)), 1e-20)

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x_K, y_K = carry
        new_K = jnp.clip(y_K - (gram_KK @ y_K - right_K) / largest, *MASS) * there_K
        return new_K, new_K + (i / (i + 3.0)) * (new_K - x_K)

    return jax.lax.fori_loop(0, steps, step, (start_K, start_K))[0]


class _Regression(NamedTuple):
    """Weighted least squares for changes of the values, by its products alone."""

    gram_KK: Array
    right_KF: Array
    squares: Array

    @classmethod
    def of(cls, own_NK: Array, left_NF: Array, weight_N: Array) -> _Regression:
        own_NK, left_NF = own_NK * weight_N[:, None], left_NF * weight_N[:, None]
        return cls(own_NK.T @ own_NK, own_NK.T @ left_NF, jnp.sum(left_NF**2))

    def solved(self, ridge: Array | float) -> Array:
        """Changes that give what is left, held small by the ridge."""
        used = jnp.maximum(jnp.sum(jnp.diag(self.gram_KK) > 0), 1)
        size = jnp.trace(self.gram_KK) / used + 1e-20
        full_KK = self.gram_KK + ridge * size * jnp.eye(len(self.gram_KK))
        return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(full_KK), self.right_KF)

    def error(self, changes_KF: Array) -> Array:
        return self.squares + jnp.sum(changes_KF * (self.gram_KK @ changes_KF - 2 * self.right_KF))

    def without(self, others: _Regression) -> _Regression:
        """The same without some of its queries."""
        return _Regression(*jax.tree.map(jnp.subtract, self, others))


def _regressions(own_NK: Array, left_NF: Array, weight_N: Array) -> tuple[_Regression, _Regression]:
    """That to all queries, and to those that are left out to decide."""
    every = own_NK, left_NF, weight_N
    return _Regression.of(*every), _Regression.of(*(x[::HELD_OUT] for x in every))


def _changes(own_NK: Array, left_NF: Array, weight_N: Array) -> Array:
    """Changes of the slots' values by which their attention gives what is left: ridge regression."""
    every, left_out = _regressions(own_NK, left_NF, weight_N)
    fitted, ridges = every.without(left_out), jnp.array(RIDGES)
    off = jax.lax.map(lambda ridge: left_out.error(fitted.solved(ridge)), ridges)
    return every.solved(ridges[jnp.argmin(off)])
