"""Prompts saved in fewer bits: how near they stay, and that what is measured is what is saved."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxsp
from jaxsp.artifact import ARRAYS
from jaxsp.prompts import PROMPT_KINDS
from jaxsp.prompts.initializers import ABSENT
from jaxsp.prompts.storage import DTYPES, rounded
from tests.conftest import CONTEXT, QUERIES

SIGMA = {
    "keys": np.random.RandomState(0).standard_normal((2, 3, 1, 32)).astype(np.float32),
    "narrow": np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 4),
    "nothing": np.zeros((2, 16), np.float32),
    "context_length": np.float32(355),
}


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0), ("bfloat16", 2**-8), ("int8", 0.5 / 127)])
def test_rounding_is_bounded_and_single_numbers_are_kept(dtype, error):
    found = rounded(SIGMA, dtype)
    assert found.keys() == SIGMA.keys()
    for name, array in SIGMA.items():
        assert found[name].dtype == np.float32
        narrow = 2**-8 if dtype == "int8" and name == "narrow" else error
        largest = np.abs(array).max(axis=-1, keepdims=True) if array.ndim else 0
        assert (np.abs(found[name] - array) <= narrow * largest * (1 + 1e-5)).all(), name
    assert found["context_length"] == 355
    again = rounded(found, dtype)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, found)


def test_a_slot_that_is_not_there_costs_the_other_biases_nothing():
    """One far from all others in each row of as many heads as there may be."""
    bias = np.linspace(-2, 2, 2 * 3 * 32, dtype=np.float32).reshape(2, 3, 32)
    bias[:, :, 5] = ABSENT
    found = rounded({"bias": bias}, "int8")["bias"]
    np.testing.assert_allclose(found, bias, rtol=2**-8)


SAVED = [
    *(f"{kind}-int8" for kind in PROMPT_KINDS),
    "key_value-float32",
    "nested-bfloat16",
    "low_rank-bfloat16",
]


@pytest.mark.slow
@pytest.mark.parametrize("saved", SAVED)
def test_the_saved_prompt_is_the_one_that_was_measured(calm_model, tmp_path, saved):
    kind, dtype = saved.split("-")
    result = jaxsp.compress(
        calm_model, CONTEXT, QUERIES, out=tmp_path, kind=kind, artifact_dtype=dtype, prompt_length=8, steps=0,
        max_answer_tokens=4, progress=False,
    )  # fmt: skip
    loaded, stored = jaxsp.SoftPrompt.load(tmp_path), result.report["stored"]
    assert loaded.manifest["dtype"] == dtype
    jax.tree.map(np.testing.assert_array_equal, loaded.sigma, result.prompt.sigma)
    assert list(stored) == list(DTYPES)
    measured = result.report["held_out"]["brackets"]["prompt"]["kl"]
    assert stored[dtype]["kl"] == pytest.approx(measured, rel=1e-3, abs=1e-6)
    # The file's table of contents comes on top.
    assert 0 < (tmp_path / ARRAYS).stat().st_size - stored[dtype]["bytes"] < 2000
    assert stored["int8"]["bytes"] < stored["bfloat16"]["bytes"] < stored["float32"]["bytes"]


def test_an_unknown_dtype(calm_model):
    with pytest.raises(jaxsp.UserError, match="Unknown artifact dtype 'int4'; choose one of float32"):
        jaxsp.compress(calm_model, CONTEXT, QUERIES, artifact_dtype="int4")
