"""The contract of the prompt kinds, over the whole table, and where prompts start."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsp import distributions, prompts
from jaxsp.data.examples import make_rows
from jaxsp.prompts import PROMPT_KINDS, nested
from jaxsp.prompts.initializers import ABSENT, INITIALIZERS, Source, Start
from jaxsp.typing import EMPTY, KeyValues, UserError
from tests.conftest import slow_beside

CONTEXT = np.array([5, 9, 77, 30, 200, 14, 3])
ROWS = make_rows([[8, 9, 60, 61], [10, 70], [33, 9, 41]], [[11, 12], [13, 2], [50, 51, 2]])
kinds = pytest.mark.parametrize("kind", PROMPT_KINDS)


@pytest.fixture(scope="module")
def preamble(tiny_model):
    return distributions.context_prefix(tiny_model.params, tiny_model.config, np.array([[1, 50]]))


def initial(model, preamble, kind, length, name="first", rows=None, rank=None):
    return distributions.initial_prompt(
        model.params, model.config, CONTEXT, preamble, key=jax.random.key(0), prompt_length=length,
        initial=name, kind=kind, rows=rows, rank=rank,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in PROMPT_KINDS if kind != "low_rank"])  # that one holds less
def test_a_prompt_equal_to_the_context_is_the_context(tiny_model, preamble, kind):
    params, config = tiny_model.params, tiny_model.config
    sigma = initial(tiny_model, preamble, kind, len(CONTEXT))
    prompt = distributions.prompt_prefix(params, config, sigma, preamble, kind)
    context = distributions.context_prefix(params, config, CONTEXT[None], preamble)
    rows = make_rows([[8, 9], [10]], [[11, 12], [13, 2]])
    there = np.ones(prompt.positions.shape[1], bool)
    if kind == "per_head":
        assert prompt.bias is not None
        there = np.asarray(prompt.bias == 0).all(axis=(0, 1, 3))
        assert (np.asarray(prompt.bias)[:, :, ~there] == ABSENT).all()
    for name in ("keys", "values"):
        np.testing.assert_array_equal(getattr(prompt, name)[:, :, there], getattr(context, name))
    np.testing.assert_array_equal(prompt.positions[:, there], context.positions)
    assert prompt.next_position == context.next_position
    assert prompt.bias is None or not prompt.bias[:, :, there].any()
    if not there.all():  # the context with as many slots, of which some hold nothing: sums in the same order
        context = KeyValues(prompt.keys, prompt.values, jnp.where(there, prompt.positions, EMPTY))
    found, expected = (distributions.log_probs(params, config, prefix, rows) for prefix in (prompt, context))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", slow_beside(PROMPT_KINDS, "key_value", "nested", "low_rank"))
def test_parameters_are_float32_and_all_of_them_matter(tiny_model, preamble, kind):
    params, config = tiny_model.params, tiny_model.config
    sigma = initial(tiny_model, preamble, kind, 4)
    assert PROMPT_KINDS[kind].prompt_length(sigma) == 4
    rows = make_rows([[8, 9]], [[11, 12]])

    def log_prob(sigma):
        total = 0.0
        for length in prompts.lengths(kind, sigma):
            own_kind, own = prompts.cut(kind, sigma, length)
            prefix = distributions.prompt_prefix(params, config, own, preamble, own_kind)
            total += distributions.log_probs(params, config, prefix, rows)[0, :, 11].sum()
        return total

    rates = PROMPT_KINDS[kind].rates(sigma, {})
    for leaf, gradient, rate in zip(
        *map(jax.tree.leaves, (sigma, jax.grad(log_prob)(sigma), rates)), strict=True
    ):
        assert leaf.dtype == gradient.dtype == rate.dtype == jnp.float32
        assert np.broadcast_shapes(leaf.shape, rate.shape) == leaf.shape
        np.testing.assert_array_equal(np.abs(gradient) > 0, np.broadcast_to(rate > 0, leaf.shape))


@kinds
def test_rates_are_relative_to_sigma(tiny_model, preamble, kind):
    sigma = initial(tiny_model, preamble, kind, 4)
    name = next(iter(sigma))
    ten_times = jax.tree.map(lambda leaf: 10.0 * leaf, sigma[name])
    one, larger = (PROMPT_KINDS[kind].rates({**sigma, name: p}, {})[name] for p in (sigma[name], ten_times))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(larger), strict=True):
        np.testing.assert_allclose(b, 10 * a, rtol=1e-5)


@kinds
def test_the_first_slot_can_be_kept(tiny_model, preamble, kind):
    """Half the rate is half as large a step; the slots of low rank share what moves."""
    sigma = initial(tiny_model, preamble, kind, 4)
    if kind == "low_rank":
        with pytest.raises(UserError, match="low_rank share their rows"):
            PROMPT_KINDS[kind].rates(sigma, {"first": 0.5})
        return
    name = next(iter(sigma))
    half = np.asarray(PROMPT_KINDS[kind].rates(sigma, {"first": 0.5})[name])
    if kind == "per_head":  # slots lie in one axis with layers and heads; all heads have four
        c = tiny_model.config
        half = half.reshape(c.layers, c.kv_heads, 4, 1)
        axis = 2
    else:
        axis = sigma[name].shape.index(4)
    np.testing.assert_allclose(np.take(half, 0, axis), 0.5 * np.take(half, 1, axis), rtol=1e-6)


def test_parts_of_keys_and_values_have_rates_of_their_own(tiny_model, preamble):
    sigma = initial(tiny_model, preamble, "key_value", 4)
    plain, changed = (PROMPT_KINDS["key_value"].rates(sigma, f) for f in ({}, {"keys": 0.0, "bias": 3.0}))
    assert not changed["keys"].any()
    np.testing.assert_array_equal(changed["values"], plain["values"])
    np.testing.assert_array_equal(changed["bias"], 3 * plain["bias"])


@kinds
def test_a_prompt_is_cut_to_one_that_was_drawn(tiny_model, preamble, kind):
    """The first slots alone are read as they were in training, and as they stood among the others."""
    params, config = tiny_model.params, tiny_model.config
    sigma = initial(tiny_model, preamble, kind, 6)
    random = np.random.RandomState(0)
    sigma = jax.tree.map(lambda a: a + random.normal(0, 0.1, a.shape) if a.ndim else a, sigma)
    keys = jax.random.split(jax.random.key(0), 300)
    many, lengths = jax.vmap(lambda key: prompts.drawn(kind, sigma, key))(keys), prompts.lengths(kind, sigma)
    index = np.asarray(many.get("drawn", np.zeros(len(keys), int)))
    assert lengths[-1] == 6
    assert set(index) == set(range(len(lengths)))
    for number in (0, len(lengths) - 1):
        expected = 1 if len(lengths) == 1 else nested.OFTEN
        assert np.mean(index == number) == pytest.approx(expected, abs=0.1)
    for number, length in enumerate(lengths):
        read = prompts.drawn(kind, sigma, keys[np.argmax(index == number)])
        masked = distributions.prompt_prefix(params, config, read, preamble, kind)
        own_kind, own = prompts.cut(kind, sigma, length)
        assert PROMPT_KINDS[own_kind].prompt_length(own) == length
        alone = distributions.prompt_prefix(params, config, own, preamble, own_kind)
        assert alone.next_position == masked.next_position
        np.testing.assert_allclose(
            distributions.log_probs(params, config, masked, ROWS),
            distributions.log_probs(params, config, alone, ROWS),
            atol=1e-5,
        )


def test_low_rank_starts_as_near_as_its_rank_allows(tiny_model, preamble):
    whole = initial(tiny_model, preamble, "key_value", 6, "match", ROWS)
    found = initial(tiny_model, preamble, "low_rank", 6, "match", ROWS, rank=2)
    for name in ("keys", "values"):
        matrices = np.asarray(whole[name], np.float64).reshape(len(whole[name]), 6, -1)
        product = np.einsum("lkr,lrgf->lkgf", found[name]["mix"], found[name]["rows"]).reshape(matrices.shape)
        left_out = np.linalg.svd(matrices, compute_uv=False)[:, 2:]
        np.testing.assert_allclose(
            np.sum((matrices - product) ** 2, axis=(1, 2)), np.sum(left_out**2, axis=1), rtol=1e-3
        )


def test_low_rank_is_smaller_or_refused(tiny_model, preamble):
    def entries(kind, length, rank=None):
        sigma = initial(tiny_model, preamble, kind, length, rank=rank)
        return sum(np.size(leaf) for leaf in jax.tree.leaves([sigma[name] for name in ("keys", "values")]))

    assert 0.3 < entries("low_rank", 6) / entries("key_value", 6) <= 0.5
    with pytest.raises(UserError, match=r"--rank 5 makes 6 slots .* no smaller; take at most \d") as refused:
        entries("low_rank", 6, 5)
    most = int(str(refused.value).rpartition(" ")[2].rstrip("."))
    assert entries("low_rank", 6, most) < entries("key_value", 6)
    with pytest.raises(UserError, match="no smaller"):
        entries("low_rank", 6, most + 1)


def test_only_what_is_there_can_be_cut(tiny_model, preamble):
    for kind, able in (("key_value", "only prompts of --kind nested"), ("nested", "read at 1, 2, 4 slots")):
        sigma = initial(tiny_model, preamble, kind, 4)
        assert prompts.cut(kind, sigma, 4)[0] == "key_value"
        for length in (0, 3, 8):
            said = f"{kind} has 4 slots and none of {length}; .*{able}"
            with pytest.raises(UserError, match=said):
                prompts.cut(kind, sigma, length)


def test_shorter_prompts_start_with_the_mass_of_all_slots(tiny_model, preamble):
    sigma = initial(tiny_model, preamble, "nested", 6, "match", ROWS)
    whole = np.exp(sigma["bias"][:, -1]).sum(axis=1)
    assert prompts.lengths("nested", sigma) == [1, 2, 4, 6]
    for index, length in enumerate([1, 2, 4, 6]):
        np.testing.assert_allclose(np.exp(sigma["bias"][:, index, :length]).sum(axis=1), whole, rtol=1e-5)


def test_prefixes_made_alike_are_read_as_before(tiny_model, preamble):
    """One program can read them: they have one size, and all or none have biases."""
    params, config = tiny_model.params, tiny_model.config
    kinds = {"embedding": 3, "per_head": 2, "key_value": 5}
    prefixes = [preamble]
    for kind, length in kinds.items():
        sigma = initial(tiny_model, preamble, kind, length)
        prefixes.append(distributions.prompt_prefix(params, config, sigma, preamble, kind))
    alike = KeyValues.alike(prefixes)
    assert len({str(jax.tree.map(np.shape, prefix)) for prefix in alike}) == 1
    for before, after in zip(prefixes, alike, strict=True):
        assert before.next_position == after.next_position
        np.testing.assert_allclose(
            distributions.log_probs(params, config, after, ROWS),
            distributions.log_probs(params, config, before, ROWS),
            atol=1e-5,
        )
    same = KeyValues.alike([preamble, preamble])[1]
    jax.tree.map(np.testing.assert_array_equal, same, preamble)


def test_queries_stand_where_they_stood_after_the_whole_context(tiny_model, preamble):
    sigma = initial(tiny_model, preamble, "key_value", 3)
    prompt = distributions.prompt_prefix(tiny_model.params, tiny_model.config, sigma, preamble, "key_value")
    assert prompt.next_position.tolist() == [2 + len(CONTEXT)]
    assert prompt.positions.tolist() == [[0, 1, 6, 7, 8]]  # right before them: in every sliding window


@pytest.fixture(scope="module")
def start(tiny_model):
    """The vectors that an initializer gives."""

    def vectors(name, length, seed=0, source=Source):
        vocabulary = tiny_model.config.vocab_size
        things = jax.random.key(seed), CONTEXT, length, (2, 2), tiny_model.embed, vocabulary
        unused: Any = None
        given = {"read": unused, "context": unused, "written": lambda ids: np.resize(ids, length)}
        return Start(name, source(*things, **given)).vectors()

    return vectors


def draws(start, name) -> bool:
    """Whether an initializer reads the random key."""
    read = []

    class Watched(Source):
        def __getattribute__(self, attribute):
            read.append(attribute)
            return super().__getattribute__(attribute)

    start(name, 4, source=Watched)
    return "key" in read


OF_VECTORS = [name for name, module in INITIALIZERS.items() if hasattr(module, "vectors")]


@pytest.mark.parametrize("name", OF_VECTORS)
def test_initializers_have_the_right_shape_and_follow_the_key(tiny_model, start, name):
    assert start(name, 4).shape == (4, tiny_model.config.width)
    np.testing.assert_array_equal(start(name, 4), start(name, 4))
    same = np.array_equal(start(name, 4), start(name, 4, seed=1))
    assert same != draws(start, name)


def test_initializers_are_what_they_say(tiny_model, start):
    assert draws(start, "vocabulary")
    assert draws(start, "noise")
    np.testing.assert_array_equal(start("first", 3), tiny_model.embed(CONTEXT[:3]))
    np.testing.assert_array_equal(start("spread", 3), tiny_model.embed(CONTEXT[[0, 3, 6]]))
    embeddings = np.asarray(tiny_model.params["embed_tokens"]["embedding"])
    for row in np.asarray(start("vocabulary", 5)):
        assert (embeddings == row).all(axis=1).any()
    noise, context = np.asarray(start("noise", 4000)), np.asarray(tiny_model.embed(CONTEXT))
    np.testing.assert_allclose(noise.mean(axis=0), context.mean(axis=0), atol=0.3)
    np.testing.assert_allclose(noise.std(axis=0), context.std(axis=0), rtol=0.1)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_every_start_gives_keys_and_values(tiny_model, preamble, name):
    sigma = initial(tiny_model, preamble, "key_value", 3, name, ROWS)
    c = tiny_model.config
    assert sigma["keys"].shape == sigma["values"].shape == (c.layers, 3, c.kv_heads, c.head_width)
    assert sigma["bias"].shape == (c.layers, 3, c.kv_heads)
    assert all(np.isfinite(leaf).all() for leaf in sigma.values())


def test_heads_may_have_slots_of_unequal_number(tiny_model, preamble):
    """As many in all as with an equal number, each where its head reads it, and the rest is not there."""
    sigma = initial(tiny_model, preamble, "per_head", 3, "match", ROWS)
    c = tiny_model.config
    assert sigma["keys"].shape == sigma["values"].shape == (3 * c.layers * c.kv_heads, c.head_width)
    there = np.asarray(sigma["bias"]) > ABSENT
    counts = there.sum(axis=1)
    assert counts.sum() == 3 * counts.size
    assert counts.min() >= 1
    assert len(np.unique(counts)) > 1
    prompt = distributions.prompt_prefix(tiny_model.params, c, sigma, preamble, "per_head")
    read = np.moveaxis(np.asarray(prompt.keys)[:, 0, 2:], 1, 2)[np.moveaxis(there, 1, 2)]
    np.testing.assert_array_equal(read, sigma["keys"])
    rates = PROMPT_KINDS["per_head"].rates(sigma, {"first": 0.0})
    firsts = np.cumsum([0, *counts.ravel()])[:-1]
    assert np.flatnonzero(rates["keys"][:, 0] == 0).tolist() == firsts.tolist()
    # In units of the layer: all its slots have one.
    layer = np.repeat(np.arange(c.layers), counts.sum(axis=1))
    for i in range(c.layers):
        own, keys = np.asarray(PROMPT_KINDS["per_head"].rates(sigma, {})["keys"]), np.asarray(sigma["keys"])
        np.testing.assert_allclose(own[layer == i], np.sqrt(np.mean(keys[layer == i] ** 2)), rtol=1e-5)


def test_random_text_is_what_the_model_writes(tiny_model, preamble, start):
    """Greedy but for the draws: a sharper model writes what is most probable after the first token."""
    head = jax.tree.map(lambda leaf: 1000 * leaf, tiny_model.params["lm_head"])
    model = dataclasses.replace(tiny_model, params={**tiny_model.params, "lm_head": head})
    found = initial(model, preamble, "embedding", 5, "random_text")["embeddings"]
    table = np.asarray(model.params["embed_tokens"]["embedding"], np.float32)
    ids = np.array([np.flatnonzero((table == row).all(axis=1))[0] for row in found])
    first = jax.random.randint(jax.random.key(0), (1,), 0, model.config.vocab_size)
    logits = model.logits(jnp.concatenate([first, ids])[None])[0]
    np.testing.assert_array_equal(np.argmax(logits[:-1], axis=-1), ids)
    assert not np.array_equal(found, initial(model, preamble, "embedding", 5, "vocabulary")["embeddings"])


def test_spread_takes_the_contexts_own_slots(tiny_model, preamble):
    sigma = initial(tiny_model, preamble, "key_value", 3, "spread")
    context = distributions.context_prefix(tiny_model.params, tiny_model.config, CONTEXT[None], preamble)
    np.testing.assert_allclose(sigma["keys"], context.keys[:, 0, [2, 5, 8]], rtol=1e-5, atol=1e-6)


def test_starts_that_cannot_be(tiny_model, preamble):
    with pytest.raises(
        UserError, match=r"--initial match starts prompts of keys and values.*; choose one of first, "
    ):
        initial(tiny_model, preamble, "embedding", 3, "match", ROWS)
    for rows in (None, ROWS.take(np.zeros(0, int))):
        with pytest.raises(UserError, match="match needs training queries"):
            initial(tiny_model, preamble, "key_value", 3, "match", rows)
