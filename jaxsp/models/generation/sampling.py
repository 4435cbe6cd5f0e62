"""The choice of an answer's tokens, for each row of a batch in its own way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.typing import EMPTY, Array, Bool, Float, Int, UserError, ceil_div

BEST = 64
"""Tokens of a row that are enough to draw from, mostly, where it asks for the most probable ones."""

LEAST_TOP_P = 1e-9
"""A smaller one means the same: the most probable token. As a float32 it might be 0, and leave none."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The rule by which the tokens of an answer are chosen, and when it ends.

    The distribution is the softmax of logits / temperature, cut to the ``top_k`` most probable tokens, then
    to the fewest of these that together reach ``top_p`` (Holtzman et al. 2020, arXiv:1904.09751).

    Attributes:
      temperature: 0 takes the most probable token.
      top_k: number of tokens to choose from; 0 for all.
      top_p: the probability that the tokens to choose from reach together, in (0, 1].
      stop_ids: tokens that end the answer, which includes them.
      stop_strings: texts that end the answer, which is cut to the tokens before them.
      min_tokens: stop ids are not chosen before there are so many.
      max_tokens: longest answer.

    Raises:
      UserError: a value is invalid.

    Example:
      >>> Sampling(temperature=0.8, top_p=0.9, max_tokens=64).top_k
      0
    """

    temperature: float = 0.0
    top_k: int | np.integer = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    min_tokens: int | np.integer = 0
    max_tokens: int | np.integer = 128

    def __post_init__(self) -> None:
        for name in ("top_k", "min_tokens", "max_tokens"):
            if not isinstance(getattr(self, name), Integral):
                raise UserError(f"{name} must be a whole number; got {getattr(self, name)!r}.")
        ids = all(isinstance(i, Integral) and i >= 0 for i in self.stop_ids)
        texts = not isinstance(self.stop_strings, str) and all(self.stop_strings)
        most = self.max_tokens
        wishes = {
            "temperature": (0 <= self.temperature < math.inf, "0 or more, and finite"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "stop_ids": (ids, "token ids, 0 or more"),
            "stop_strings": (texts, "a tuple of texts, none of them empty"),
            "max_tokens": (most >= 1, "at least 1"),
            "min_tokens": (0 <= self.min_tokens <= most, f"between 0 and max_tokens ({most})"),
        }
        for name, (good, wish) in wishes.items():
            if not good:
                raise UserError(f"{name} must be {wish}; got {getattr(self, name)!r}.")


class Draws(NamedTuple):
    """The rows' ways to draw at random, and to wait for the first stop id, as arrays."""

    key_B: Array
    temperature_B: Float[Array, " b"]
    top_k_B: Int[Array, " b"]
    top_p_B: Float[Array, " b"]
    min_B: Int[Array, " b"]


class Choices(NamedTuple):
    """Each row's sampling as arrays, for ``choose``."""

    draws: Draws | None  # None where all rows take the most probable token: the rest is then not compiled
    stops_BE: Int[Array, "b e"]  # ``EMPTY`` where there are fewer

    def where(self, wanted_B: Bool[Array, " b"]) -> Choices:
        """The same of the rows that are wanted; the others ask for nothing that would cost something."""
        if (draws := self.draws) is None:
            return self
        temperature_B = jnp.where(wanted_B, draws.temperature_B, 0)
        min_B = jnp.where(wanted_B, draws.min_B, 0)
        return self._replace(draws=draws._replace(temperature_B=temperature_B, min_B=min_B))


def tabulate(
    samplings: Sequence[Sampling], rows: int, key: Array | None, *, stops: int = 1, always: bool = False
) -> Choices:
    """The samplings as arrays, with empty rows up to ``rows``; each row draws from a key of its own.

    It is the row's of ``key`` if that is an array of keys; else it is made from the key and the row's place.
    There is room for so many ``stops`` at least, and ``always`` for what draws need.
    """
    most_stops = max(stops, *(len(s.stop_ids) for s in samplings))
    stops_BE = np.full((rows, round_up(most_stops, 8)), EMPTY, np.int32)
    for stops_E, sampling in zip(stops_BE, samplings, strict=False):
        stops_E[: len(sampling.stop_ids)] = sampling.stop_ids
    draws = None
    if always or any(s.temperature or s.min_tokens for s in samplings):
        key = jax.random.key(0) if key is None else key  # nobody draws from it then
        draws = Draws(
            key_B=_each(key, rows),
            temperature_B=column([s.temperature for s in samplings], rows, np.float32),
            top_k_B=column([s.top_k for s in samplings], rows),
            top_p_B=column([max(s.top_p, LEAST_TOP_P) for s in samplings], rows, np.float32),
            min_B=column([s.min_tokens for s in samplings], rows),
        )
    return Choices(draws, jnp.asarray(stops_BE))


def are_keys(key: Any) -> bool:
    """Whether it is an array of random keys, not one."""
    return bool(getattr(key, "ndim", 0)) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _each(key: Array, rows: int) -> Array:
    if are_keys(key):
        return key[jnp.minimum(jnp.arange(rows), len(key) - 1)]
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def column(values: Sequence[float | np.integer], rows: int, dtype: type = np.int32) -> Array:
    """The values, then zeros up to ``rows``."""
    return jnp.asarray(np.pad(np.asarray(values, dtype), (0, rows - len(values))))


