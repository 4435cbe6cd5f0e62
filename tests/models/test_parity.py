"""Every family against Hugging Face: live where torch is installed, against stored goldens elsewhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsp
from jaxsp.models import decoder
from jaxsp.models.families import FAMILIES
from jaxsp.typing import KeyValues
from tests import tiny
from tests.conftest import slow_beside
from tests.goldens import make_logits
from tests.goldens.make_logits import CASES, IDS, PREFIX, WEIGHTS

GOLDENS = Path(__file__).parents[1] / "goldens" / "logits.npz"
TOWN = Path(__file__).parents[2] / "experiments" / "documents" / "town" / "context.md"
_FAMILY_OF = {case: changes.get("model_type", "llama") for case, changes in CASES.items()}
# A family's cases beyond its first.
VARIANTS = set(CASES) - {*{family: case for case, family in reversed(_FAMILY_OF.items())}.values()}
HAS_TORCH = importlib.util.find_spec("torch") is not None


def our_prefix(config) -> tuple[np.ndarray, np.ndarray]:
    return make_logits.random_prefix(config.layers, config.kv_heads, config.head_width)


def our_answers(directory: Path) -> dict[str, np.ndarray]:
    """The same quantities as ``make_logits.torch_answers``, in one compiled function."""
    model = jaxsp.load_model(directory, dtype="float32", tokenizer=None)
    params, config = model.params, model.config
    where = jnp.arange(IDS.shape[1])[None]

    def total(first, keys, values):
        """After the same tokens as vectors and after random keys and values: one row each."""
        read = decoder.prefill(params, config, first[None])
        prefix = KeyValues(
            jnp.stack([read.keys[:, 0], keys], axis=1),
            jnp.stack([read.values[:, 0], values], axis=1),
            where[[0, 0], :PREFIX],
        )
        inputs = decoder.embed(params, config, IDS[[0, 0], PREFIX:])
        states, _ = decoder.hidden(params, config, inputs, where[[0, 0], PREFIX:], (prefix,))
        by_vectors, by_keys = decoder.unembed(params, config, states)
        return ((by_vectors + by_keys) * WEIGHTS).sum(), (by_vectors, by_keys)

    first = decoder.embed(params, config, IDS[:, :PREFIX])[0]
    gradients, (by_vectors, by_keys) = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(
        first, *our_prefix(config)
    )
    whole = np.array(model.logits(IDS)[0])
    tolerance = 1e-5 * np.ptp(whole)
    np.testing.assert_allclose(by_vectors, whole[PREFIX:], atol=tolerance, rtol=0)
    names = ("embeddings_gradient", "keys_gradient", "values_gradient")
    return {"logits": whole, "prefix_logits": by_keys, **dict(zip(names, gradients, strict=True))}


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], relative: float):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        tolerance = relative * np.ptp(expected)
        np.testing.assert_allclose(ours[name], expected, atol=tolerance, rtol=0, err_msg=name)


def test_every_family_has_a_case():
    assert set(_FAMILY_OF.values()) == set(FAMILIES)


@pytest.mark.parametrize("case", slow_beside(CASES, *VARIANTS, *tiny.ORDINARY))
def test_as_hugging_face(case, tmp_path):
    tiny.write(tmp_path, with_tokenizer=False, **CASES[case])
    ours, stored = our_answers(tmp_path), np.load(GOLDENS)
    theirs = {name.split("/")[1]: stored[name] for name in stored if name.startswith(f"{case}/")}
    assert theirs, "no golden yet: run python -m tests.goldens.make_logits"
    assert_same(make_logits.sample(ours), theirs, 1e-5)
    if HAS_TORCH:
        config = jaxsp.load_model(tmp_path, tokenizer=None).config
        live = make_logits.torch_answers(tmp_path, our_prefix(config))
        assert_same(ours, live, 1e-5)
        assert_same(make_logits.sample(live), theirs, 1e-6)  # the goldens are of this torch


def test_embedded_model_stored_goldens(smollm2):
    ids = smollm2.tokenizer(make_logits.SMOLLM2_TEXT).input_ids
    logits = np.asarray(smollm2.logits(ids))[:, make_logits.SMOLLM2_VOCABULARY]
    np.testing.assert_allclose(logits, np.load(GOLDENS)["smollm2"], atol=1e-4, rtol=0)


@pytest.mark.skipif(not HAS_TORCH, reason="torch is in the optional group `torch`")
@pytest.mark.torch
@pytest.mark.slow
def test_embedded_model_live(smollm2):
    """A short text within 1e-4; 500 tokens, where more sums may differ, within 1e-5 of the range."""
    for text, length, relative in ((make_logits.SMOLLM2_TEXT, None, 0), (TOWN.read_text(), 500, 1e-5)):
        ids = np.array([smollm2.tokenizer(text).input_ids[:length]])
        theirs = make_logits.torch_logits(smollm2.directory, ids)
        tolerance = max(1e-4, relative * np.ptp(theirs))
        np.testing.assert_allclose(smollm2.logits(ids), theirs, atol=tolerance, rtol=0)
