"""The invariants on the real, embedded model, and the demo: how good it is."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import jaxsp
from jaxsp import demo, distributions
from jaxsp.data.examples import make_rows
from jaxsp.data.packing import Packing
from jaxsp.evaluation.metrics import at_positions
from jaxsp.models import decoder, load
from jaxsp.prompts import PROMPT_KINDS, per_head
from jaxsp.teacher import targets
from tests.conftest import CONTEXT

HOLD_ALL = [kind for kind in PROMPT_KINDS if kind != "low_rank"]

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_equal_to_the_context_gives_kl_zero(dtype):
    """Each kind that can hold all of it, in slots of one number: sums have one order."""
    model = jaxsp.load_model("smollm2-135m-instruct", dtype=dtype)
    assert model.tokenizer is not None
    ids = np.array(model.tokenizer(CONTEXT).input_ids)
    nothing = decoder.empty_prefix(model.config)
    before = decoder.empty_prefix(model.config, (per_head.WIDEST - 1) * len(ids))
    context = distributions.context_prefix(model.params, model.config, ids[None], before)
    rows = make_rows([[504, 3575], [282]], [[4649, 314, 2], [504, 2]])
    packing = Packing(2, 8)
    rows = rows.with_targets(hidden=targets.compute(model, context, rows, packing, "hidden"))
    for kind in HOLD_ALL:
        sigma = distributions.initial_prompt(
            model.params, model.config, ids, nothing,
            key=jax.random.key(0), prompt_length=len(ids),
            initial="first", kind=kind,
        )  # fmt: skip
        other = jax.tree.map(lambda array: array + 0.05, sigma)
        preamble = nothing if kind == "per_head" else before  # it has slots that are not there itself
        equal, different = (
            at_positions(
                model,
                distributions.prompt_prefix(model.params, model.config, own, preamble, kind),
                rows, packing, ("kl", "zero_one"),
            )
            for own in (sigma, other)
        )  # fmt: skip
        assert np.abs(equal["kl"]).max() < 1e-5, kind
        assert (equal["zero_one"] == 0).all(), kind
        assert different["kl"].max() > 1e-2, kind  # the test can fail


@pytest.mark.slow
def test_bfloat16_keeps_the_residual_stream_in_float32(smollm2):
    """Last hidden states within 1% of float32's; with a rounded stream it would be 1.3%."""

    def states(model):
        ids = np.array([model.tokenizer.encode(3 * CONTEXT)])
        positions = np.arange(ids.shape[1])[None]
        found, _ = decoder.hidden(model.params, model.config, model.embed(ids), positions)
        return np.asarray(found, np.float64)

    exact = states(smollm2)
    off = states(jaxsp.load_model("smollm2-135m-instruct", dtype="bfloat16")) - exact
    assert np.median(np.linalg.norm(off, axis=-1) / np.linalg.norm(exact, axis=-1)) < 0.01


@pytest.mark.slow
def test_the_demo_shows_what_it_promises(smollm2, jaxsp_command, tmp_path, monkeypatch):
    """In a few of its steps, with a few of its questions already; and it leaves the weights bit-identical."""
    weights = jax.tree.map(np.array, smollm2.params)
    monkeypatch.setattr(load, "load_model", lambda *_, **__: smollm2)
    context, queries, held_out = demo.read()
    assert len(held_out) == 10
    assert len(queries) >= 40
    monkeypatch.setattr(demo, "read", lambda: (context, queries[::4], held_out[::2]))
    monkeypatch.chdir(tmp_path)
    code, out, err = jaxsp_command("demo", "--steps", 4)
    assert code == 0, err
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), smollm2.params, weights)
    assert all(jax.tree.leaves(same))
    report = json.loads((tmp_path / "jaxsp-demo" / "report.json").read_text())
    brackets = report["held_out"]["brackets"]
    assert report["prompt_length"] == 16
    assert 300 <= report["context_tokens"] <= 500
    assert report["train"]["queries"] == len(queries[::4])
    assert report["held_out"]["queries"] == len(held_out[::2])
    assert report["gap_closed"]["value"] >= 0.85
    assert brackets["prompt"]["kl"] < brackets["truncated_context"]["kl"]
    assert brackets["full_context"]["kl"] == pytest.approx(0, abs=1e-6)
    assert "full context" in out
    assert "no context" in out
    assert "report.md" in out
