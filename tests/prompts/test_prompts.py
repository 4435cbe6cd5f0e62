"""The contract of the prompt kinds, over the whole table, and where prompts start."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsp import distributions
from jaxsp.data.examples import make_rows
from jaxsp.prompts import PROMPT_KINDS
from jaxsp.prompts.initializers import INITIALIZERS, Source

CONTEXT = np.array([5, 9, 77, 30, 200, 14, 3])
kinds = pytest.mark.parametrize("kind", PROMPT_KINDS)


@pytest.fixture(scope="module")
def preamble(tiny_model):
    return distributions.context_prefix(tiny_model.params, tiny_model.config, np.array([[1, 50]]))


def initial(model, preamble, kind, length):
    return distributions.initial_prompt(
        model.params, model.config, CONTEXT, preamble, key=jax.random.key(0), prompt_length=length, kind=kind
    )


@kinds
def test_a_prompt_equal_to_the_context_is_the_context(tiny_model, preamble, kind):
    params, config = tiny_model.params, tiny_model.config
    sigma = initial(tiny_model, preamble, kind, len(CONTEXT))
    prompt = distributions.prompt_prefix(params, config, sigma, preamble, kind)
    context = distributions.context_prefix(params, config, CONTEXT[None], preamble)
    rows = make_rows([[8, 9], [10]], [[11, 12], [13, 2]])
    for a, b in zip(jax.tree.leaves(prompt), jax.tree.leaves(context), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        distributions.log_probs(params, config, prompt, rows),
        distributions.log_probs(params, config, context, rows),
    )


@kinds
def test_parameters_are_float32_and_all_of_them_matter(tiny_model, preamble, kind):
    params, config = tiny_model.params, tiny_model.config
    sigma = initial(tiny_model, preamble, kind, 4)
    assert PROMPT_KINDS[kind].prompt_length(sigma) == 4
    rows = make_rows([[8, 9]], [[11, 12]])

    def log_prob(sigma):
        prefix = distributions.prompt_prefix(params, config, sigma, preamble, kind)
        return distributions.log_probs(params, config, prefix, rows)[0, :, 11].sum()

    for leaf, gradient in zip(
        jax.tree.leaves(sigma), jax.tree.leaves(jax.grad(log_prob)(sigma)), strict=True
    ):
        assert leaf.dtype == gradient.dtype == jnp.float32
        assert (np.abs(gradient) > 0).all()


@pytest.fixture(scope="module")
def start(tiny_model):
    """The vectors that an initializer gives."""

    def vectors(name, length, seed=0, source=Source):
        vocabulary = tiny_model.config.vocab_size
        return INITIALIZERS[name](source(jax.random.key(seed), CONTEXT, length, tiny_model.embed, vocabulary))

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


@pytest.mark.parametrize("name", INITIALIZERS)
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
