"""Keys, values and biases whose first 1, 2, 4 … K slots are each a prompt: many lengths from one training.

The prompts share keys and values. Each has biases of its own, as fewer slots stand for more of the context
each. A step of training reads one of them, drawn: all K slots and the first alone more often than the others.

Reference: Kusupati et al. 2022, Matryoshka Representation Learning (arXiv:2205.13147); Rippel et al. 2014,
Learning Ordered Representations with Nested Dropout (arXiv:1402.0915).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsp.prompts import key_value
from jaxsp.prompts.initializers import Start
from jaxsp.typing import EMPTY, Array, Bool, KeyValues, PyTree

# Training watches the held-out KL of all slots. The best step by that may be one at which the shorter prompts
# are hardly trained.
DEFAULTS = {**key_value.DEFAULTS, "steps": 150, "keep": "last"}
IS_READ = False
FORM = {**key_value.FORM, "bias": "l n k g"}

Sigma = Mapping[str, Any]
"""As in ``key_value``, but for ``bias`` ``[L, N, K, G]``: of each of the N prompts, the shortest first. While
it is trained also ``drawn``, the index of the prompt that is read."""


def initial(start: Start) -> Sigma:
    """σ with the keys and values that the start gives; shorter prompts have the mass of all K slots."""
    sigma = key_value.initial(start)
    bias_LKG = sigma["bias"]
    mass_LKG = jnp.cumsum(jnp.exp(bias_LKG), axis=1)
    more_LKG = jnp.log(mass_LKG[:, -1:]) - jnp.log(mass_LKG)  # of the first slots, up to each
    each = [bias_LKG + more_LKG[:, length - 1, None] for length in _lengths(bias_LKG.shape[1])]
    return {**sigma, "bias": jnp.stack(each, axis=1)}


def prefix(sigma: Sigma, preamble: KeyValues, prefill: Any) -> KeyValues:
    """``preamble`` followed by σ, all slots or those drawn; differentiable in σ."""
    index, count = sigma.get("drawn", len(lengths(sigma)) - 1), prompt_length(sigma)
    whole = key_value.prefix({**sigma, "bias": jnp.asarray(sigma["bias"])[:, index]}, preamble, prefill)
    # Those that are there stand right before the queries, as they would without the others.
    there_K, left = _there(count)[index], count - jnp.array(_lengths(count))[index]
    own_K = jnp.where(there_K, whole.positions[0, -count:] + left, EMPTY)
    return KeyValues(whole.keys, whole.values, whole.positions.at[:, -count:].set(own_K), whole.bias)


def prompt_length(sigma: Sigma) -> int:
    """K, in slots."""
    return key_value.prompt_length(sigma)


def lengths(sigma: Sigma) -> Sequence[int]:
    """1, 2, 4 … and K."""
    return _lengths(prompt_length(sigma))


def _lengths(count: int) -> Sequence[int]:
    return [*(2**i for i in range((count - 1).bit_length())), count]


def _there(count: int) -> Bool[Array, "n k"]:
    """Whether a slot is part of a prompt."""
    return jnp.arange(count) < jnp.array(_lengths(count))[:, None]


def cut(sigma: Sigma, length: int) -> tuple[str, Sigma]:
    """The first slots, which are a prompt of keys and values like any other."""
    keys, values = (sigma[name][:, :length] for name in ("keys", "values"))
    bias = sigma["bias"][:, lengths(sigma).index(length), :length]
    return "key_value", {**sigma, "keys": keys, "values": values, "bias": bias}


OFTEN = 0.3
"""Part of the steps that read all K slots, and of those that read the first alone: it has most to learn."""


def drawn(sigma: Sigma, key: Array) -> Sigma:
    """All K slots or the first alone, each with probability ``OFTEN``; else one of the others, all alike."""
    count = len(lengths(sigma))
    often, rest = jnp.zeros(count).at[jnp.array([0, -1])].set(1), max(count - 2, 0)
    chance = jnp.where(often > 0, OFTEN, (1 - 2 * OFTEN) / max(rest, 1))
    return {**sigma, "drawn": jax.random.categorical(key, jnp.log(chance))}


def rates(sigma: Sigma, factors: Mapping[str, float]) -> PyTree:
    """Sizes of a step of each entry at a learning rate of 1."""
    found = key_value.rates({**sigma, "bias": sigma["bias"][:, -1]}, factors)
    return {**found, "bias": found["bias"][:, None] * _there(prompt_length(sigma))[:, :, None]}