def round_up(number: int, to: int) -> int:
    """The least multiple of ``to`` that isn't below the number."""
    return ceil_div(number, to) * to


def choose(logits_BV: Float[Array, "b v"], choices: Choices, count_B: Int[Array, " b"]) -> Int[Array, " b"]:
    """The next token of each row, which has ``count_B``; what no row asks for costs nothing."""
    if (draws := choices.draws) is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    early_B = count_B < draws.min_B
    logits_BV = jax.lax.cond(
        jnp.any(early_B), lambda: _without(choices.stops_BE, early_B, logits_BV), lambda: logits_BV
    )
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    random_B = draws.temperature_B > 0

    def drawn() -> Array:
        return jnp.where(random_B, _sample(logits_BV, draws, count_B), best_B)

    return jax.lax.cond(jnp.any(random_B), drawn, lambda: best_B)


def _without(stops_BE: Array, early_B: Array, logits_BV: Array) -> Array:
    V = logits_BV.shape[1]
    banned_BE = jnp.where(early_B[:, None] & (stops_BE != EMPTY), stops_BE, V)  # V: none
    rows_B1 = jnp.arange(len(logits_BV))[:, None]
    return logits_BV.at[rows_B1, banned_BE].set(-jnp.inf, mode="drop")


def _sample(logits_BV: Array, draws: Draws, count_B: Array) -> Array:
    random_B = draws.temperature_B > 0
    temperature_B1 = jnp.where(random_B, draws.temperature_B, 1)[:, None]
    # From the largest down, so that no temperature makes the largest infinite.
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature_B1
    keys_B = jax.vmap(jax.random.fold_in)(draws.key_B, count_B)
    cut_B = random_B & ((draws.top_k_B > 0) | (draws.top_p_B < 1))
    limits = draws.top_k_B[:, None], draws.top_p_B[:, None]
    token_B, known_B = jax.lax.cond(
        jnp.any(cut_B),
        lambda: _of_the_best(logits_BV, keys_B, *limits),
        lambda: (jnp.zeros(len(cut_B), jnp.int32), jnp.zeros(len(cut_B), bool)),
    )
    known_B &= cut_B

    def of_all() -> Array:
        most_BV = jax.lax.cond(
            jnp.any(cut_B & ~known_B), lambda: _most_probable(logits_BV, *limits), lambda: logits_BV
        )
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, most_BV).astype(jnp.int32)
        return jnp.where(known_B, token_B, drawn_B)

    # A row is drawn in the same way whatever the others ask for.
    return jax.lax.cond(jnp.all(known_B | ~random_B), lambda: token_B, of_all)


def _of_the_best(
    logits_BV: Array, keys_B: Array, top_k_B1: Array, top_p_B1: Array
) -> tuple[Int[Array, " b"], Bool[Array, " b"]]:
    """A token of each row, drawn among its ``BEST``; and whether all that it is to be drawn from is there.

    To sort the vocabulary, and to draw from all of it, would take longer than a small model's step.
    """
    best_BN, index_BN = jax.lax.top_k(logits_BV, min(BEST, logits_BV.shape[1]))
    count = best_BN.shape[1]
    inside_BN = (jnp.arange(count) < top_k_B1) | (top_k_B1 == 0)
    among_B1 = (top_k_B1 > 0) & (top_k_B1 <= count)
    mass_BN = jnp.exp(best_BN)  # of the largest 1
    every_B1 = jnp.sum(jnp.exp(logits_BV), axis=-1, keepdims=True)
    whole_B1 = jnp.where(among_B1, jnp.sum(mass_BN, axis=-1, keepdims=True, where=inside_BN), every_B1)
    p_BN = mass_BN / whole_B1
    reached_BN = jnp.cumsum(p_BN, axis=-1)
    inside_BN &= (reached_BN - p_BN < top_p_B1) | (top_p_B1 >= 1)
    enough_B1 = (top_k_B1 == 0) & (top_p_B1 < 1) & (reached_BN[:, -1:] >= top_p_B1)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, jnp.where(inside_BN, best_BN, -jnp.inf))
    token_B = jnp.take_along_axis(index_BN, drawn_B[:, None], axis=1)[:, 0]
    return token_B.astype(jnp.int32), (among_B1 | enough_B1)[:, 0]


def _most_probable(logits_BV: Array, top_k_B1: Array, top_p_B1: Array) -> Array:
    """-inf outside the top k, and outside the fewest of these that reach the probability top p."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    inside_BV = (jnp.arange(logits_BV.shape[1]) < top_k_B1) | (top_k_B1 == 0)
    p_BV = jax.nn.softmax(sorted_BV, axis=-1, where=inside_BV)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    # The sum may round to 1 before the last token: at top_p 1 it must not cut.
    inside_BV &= (before_BV < top_p_B1) | (top_p_B1 >= 1)
    least_B1 = jnp.min(sorted_BV, axis=-1, keepdims=True, where=inside_BV, initial=jnp.inf)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
