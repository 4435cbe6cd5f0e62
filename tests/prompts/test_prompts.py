"""The contract of the prompt kinds, over the whole table, and where prompts start."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsp import distributions
from jaxsp.data.examples import make_rows
from jaxsp.prompts import PROMPT_KINDS
from jaxsp.prompts.initializers import INITIALIZERS

CONTEXT = np.array([5, 9, 77, 30, 200, 14, 3])
kinds = pytest.mark.parametrize("kind", PROMPT_KINDS)


@pytest.fixture(scope="module")
def before(tiny_model):
    return distributions.context_prefix(tiny_model.params, tiny_model.config, np.array([[1, 50]]))


@kinds
def test_a_prompt_equal_to_the_context_is_the_context(tiny_model, before, kind):
    params, config = tiny_model.params, tiny_model.config
    sigma = PROMPT_KINDS[kind].initial(tiny_model.embed(CONTEXT))
    prompt = distributions.prompt_prefix(params, config, sigma, before, kind)
    context = distributions.context_prefix(params, config, CONTEXT[None], before)
    rows = make_rows([[8, 9], [10]], [[11, 12], [13, 2]])
    for a, b in zip(jax.tree.leaves(prompt), jax.tree.leaves(context), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        distributions.log_probs(params, config, prompt, rows),
        distributions.log_probs(params, config, context, rows),
    )


@kinds
def test_parameters_are_float32_and_all_of_them_matter(tiny_model, before, kind):
    params, config = tiny_model.params, tiny_model.config
    sigma = PROMPT_KINDS[kind].initial(tiny_model.embed(CONTEXT[:4]).astype(jnp.bfloat16))
    assert PROMPT_KINDS[kind].length(sigma) == 4
    rows = make_rows([[8, 9]], [[11, 12]])

    def log_prob(sigma):
        prefix = distributions.prompt_prefix(params, config, sigma, before, kind)
        return distributions.log_probs(params, config, prefix, rows)[0, :, 11].sum()

    for leaf, gradient in zip(
        jax.tree.leaves(sigma), jax.tree.leaves(jax.grad(log_prob)(sigma)), strict=True
    ):
        assert leaf.dtype == gradient.dtype == jnp.float32
        assert (np.abs(gradient) > 0).all()


@pytest.mark.parametrize("name", INITIALIZERS)
def test_initializers_have_the_right_shape_and_follow_the_key(tiny_model, name):
    def start(seed):
        return INITIALIZERS[name](
            jax.random.key(seed), CONTEXT, 4, tiny_model.embed, tiny_model.config.vocab_size
        )

    assert start(0).shape == (4, tiny_model.config.width)
    np.testing.assert_array_equal(start(0), start(0))
    assert (name in ("first", "spread")) == np.array_equal(start(0), start(1))


def test_initializers_are_what_they_say(tiny_model):
    def start(name, length):
        vocabulary = tiny_model.config.vocab_size
        return INITIALIZERS[name](jax.random.key(0), CONTEXT, length, tiny_model.embed, vocabulary)

    np.testing.assert_array_equal(start("first", 3), tiny_model.embed(CONTEXT[:3]))
    np.testing.assert_array_equal(start("spread", 3), tiny_model.embed(CONTEXT[[0, 3, 6]]))
    embeddings = np.asarray(tiny_model.params["embed_tokens"]["embedding"])
    for row in np.asarray(start("vocabulary", 5)):
        assert (embeddings == row).all(axis=1).any()
    noise, context = np.asarray(start("noise", 4000)), np.asarray(tiny_model.embed(CONTEXT))
    np.testing.assert_allclose(noise.mean(axis=0), context.mean(axis=0), atol=0.3)
    np.testing.assert_allclose(noise.std(axis=0), context.std(axis=0), rtol=0.1)
