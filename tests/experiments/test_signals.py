"""experiments.signals: who is compared with whom, its table on made-up figures, and steps from the disk."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest

import jaxsp
from experiments import suite
from experiments.signals import disk, experiment
from experiments.signals.disk import DISK, MEMORY
from experiments.signals.experiment import DOCUMENTS, USUAL, VARIANTS
from experiments.suite import Run
from jaxsp.data.documents import as_queries
from jaxsp.progress import Display
from jaxsp.prompts import with_defaults
from jaxsp.settings import make_settings
from jaxsp.teacher.problem import read_preamble, run_teacher, tokenize
from jaxsp.teacher.store import Store
from tests.conftest import CONTEXT, QUERIES


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Compressions that were asked for; the second one is interrupted, once."""
    calls, stops = [], [1]

    def compress(model, context, queries, *, held_out, out, progress, **options):
        if len(calls) in stops:
            stops.clear()
            raise KeyboardInterrupt
        calls.append((model, options))
        (out / "run" / "teachers" / "key").mkdir(parents=True)
        (out / "run" / "teachers" / "key" / "hidden-0-00000.bin").write_bytes(bytes(1 << 20))
        figures = {
            "kl": 0.25, "decisive_agreement": 0.75, "sequence_mismatch": 0.5, "rouge_l": 1.0,
            "facts_right": 0.6,
        }  # fmt: skip
        brackets = {"prompt": figures, "full_context": {**figures, "facts_right": 0.8}}
        if "teacher" in options:
            brackets["own_context"] = {**figures, "kl": 0.5}
        report = {
            "context_tokens": 354, "prompt_length": 16, "steps": 30, "gap_closed": {"value": 0.9},
            "verdict": {"missed": ["one"]}, "seconds": {"total": 9.0},
            "held_out": {"queries": 10, "brackets": brackets},
        }  # fmt: skip
        lines = [{"step": 0}, *({"step": i, "seconds": float(i)} for i in (1, 2, 3))]
        return types.SimpleNamespace(report=report, lines=lines)

    def load_model(quantization="none"):
        config = types.SimpleNamespace(dtype="float32", quantization=quantization)
        return types.SimpleNamespace(name="tiny", config=config, encode_context=lambda text: [0] * 400)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "committed", lambda name: {})
    monkeypatch.setattr(jaxsp, "compress", compress)
    monkeypatch.setattr(jaxsp, "load_model", load_model)
    return calls


@pytest.mark.parametrize("setting", VARIANTS)
def test_each_document_is_compressed_both_ways_and_on_after_a_stop(asked, setting, tmp_path):
    run = Run(full=True, out=tmp_path)
    assert len(experiment.measure(setting, run)["rows"]) == 1
    rows = experiment.measure(setting, run)["rows"]
    wanted = [(name, variant) for name in DOCUMENTS[setting] for variant in VARIANTS[setting]]
    assert [(row["document"], row["variant"]) for row in rows] == wanted
    (usual, plain), (other, changed), *_ = asked
    assert plain["study"] == changed["study"] == "off"
    differences = {name for name in changed if changed[name] != plain.get(name)}
    assert differences == set(VARIANTS[setting][wanted[1][1]])
    quantization = "int8" if setting == "int8_student" else "none"
    assert usual.config.quantization == other.config.quantization == quantization
    if setting == "int8_student":
        assert changed["teacher"].config.quantization == "none"
    results = {setting: {"rows": rows}}
    line = "| 0.900 | 0.250 / – | 0.75 | 0.90 | 0.50 | 0.60 / 0.80 | 2.00 | 1.0 MiB |"
    assert f"| {USUAL} {line}" in experiment.table(results)
    assert ("0.250 / 0.500" in experiment.table(results)) == (setting == "int8_student")
    assert f"{USUAL}: gap closed 0.900" in experiment.result(results)


def test_steps_from_disk_are_those_from_memory(calm_model, tmp_path):
    """The same losses; what was read is mapped, and dropped after each step."""
    chosen = {"prompt_length": 2, "steps": 3, "evaluate_every": 3, "max_answer_tokens": 4, "batch_size": 4}
    settings = with_defaults(make_settings({**chosen, "initial": "first"}))
    job = tokenize(calm_model, CONTEXT, as_queries(QUERIES[:8]), as_queries(QUERIES[8:]), settings)
    asked = calm_model, job, settings.teacher, read_preamble(calm_model), Display(visible=False)
    problem = run_teacher(*asked, Store(tmp_path))
    files, forgotten = sorted(tmp_path.rglob("*.bin")), []
    forget = disk.forget

    def watched(maps, some):
        forgotten.append((len(maps), list(some)))
        forget(maps, some)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "forget", watched)
        rows = disk.in_turns(calm_model, problem, settings, 2, files)
    assert [(row["turn"], row["signals"]) for row in rows] == [(t, s) for t in (0, 1) for s in (MEMORY, DISK)]
    assert len({row["last_loss"] for row in rows}) == 1
    assert all(row["step_seconds"] > 0 for row in rows)
    assert forgotten == [(len(problem.train), files)] * 8  # before the first step, too
    assert [Path(file).suffix for file in files] == [".bin"]
    memory = disk.in_memory(problem.train).targets["hidden"]
    assert all(row.flags.owndata for row in memory.rows)
    np.testing.assert_array_equal(np.asarray(memory), np.asarray(problem.train.targets["hidden"]))


def test_the_speed_is_compared_turn_by_turn():
    seconds = {
        (0, MEMORY): 1.0,
        (0, DISK): 2.0,
        (1, MEMORY): 3.0,
        (1, DISK): 3.0,
        (2, MEMORY): 9.0,
        (2, DISK): 10.0,
    }
    rows = [
        {"turn": turn, "signals": name, "step_seconds": value, "faults": 8}
        for (turn, name), value in seconds.items()
    ]
    assert disk.speed(rows) == pytest.approx(0.9)
    table = experiment.table({"from_disk": {"rows": rows, "steps": 4, "bytes_a_step": 2048.0}})
    assert "| from disk | 3 | 3.000 | 2 |" in table
    assert "From disk at 90.0% of the speed from memory" in table
    assert "2 KiB a step" in table
