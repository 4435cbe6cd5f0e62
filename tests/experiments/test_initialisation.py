"""experiments.initialisation: its grid, its table on made-up rows, and going on after a stop."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import suite
from experiments.initialisation import experiment, variants
from experiments.initialisation.cell import Cell
from experiments.suite import Run
from jaxsp import prompts
from jaxsp.prompts import PROMPT_KINDS, key_value
from jaxsp.prompts.initializers import INITIALIZERS
from jaxsp.typing import EMPTY, KeyValues

FIGURES = {"train_kl": 0.1, "held_out_kl": 0.5, "train_kl_no_context": 2.0, "held_out_kl_no_context": 2.0}
FIGURES |= {"held_out_decisive": 0.75, "captured": 0.5, "start_seconds": 1.0, "step_seconds": 0.5}


@pytest.mark.parametrize("setting", experiment.SETTINGS)
def test_every_cell_is_there_once_and_can_be_started(setting, monkeypatch):
    monkeypatch.setattr(variants, "PROMPT_KINDS", dict(PROMPT_KINDS))
    variants.register()
    cells = experiment.cells(setting)
    assert len(set(cells)) == len(cells) > 1
    for cell in cells:
        assert cell.initial in INITIALIZERS
        assert cell.kind in variants.PROMPT_KINDS
        assert cell.kind != "embedding" or hasattr(INITIALIZERS[cell.initial], "vectors")
        assert (cell.learning_rate is None) == (cell.steps == 0)


def test_a_mean_over_documents_with_its_interval():
    cell = Cell("key_value", "match", 16, 100, 0.02)
    rows = [
        {**FIGURES, **dataclasses.asdict(cell), "document": f"d{i}", "held_out_kl": 0.2 * i}
        for i in (1, 2, 3)
    ]
    results = {"100_steps": {"rows": rows}}
    assert "| key_value, match | 16 | 100 | 3 | 0.800 (0.7" in experiment.table(results)
    assert "100 steps: key_value 0.80" in experiment.result(results)


def test_it_goes_on_after_a_stop(tmp_path, monkeypatch):
    asked = []

    class Document:
        def __init__(self, model, name, folder, *, small):
            self.name = name

        def measure(self, cell):
            if len(asked) == 3:
                asked.append(None)
                raise KeyboardInterrupt
            asked.append((self.name, cell))
            return {**FIGURES, **dataclasses.asdict(cell)}

    model = SimpleNamespace(name="tiny", config=SimpleNamespace(dtype="float32"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "Document", Document)
    monkeypatch.setattr(experiment, "embedded", lambda: model)
    monkeypatch.setattr(suite, "committed", lambda name: {})
    some = experiment.measure("learning_rates", Run(full=True, out=tmp_path))["rows"]
    assert len(some) == 3
    (tmp_path / "initialisation-out/learning_rates.jsonl").unlink()  # they may be committed by now
    monkeypatch.setattr(suite, "committed", lambda name: {"learning_rates": {"rows": some}})
    found = experiment.measure("learning_rates", Run(full=True, out=tmp_path))
    wanted = [(name, cell) for name in experiment.TUNED_ON for cell in experiment.cells("learning_rates")]
    assert [pair for pair in asked if pair] == wanted  # each once
    assert [(row["document"], experiment.cell_of(row)) for row in found["rows"]] == wanted


def test_slots_left_out_are_read_by_no_query(monkeypatch):
    monkeypatch.setitem(PROMPT_KINDS, "slots_left_out", key_value)  # taken out again afterwards
    monkeypatch.setattr(variants, "LEFT_OUT", 1.0)
    variants.register()
    sizes = {"l": 2, "g": 1, "f": 4}
    sigma = {"keys": jnp.ones((2, 3, 1, 4)), "values": jnp.ones((2, 3, 1, 4)), "bias": jnp.zeros((2, 3, 1))}
    sigma["context_length"] = jnp.asarray(9)
    drawn = prompts.drawn("slots_left_out", sigma, jax.random.key(0))
    kind = prompts.checked_kind("slots_left_out", drawn, sizes)
    empty = jnp.zeros((2, 1, 0, 1, 4))
    nothing = KeyValues(empty, empty, jnp.zeros((1, 0), jnp.int32))
    positions_K = kind.prefix(drawn, nothing, lambda vectors, prefix: prefix).positions[0, -3:]
    there = np.asarray(positions_K) != EMPTY
    np.testing.assert_array_equal(there, [False, False, True])


def test_decay_pulls_back_to_the_start():
    start = {"keys": jnp.full((2, 3, 1, 4), 2.0), "bias": jnp.zeros((2, 3, 1))}
    moved = {"keys": start["keys"] + 1.0, "bias": start["bias"] - 1.0}
    still = {name: jnp.zeros_like(leaf) for name, leaf in start.items()}
    decay: Any = variants.towards_start(0.5)
    change, state = decay.update(still, decay.init(start), moved)
    np.testing.assert_allclose(change["keys"], -0.25)  # in units of the entries' size
    np.testing.assert_allclose(change["bias"], 0.5)
    np.testing.assert_array_equal(state["keys"], start["keys"])
