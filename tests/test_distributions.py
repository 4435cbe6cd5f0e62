"""A stranger's mistake is one sentence."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsp import distributions
from jaxsp.data.examples import make_rows
from jaxsp.models import decoder
from jaxsp.prompts import PROMPT_KINDS
from jaxsp.typing import UserError


def sigma_of(kind, config):
    """Zeros of the form that the kind asks for."""
    sizes = {
        "l": config.layers,
        "g": config.kv_heads,
        "f": config.head_width,
        "d": config.width,
        "k": 4,
        "r": 2,
    }
    sizes |= {"w": 16, "n": 4 * config.layers * config.kv_heads if kind == "per_head" else 3}
    sigma: dict = {}
    for name, axes in PROMPT_KINDS[kind].FORM.items():
        *outer, last = name.split(".")
        place = sigma.setdefault(outer[0], {}) if outer else sigma
        place[last] = jnp.zeros([sizes[axis] for axis in axes.split()])
    return sigma


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_the_form_of_each_kind_is_what_it_takes(kind, tiny_model):
    params, config = tiny_model.params, tiny_model.config
    preamble = distributions.context_prefix(params, config, np.array([[1, 2]]))
    sigma = sigma_of(kind, config)
    prefix = distributions.prompt_prefix(params, config, sigma, preamble, kind)
    assert prefix.keys.shape[:2] == (config.layers, 1)
    assert prefix.keys.shape[2] > 2
    name = next(iter(sigma))
    with pytest.raises(UserError, match=f"A prompt of kind {kind} is a mapping to .*; this one has "):
        distributions.prompt_prefix(
            params, config, {n: a for n, a in sigma.items() if n != name}, preamble, kind
        )
    shorter = jax.tree.map(lambda leaf: leaf[..., :-1], sigma[name])
    wrong = {**sigma, name: shorter}
    with pytest.raises(UserError, match=rf"A prompt of kind {kind} has .* \[.*\] with .*, not \["):
        distributions.prompt_prefix(params, config, wrong, preamble, kind)


def test_what_is_no_prompt(tiny_model):
    params, config = tiny_model.params, tiny_model.config
    preamble = decoder.empty_prefix(config)
    array = jnp.zeros((4, config.width))
    with pytest.raises(
        UserError, match=r"is a mapping to embeddings \[k, d\]; this one has a .*Array|Tracer"
    ):
        distributions.prompt_prefix(params, config, array, preamble, "embedding")
    with pytest.raises(
        UserError, match="Unknown kind of prompt 'embeddings'; choose one of per_head, key_value"
    ):
        distributions.prompt_prefix(params, config, {"embeddings": array}, preamble, "embeddings")


def test_a_start_that_there_is_not(tiny_model):
    params, config = tiny_model.params, tiny_model.config
    start = functools.partial(
        distributions.initial_prompt, params, config, preamble=decoder.empty_prefix(config),
        key=jax.random.key(0), prompt_length=2,
    )  # fmt: skip
    ids = np.array([5, 9, 7])
    with pytest.raises(UserError, match="Unknown kind of prompt 'vectors'; choose one of per_head"):
        start(ids, kind="vectors")
    with pytest.raises(UserError, match="Unknown initializer 'last'; choose one of first, spread"):
        start(ids, kind="embedding", initial="last")
    with pytest.raises(UserError, match=rf"must lie in \[0, {config.vocab_size}\), the vocabulary; got -3"):
        start(np.array([5, -3]), kind="embedding")


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_ids_that_are_not_of_the_vocabulary(tiny_model, wrong):
    params, config = tiny_model.params, tiny_model.config
    with pytest.raises(
        UserError, match=rf"must lie in \[0, {config.vocab_size}\), the vocabulary; got {wrong}"
    ):
        distributions.context_prefix(params, config, np.array([[1, wrong]]))
    prefix, rows = decoder.empty_prefix(config), make_rows([[5]], [[3, 2]])
    rows.tokens[0, 0] = wrong
    with pytest.raises(UserError, match=f"got {wrong}"):
        distributions.answer_hidden(params, config, prefix, rows)
