"""The contract of every entry of ``EXPORTS``."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxsp
from jaxsp.export import EXPORTS
from tests.conftest import CONTEXT, QUERIES


@pytest.mark.parametrize("name", EXPORTS)
def test_writes_the_same_again_and_leaves_the_prompt_alone(name, calm_model, tmp_path):
    prompt = jaxsp.compress(calm_model, CONTEXT, QUERIES, prompt_length=2, steps=1, progress=False).prompt
    before = jax.tree.map(np.copy, prompt.sigma)
    written = []
    for out in (tmp_path / "first", tmp_path / "second"):
        EXPORTS[name](prompt, calm_model, out)
        files = [out] if out.is_file() else sorted(file for file in out.rglob("*") if file.is_file())
        written.append([file.read_bytes() for file in files])
    assert written[0]
    assert written[0] == written[1]
    jax.tree.map(np.testing.assert_array_equal, prompt.sigma, before)
