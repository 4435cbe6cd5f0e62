"""The decoder: prefixes, padding, caches, causality; and logits against Hugging Face."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsp
from jaxsp.models import decoder
from jaxsp.models.config import DecoderConfig
from jaxsp.models.decoder import parameter_shapes
from jaxsp.models.families import FAMILIES
from jaxsp.models.layers import head_product
from jaxsp.models.rope import make_rope
from jaxsp.typing import EMPTY
from tests import programs, tiny
from tests.conftest import slow_beside

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
    copied = type(prefix)(
        jnp.repeat(prefix.keys, 3, axis=1),
        jnp.repeat(prefix.values, 3, axis=1),
        jnp.repeat(prefix.positions, 3, axis=0),
    )
    where = jnp.broadcast_to(positions(10, 4), (3, 10))
    shared, _ = decoder.hidden(params, config, rows, where, (prefix,))
    separate, _ = decoder.hidden(params, config, rows, where, (copied,))
    np.testing.assert_allclose(shared, separate, atol=1e-5)


@pytest.fixture(scope="module", params=slow_beside(FAMILIES, *tiny.ORDINARY))
def any_family(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    tiny.write(directory, with_tokenizer=False, model_type=request.param)
    model = jaxsp.load_model(directory, dtype="float32", tokenizer=None)
    return model.params, model.config


def test_padding_and_caches_change_nothing(any_family):
    """In every family: padding on the left, on the right and between; tokens read one by one."""
    params, config = any_family
    length, sides = 40, {"left": 3, "right": 0, "between": 30}  # longer than the sliding windows
    ids = np.random.RandomState(3).randint(0, config.vocab_size, (1, length))
    places = [np.arange(length) + 3 * (np.arange(length) >= at) for at in (0, length, 30)]

    @jax.jit
    def all_ways(inputs):
        whole, _ = decoder.hidden(params, config, inputs, positions(length))
        rows = jnp.full((len(sides), length + 3, config.width), 7.0)
        where = jnp.full(rows.shape[:2], EMPTY)
        for row, at in enumerate(places):
            rows = rows.at[row, at].set(inputs[0])
            where = where.at[row, at].set(jnp.arange(length))
        padded, _ = decoder.hidden(params, config, rows, where)
        cache = decoder.prefill(params, config, inputs[:, : length - 2])
        steps = []
        for t in (length - 2, length - 1):
            step = inputs[:, t : t + 1]
            steps.append(decoder.hidden(params, config, step, positions(1, t), (cache,))[0])
            cache = decoder.prefill(params, config, step, cache)
        return whole, padded, jnp.concatenate(steps, axis=1)

    whole, padded, steps = all_ways(decoder.embed(params, config, ids))
    tolerance = 1e-5 * np.abs(whole).max()
    for side, row, at in zip(sides, padded, places, strict=True):
        np.testing.assert_allclose(row[at], whole[0], atol=tolerance, err_msg=side)
    assert np.isfinite(padded).all()
    np.testing.assert_allclose(steps, whole[:, -2:], atol=tolerance)


def test_packed_rows_equal_rows_of_their_own(any_family):
    params, config = any_family
    lengths = (7, 20, 4)
    ids = np.random.RandomState(4).randint(0, config.vocab_size, (1, 6 + sum(lengths)))
    segment_ids = np.repeat(np.arange(3), lengths)[None]
    where = np.concatenate([np.arange(6, 6 + n) for n in lengths])[None]

    @jax.jit
    def both(inputs):
        prefix, rest = decoder.prefill(params, config, inputs[:, :6]), inputs[:, 6:]
        packed, _ = decoder.hidden(params, config, rest, where, (prefix,), segment_ids)
        alone, start = [], 0
        for n in lengths:
            part = rest[:, start : start + n]
            alone.append(decoder.hidden(params, config, part, positions(n, 6), (prefix,))[0])
            start += n
        return packed, jnp.concatenate(alone, axis=1)

    packed, alone = both(decoder.embed(params, config, ids))
    np.testing.assert_allclose(packed, alone, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize("length", [0, 1, 7, 8, 19])
def test_reading_in_chunks_equals_reading_at_once(model, length):
    params, config = model
    ids = np.random.RandomState(5).randint(0, config.vocab_size, (1, length))
    before = decoder.prefill(params, config, decoder.embed(params, config, IDS[:, :3]))
    kept = np.array(before.keys)
    at_once = decoder.prefill(params, config, decoder.embed(params, config, ids), before)
    chunked = decoder.read_long(params, config, ids, before, longest=8)
    used = np.asarray(chunked.positions[0]) != EMPTY
    assert np.asarray(chunked.positions)[:, used].tolist() == at_once.positions.tolist()
    np.testing.assert_allclose(chunked.keys[:, :, used], at_once.keys, atol=1e-5)
    np.testing.assert_allclose(chunked.values[:, :, used], at_once.values, atol=1e-5)
    assert used.size - used.sum() < max(1, -(-length // 8))
    np.testing.assert_array_equal(before.keys, kept)  # its buffer was not given away


@pytest.mark.parametrize("slot", [3, 9, 22])
def test_reading_again_from_a_slot_equals_reading_anew(model, slot):
    params, config = model
    ids, others = np.random.RandomState(5).randint(0, config.vocab_size, (2, 1, 19))
    before = decoder.prefill(params, config, decoder.embed(params, config, IDS[:, :3]))
    whole = decoder.read_long(params, config, ids, before)
    kept, changed = np.array(whole.keys), others[:, slot : slot + 10]
    again = decoder.read_again(params, config, changed, whole, slot, longest=8)
    anew = decoder.read_long(params, config, np.hstack([ids[:, : slot - 3], changed]), before)
    used, expected = (np.flatnonzero(np.asarray(p.positions[0]) != EMPTY) for p in (again, anew))
    np.testing.assert_array_equal(again.positions[:, used], anew.positions[:, expected])
    np.testing.assert_allclose(again.keys[:, :, used], anew.keys[:, :, expected], atol=1e-5)
    np.testing.assert_allclose(again.values[:, :, used], anew.values[:, :, expected], atol=1e-5)
    np.testing.assert_array_equal(whole.keys, kept)  # its buffer was not given away


def test_memory_of_reading_a_long_document():
    """Beside its keys and values, a document of 32k tokens needs what its chunks need."""
    config = smollm2_shape("float32")
    shapes = parameter_shapes(config)
    room = jax.eval_shape(lambda: decoder.empty_prefix(config, 32_768))
    chunk = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    program = decoder._read_chunk.lower(shapes, config, room, chunk, chunk, 0).compile()
    memory = programs.memory(program)
    assert memory.alias_size_in_bytes >= room.keys.size * 4 * 2  # written in place
    assert memory.temp_size_in_bytes < 0.4 * 2**30


def test_memory_of_a_gradient_through_32k_tokens():
    """To every vector of a prompt of 32k tokens, SmolLM2's shape: full attention would need 131 GiB."""
    config = smollm2_shape("bfloat16").replace(remat=True)
    K = 32_768

    def loss(sigma, params, ids):
        prefix = decoder.prefill(params, config, sigma)
        where = jnp.broadcast_to(K + jnp.arange(ids.shape[1]), ids.shape)
        inputs = decoder.embed(params, config, ids)
        states, _ = decoder.hidden(params, config, inputs, where, (prefix,))
        return jnp.square(states.astype(jnp.float32)).mean()

    sigma = jax.ShapeDtypeStruct((1, K, config.width), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((8, 48), jnp.int32)
    program = jax.jit(jax.grad(loss)).lower(sigma, parameter_shapes(config), ids).compile()
    widens = 2 if jax.__version_info__ < (0, 11) else 1  # older jax holds bfloat16 as float32 on a CPU
    assert programs.memory(program).temp_size_in_bytes < widens * 3.5 * 2**30


def smollm2_shape(dtype):
    return DecoderConfig(
        vocab_size=49152,
        width=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_width=64,
        mlp_width=1536,
        window=32_768,
        norm_epsilon=1e-5,
        tied_head=True,
        ropes=(make_rope({"rope_theta": 1e5}, 64),) * 30,
        dtype=dtype,
    )


def test_gradient_is_causal(model):
    params, config = model
    inputs = decoder.embed(params, config, IDS)

    def output_at(t):
        return lambda x: decoder.hidden(params, config, x, positions(10))[0][0, t].sum()

    for t in (0, 4, 9):
        influence = np.abs(jax.grad(output_at(t))(inputs)[0]).max(axis=-1)
        assert (influence[: t + 1] > 0).all()
        assert (influence[t + 1 :] == 0).all()


def test_remat_changes_nothing(model):
    params, config = model
    inputs = decoder.embed(params, config, IDS)

    def gradient(config):
        return jax.grad(lambda x: (decoder.hidden(params, config, x, positions(10))[0] ** 2).sum())(inputs)

    np.testing.assert_allclose(gradient(config.replace(remat=True)), gradient(config), rtol=1e-5, atol=1e-5)


def test_logits_of_embeddings_equal_logits_of_ids(tiny_model):
    by_ids = tiny_model.logits(IDS)
    assert by_ids.shape == (1, 10, tiny_model.config.vocab_size)
    assert by_ids.dtype == jnp.float32
    np.testing.assert_array_equal(by_ids, tiny_model.logits(embeddings=tiny_model.embed(IDS)))
    np.testing.assert_allclose(tiny_model.logits(IDS[0]), by_ids[0], atol=1e-5)
    with pytest.raises(ValueError, match="either ids or embeddings"):
        tiny_model.logits()


def test_one_state_in_bfloat16_is_not_multiplied_alone():
    """XLA would take ten times as long on a CPU; the logits are those that it has among others."""
    random = np.random.default_rng(0)
    states, table = (jnp.asarray(random.normal(size=(n, 8)), jnp.bfloat16) for n in (3, 11))
    product = functools.partial(head_product, precision=jax.lax.Precision.DEFAULT)
    whole = product(states, table)
    for shape in ((8,), (1, 8), (1, 1, 8)):
        one = product(states[1].reshape(shape), table)
        assert (one.shape, one.dtype) == ((*shape[:-1], 11), jnp.float32)
        np.testing.assert_allclose(one.reshape(-1), whole[1], rtol=1e-6)
        text = str(jax.make_jaxpr(product)(states[1].reshape(shape), table))
        assert "2,8" in text.replace(" ", "")
    assert product(states[:0], table).shape == (0, 11)
    alone = str(jax.make_jaxpr(product)(states[:1].astype(jnp.float32), table.astype(jnp.float32)))
    assert "pad" not in alone
