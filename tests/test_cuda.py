"""Every program of a compression has a form for CUDA, with chunked attention. Nothing is compiled or run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from tests.tpu_programs import PROGRAMS, array

QUICK = ("prefill", "answers", "update of per_head", "loss js")
"""A program of each kind; the others are lowered by the slow tests."""


def lowered(traced: jax.stages.Traced) -> str:
    """The program for CUDA; an operation that has no form there is an error."""
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PROGRAMS]
)
def test_a_program_is_lowered_for_cuda(name):
    text = lowered(PROGRAMS[name]().trace())
    assert "func.func public @main" in text
    assert "tpu_custom_call" not in text
    assert "cudnn" not in text


def test_the_call_of_cudnn_is_not_lowered_without_the_library():
    """So it is left out above, and proven on a card alone (``experiments/accelerator``)."""
    q = array(2, 16, 4, 64, dtype=jnp.bfloat16)
    attend = jax.jit(lambda q: jax.nn.dot_product_attention(q, q, q, implementation="cudnn"))
    with pytest.raises(RuntimeError, match="cuDNN"):
        lowered(attend.trace(q))
