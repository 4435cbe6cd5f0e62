"""The decoder: prefixes, padding, caches, causality; and logits against Hugging Face."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsp.models import attention, decoder
from jaxsp.typing import EMPTY

IDS = np.array([[5, 9, 77, 30, 200, 14, 3, 99, 41, 120]])


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model.params, tiny_model.config


def positions(length: int, start: int = 0):
    return jnp.arange(start, start + length)[None]


def test_prefix_then_rest_equals_all_at_once(model):
    params, config = model
    inputs = decoder.embed(params, config, IDS)
    whole, _ = decoder.hidden(params, config, inputs, positions(10))
    prefix = decoder.prefill(params, config, inputs[:, :4])
    prefix = decoder.prefill(params, config, inputs[:, 4:6], prefix)
    rest, _ = decoder.hidden(params, config, inputs[:, 6:], positions(4, 6), (prefix,))
    np.testing.assert_allclose(rest, whole[:, 6:], atol=1e-5)


def test_a_shared_prefix_equals_one_copy_per_row(model):
    params, config = model
    rows = jnp.concatenate([decoder.embed(params, config, IDS)] * 3) + jnp.arange(3)[:, None, None]
    prefix = decoder.prefill(params, config, rows[:1, :4] * 0.5)
    copied = jax.tree.map(lambda a: jnp.repeat(a, 3, axis=a.ndim - 4 if a.ndim == 5 else 0), prefix)
    copied = type(prefix)(
        jnp.repeat(prefix.keys, 3, axis=1),
        jnp.repeat(prefix.values, 3, axis=1),
        jnp.repeat(prefix.positions, 3, axis=0),
    )
    where = jnp.broadcast_to(positions(10, 4), (3, 10))
    shared, _ = decoder.hidden(params, config, rows, where, (prefix,))
    separate, _ = decoder.hidden(params, config, rows, where, (copied,))
    np.testing.assert_allclose(shared, separate, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_changes_nothing(model, side):
    params, config = model
    inputs = decoder.embed(params, config, IDS)
    whole, _ = decoder.hidden(params, config, inputs, positions(10))
    places = {"left": range(3, 13), "right": range(10), "between": [*range(5), *range(8, 13)]}[side]
    padded = jnp.full((1, 13, config.width), 7.0).at[:, jnp.array(places)].set(inputs)
    where = jnp.full((1, 13), EMPTY).at[:, jnp.array(places)].set(positions(10))
    out, _ = decoder.hidden(params, config, padded, where)
    np.testing.assert_allclose(out[:, jnp.array(places)], whole, atol=1e-5)
    assert np.isfinite(out).all()


def test_gradient_is_causal(model):
    params, config = model
    inputs = decoder.embed(params, config, IDS)

    def output_at(t):
        return lambda x: decoder.hidden(params, config, x, positions(10))[0][0, t].sum()

    for t in (0, 4, 9):
        influence = np.abs(jax.grad(output_at(t))(inputs)[0]).max(axis=-1)
        assert (influence[: t + 1] > 0).all()
        assert (influence[t + 1 :] == 0).all()


def test_long_queries_are_chunked_without_a_difference(model, monkeypatch):
    params, config = model
    inputs = decoder.embed(params, config, IDS)

    def loss(x):
        out, _ = decoder.hidden(params, config, x, positions(10))
        return (out**2 * jnp.arange(10)[None, :, None]).sum(), out

    gradient, out = jax.grad(loss, has_aux=True)(inputs)
    monkeypatch.setattr(attention, "QUERY_CHUNK", 4)  # 10 is not a multiple of it
    chunked_gradient, chunked = jax.grad(loss, has_aux=True)(inputs)
    np.testing.assert_allclose(chunked, out, atol=1e-5)
    np.testing.assert_allclose(chunked_gradient, gradient, rtol=1e-4, atol=1e-3)


def test_no_array_of_all_scores():
    """At T = S = 4096 the full scores of 8 heads would take 512 MiB; a chunk of them is there."""
    shape = jax.ShapeDtypeStruct((1, 4096, 8, 16), jnp.float32)
    where = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def loss(q, k, v, p):
        return attention.attention(q, p, [attention.Segment(k, v, p)]).sum()

    compiled = (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape, where).compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 2**20


def test_remat_changes_nothing(model):
    params, config = model
    inputs = decoder.embed(params, config, IDS)

    def gradient(config):
        return jax.grad(lambda x: (decoder.hidden(params, config, x, positions(10))[0] ** 2).sum())(
            inputs
        )

    np.testing.assert_allclose(
        gradient(config.replace(remat=True)), gradient(config), rtol=1e-5, atol=1e-5
    )


def test_logits_of_embeddings_equal_logits_of_ids(tiny_model):
    by_ids = tiny_model.logits(IDS)
    assert by_ids.shape == (1, 10, tiny_model.config.vocab_size)
    assert by_ids.dtype == jnp.float32
    np.testing.assert_array_equal(by_ids, tiny_model.logits(embeddings=tiny_model.embed(IDS)))
    np.testing.assert_allclose(tiny_model.logits(IDS[0]), by_ids[0], atol=1e-5)
    with pytest.raises(ValueError, match="either ids or embeddings"):
        tiny_model.logits()
