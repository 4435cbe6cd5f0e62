"""Tokens are drawn from the distribution that was asked for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsp.models.generation import sampling as sampling_module
from jaxsp.models.generation.sampling import Sampling, choose as choose_tokens, tabulate
from jaxsp.typing import UserError


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_samples_follow_the_softmax(temperature):
    """Chi-square against softmax(logits / temperature), 7 degrees of freedom, at odds of 1 in 1000."""
    logits = np.array([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, 0.2])
    draws = choose(np.tile(logits, (20_000, 1)), Sampling(temperature=temperature))
    expected = 20_000 * softmax(logits / temperature)
    found = np.bincount(draws, minlength=8)
    assert ((found - expected) ** 2 / expected).sum() < 24.32


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (3, 1.0), (0, 0.5), (0, 0.9), (4, 0.7), (99, 1e-9)])
def test_top_k_and_top_p_keep_the_tokens_they_should(top_k, top_p):
    random = np.random.RandomState(5)
    for logits in random.standard_normal((3, 12)) * 2:
        sampling = Sampling(temperature=0.9, top_k=top_k, top_p=top_p)
        draws = choose(np.tile(logits, (20_000, 1)), sampling)
        inside = support(logits / 0.9, top_k, top_p)
        p = np.where(inside, softmax(logits / 0.9), 0)
        p /= p.sum()
        found = np.bincount(draws, minlength=12) / 20_000
        assert (found[~inside] == 0).all()
        np.testing.assert_allclose(found, p, atol=5 * np.sqrt(0.25 / 20_000))
        assert (found > 0)[p > 1e-3].all()


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.5), (0, 0.9), (4, 0.7), (9, 0.9), (0, 0.999)])
def test_all_is_sorted_where_the_best_tokens_are_not_enough(top_k, top_p, monkeypatch):
    """From the same tokens it is drawn either way."""
    monkeypatch.setattr(sampling_module, "BEST", 4)
    test_top_k_and_top_p_keep_the_tokens_they_should(top_k, top_p)


def test_a_draw_does_not_depend_on_the_rows_beside_it(monkeypatch):
    """Whether its best tokens are enough, or all are sorted for it or for another row."""
    monkeypatch.setattr(sampling_module, "BEST", 4)
    logits = np.random.RandomState(7).standard_normal((5, 64)).astype(np.float32) * 3
    rules = [Sampling(temperature=0.3, top_p=0.5), Sampling(temperature=5.0, top_p=0.95)]
    rules += [Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=3), Sampling()]
    choices = tabulate(rules, 5, jax.random.key(3))
    count = jnp.zeros(5, jnp.int32)
    together = np.asarray(choose_tokens(jnp.asarray(logits), choices, count))
    for row in range(5):
        own = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], choices)
        alone = choose_tokens(jnp.asarray(logits[row : row + 1]), own, count[:1])
        assert int(alone[0]) == together[row]


def test_nothing_is_sorted_where_the_best_tokens_are_enough(monkeypatch):
    """A sort of a vocabulary takes longer than a small model's step."""
    sorts, most_probable = [], sampling_module._most_probable

    def counted(logits_BV, *options):
        jax.debug.callback(lambda: sorts.append(True))
        return most_probable(logits_BV, *options)

    monkeypatch.setattr(sampling_module, "_most_probable", counted)
    flat, sharp = np.zeros((1, 500)), 20 * np.eye(1, 500)
    cases: list[tuple[np.ndarray, dict[str, Any], int]] = [
        (sharp, {"top_p": 0.95}, 0), (flat, {"top_k": 64}, 0), (flat, {}, 0),
        (flat, {"top_p": 0.95}, 1), (flat, {"top_k": 65}, 2),
    ]  # fmt: skip
    for logits, options, expected in cases:
        choose(logits, Sampling(temperature=1.0, **options))
        jax.effects_barrier()
        assert len(sorts) == expected


def test_extreme_temperatures():
    logits = np.array([[3.0, 4.0, 3.999, -5.0]] * 500)
    assert (choose(logits, Sampling(temperature=1e-30)) == 1).all()
    found = np.bincount(choose(logits, Sampling(temperature=1e30)), minlength=4)
    assert (found > 80).all()


def choose(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """A token for every row of logits, each row a request of its own."""
    n = len(logits)
    choices = tabulate([sampling] * n, n, jax.random.key(11))
    count = jnp.zeros(n, jnp.int32)
    return np.asarray(jax.jit(choose_tokens)(jnp.asarray(logits, jnp.float32), choices, count))


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max())
    return p / p.sum()


def support(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Which tokens may be chosen: one by one, from the most probable down."""
    order = np.argsort(-logits)
    order = order[:top_k] if top_k else order
    p = softmax(logits[order])
    kept, mass = [], 0.0
    for token, probability in zip(order, p, strict=True):
        kept.append(token)
        mass += probability
        if mass >= top_p:
            break
    return np.isin(np.arange(len(logits)), kept)


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": -1.0}, r"temperature must be 0 or more, and finite; got -1\.0\."),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_k": -3}, r"top_k must be 0 \(all tokens\) or more; got -3"),
    ({"top_p": 0.0}, r"top_p must be above 0 and at most 1; got 0\.0"),
    ({"top_p": 1.5}, "top_p"),
    ({"stop_ids": (4, -1)}, "stop_ids"),
    ({"stop_strings": "end"}, "stop_strings must be a tuple of texts"),
    ({"stop_strings": ("",)}, "stop_strings"),
    ({"stop_ids": (4.0,)}, "stop_ids must be token ids"),
    ({"max_tokens": 4.5}, r"max_tokens must be a whole number; got 4\.5"),
    ({"max_tokens": None}, "max_tokens must be a whole number; got None"),
    ({"min_tokens": 1.0}, "min_tokens must be a whole number"),
    ({"top_k": "3"}, "top_k must be a whole number; got '3'"),
    ({"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
    ({"min_tokens": 5, "max_tokens": 4}, r"min_tokens must be between 0 and max_tokens \(4\)"),
])  # fmt: skip
def test_sampling_names_the_value_that_is_wrong(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)
