"""experiments.accelerator: rows are kept as they are measured, errors are rows, a CPU is no card."""

from __future__ import annotations

import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import suite
from experiments.accelerator import checks, experiment, parity, speed
from experiments.accelerator.checks import Check, Goal, NotRun, made
from experiments.suite import KeptRows, Run
from jaxsp.typing import UserError
from tests.goldens import make_logits


@pytest.fixture(autouse=True)
def one_commit(monkeypatch):
    """Git is not asked for each row."""
    monkeypatch.setattr(suite, "commit", lambda: "abcdef0")
    monkeypatch.setattr(checks, "commit", lambda: "abcdef0")


def kept(folder):
    return KeptRows("accelerator", "made", Run(full=True, out=folder), only=folder)


def check(name, measure, goal=None):
    return Check(name, f"what {name} is", "s", measure, goal)


def test_an_error_is_a_row_and_the_others_go_on(tmp_path):
    def broken():
        raise ValueError("no room")

    def missing():
        raise NotRun("torch is not installed")

    rows = made(
        [
            check("broken", broken, Goal(least=1)),
            check("missing", missing),
            check("fast", lambda: (2.0, {"tokens": 3}), Goal(least=1)),
            check("slow", lambda: 0.5, Goal(least=1)),
            check("nan", lambda: float("nan"), Goal(most=1)),
            check("free", lambda: 7.0),
        ],
        kept(tmp_path),
    )
    assert [row["status"] for row in rows] == ["error", "not run", "passed", "failed", "failed", "measured"]
    assert rows[0]["reason"] == "ValueError: no room"
    assert rows[1]["reason"] == "torch is not installed"
    assert rows[2]["more"] == {"tokens": 3}
    assert rows[2]["goal"] == "≥ 1"
    results = {"speed": {"card": "H", "rows": rows}}
    assert experiment.result(results) == "H: 1 of 3 goals met, 2 checks not run or in error"
    table = experiment.table(results)
    assert "| broken | what broken is | – | ≥ 1 | error: ValueError: no room | H |" in table
    assert "| fast | what fast is | 2 s | ≥ 1 | passed | H |" in table


def test_a_run_goes_on_from_the_rows_that_it_has(tmp_path):
    calls = []

    def measure(name, error=None):
        calls.append(name)
        if error:
            raise error
        return 1.0

    def run(error=None):
        wanted = [check("first", lambda: measure("first")), check("second", lambda: measure("second", error))]
        return [row["status"] for row in made(wanted, kept(tmp_path))]

    with pytest.raises(KeyboardInterrupt):
        run(KeyboardInterrupt())
    assert run(MemoryError()) == ["measured", "error"]
    assert run() == ["measured", "measured"]
    assert run() == ["measured", "measured"]
    assert calls == ["first", "second", "second", "second"]


def test_rows_of_another_card_or_commit_do_not_count(tmp_path, monkeypatch):
    wanted = [check("one", lambda: 1.0)]
    made(wanted, kept(tmp_path))
    for change in ({"card": lambda: "H200"}, {"commit": lambda: "1234567"}):
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setattr(checks, name, value)
                if name == "commit":
                    patch.setattr(suite, name, value)
            before = len(kept(tmp_path).rows)
            made(wanted, kept(tmp_path))
            assert len(kept(tmp_path).rows) == before + 2  # begun, and measured


def test_a_check_that_ends_the_process_is_not_begun_a_third_time(tmp_path):
    def killed():
        raise KeyboardInterrupt

    wanted = [check("killer", killed), check("after", lambda: 1.0)]
    for _ in range(checks.TRIES):
        with pytest.raises(KeyboardInterrupt):
            made(wanted, kept(tmp_path))
    rows = made(wanted, kept(tmp_path))
    assert [row["status"] for row in rows] == ["error", "measured"]
    assert rows[0]["reason"] == "the process ended in it 2 times"


def test_a_full_run_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(UserError, match="needs a GPU or a TPU, and jax finds only a CPU here"):
        experiment.measure("speed", Run(full=True, out=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_refusal_of_all_groups_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "experiments", "accelerator", "--full", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=suite.HERE.parent, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("needs a GPU or a TPU") == 1
    assert "Traceback" not in done.stderr


def test_rows_are_kept_where_the_results_go_or_beside_the_committed_ones(tmp_path):
    assert experiment.folder(Run(full=True, out=tmp_path)) == tmp_path
    assert experiment.folder(Run(full=True, out=suite.HERE / "accelerator")).name == "accelerator-out"


def test_the_stored_logits_are_those_of_the_text():
    assert parity.TEXT == make_logits.SMOLLM2_TEXT
    assert parity.VOCABULARY == make_logits.SMOLLM2_VOCABULARY
    assert "smollm2" in np.load(parity.GOLDENS)


def test_an_error_of_attention_is_seen():
    inputs = parity.attention_inputs(packed=True, full=False)
    whole = parity.written_out(inputs)
    assert parity.error(whole, whole) == 0
    assert parity.error(1.1 * whole, whole) == pytest.approx(0.1, abs=1e-3)


def test_a_backend_of_another_device_is_not_run(monkeypatch):
    monkeypatch.setattr(parity.device, "platform", lambda: "gpu")
    with pytest.raises(NotRun, match="splash is for a TPU, not a GPU"):
        parity.attention_error("splash", packed=False, full=False)


def test_the_rate_is_that_of_the_products(monkeypatch, tmp_path):
    bench = speed.Bench(Run(full=False, out=tmp_path))
    monkeypatch.setattr(speed, "seconds", lambda call, repeats, calls=1: 2e-6 if calls == 1 else 1.0)
    monkeypatch.setattr(speed, "our_jobs", lambda *_: dict.fromkeys(speed.JOBS, None))
    share, told = bench.ours("prompt gradient", of_rate=True)
    work, tokens = speed.flops(speed.SHAPES["tiny"], "prompt gradient")
    assert bench.own_rate() == pytest.approx(2 * 64**3 / 2e-6 / 1e12)
    assert share == pytest.approx(work / (2 * 64**3))
    assert told["tokens_per_second"] == pytest.approx(tokens / 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", experiment.GROUPS)
def test_a_small_run_measures_every_check(name, tmp_path):
    try:
        found = experiment.measure(name, Run(full=False, out=tmp_path))
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert {row["status"] for row in found["rows"]} <= {"passed", "measured", "not run"}
    assert any("value" in row for row in found["rows"]) or name == "peft"
