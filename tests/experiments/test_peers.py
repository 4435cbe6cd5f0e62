"""The parts of experiments/peers that need no torch: jaxsp's side, and what is made of the turns."""

import sys
from pathlib import Path

import pytest

from experiments.peers import jaxsp_side
from experiments.peers.experiment import check_torch, compared, curve, training_row
from experiments.peers.job import Job
from jaxsp.typing import UserError


def turns(setup, seconds, kls):
    """As a side with turns of two steps gives them; warm, its set-up takes 1 s."""
    steps = [{"loss": 1.0, "seconds": second} for second in seconds]
    first = {"setup": setup, "setup_warm": 1.0, "kl": kls[0], "peak_mib": 1.0}
    pairs = [steps[i : i + 2] for i in range(0, len(steps), 2)]
    others = zip(pairs, kls[1:], strict=True)
    return [first, *({"steps": pair, "kl": kl, "peak_mib": 2.0} for pair, kl in others)]


def test_curve_counts_compilation_apart():
    points = curve(turns(3.0, [5.0, 1.0, 1.0, 1.0], [2.0, 1.0, 0.5]))
    assert [p["step"] for p in points] == [0, 2, 4]
    assert [p["kl"] for p in points] == [2.0, 1.0, 0.5]
    assert [p["seconds"] for p in points] == [3.0, 9.0, 11.0]
    assert [p["seconds_warm"] for p in points] == [1.0, 3.0, 5.0]


def test_rows_say_how_soon_ours_reached_the_peers_last_kl():
    sides = {
        "jaxsp": turns(3.0, [5.0, 1.0, 1.0, 1.0], [2.0, 1.0, 0.5]),
        "jaxsp, vectors": turns(3.0, [5.0, 1.0, 1.0, 1.0], [2.0, 1.5, 1.1]),
        "jaxsp, template too": turns(3.0, [5.0, 1.0, 1.0, 1.0], [2.0, 1.5, 1.0]),
        "jaxsp, adam": turns(3.0, [5.0, 1.0, 1.0, 1.0], [2.0, 1.5, 1.2]),
        "cartridge, cached": turns(2.0, [10.0] * 4, [2.0, 0.9, 1.0]),
        "cartridge, online": turns(0.0, [20.0] * 2, [2.0, 1.1]),
    }
    rows = [training_row(name, messages, steps=4) for name, messages in sides.items()]
    ours, _, _, _, cached, online = compared(rows)
    assert "reached" not in ours
    assert (cached["seconds"], cached["final_kl"]) == (42.0, 1.0)
    assert cached["reached"]["jaxsp"]["step"] == 2
    assert cached["reached"]["jaxsp"]["faster"] == 42.0 / 9.0
    assert cached["reached"]["jaxsp"]["faster_warm"] == 41.0 / 3.0
    assert cached["reached"]["jaxsp, template too"]["step"] == 4
    assert cached["reached"]["jaxsp, adam"] is None
    assert (online["seconds"], online["final_kl"], online["steps_measured"]) == (80.0, 1.0, 2)


def test_a_python_that_cannot_play_the_peers_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere can't be run"):
        check_torch("nowhere")
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho \"['torch', 'peft']\"\n")
    script.chmod(0o755)
    with pytest.raises(UserError, match="has no torch and no peft; pass --torch-python"):
        check_torch(str(script))


@pytest.fixture
def tiny_job(tiny_directory: Path, tmp_path: Path) -> Job:
    job = Job(
        model=str(tiny_directory),
        dtype="float32",
        preamble=[1, 2],
        context=list(range(3, 23)),
        queries=[[30 + i, 4, 5] for i in range(6)],
        answers=[[40 + i, 7, 2] for i in range(6)],
        train=4,
        prompt_length=4,
        steps=4,
        evaluate_every=2,
        batches=[],
        stop_ids=[2],
        max_answer_tokens=4,
    )
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job
    return job


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["jaxsp", "jaxsp, template too", "jaxsp, adam"])
def test_jaxsp_waits_after_every_evaluation(tiny_job: Job, monkeypatch, variant: str):
    messages = []
    monkeypatch.setattr(jaxsp_side, "end_turn", lambda **result: messages.append(result))
    jaxsp_side.VARIANTS[variant](tiny_job)
    first, *others = messages
    assert [len(turn["steps"]) for turn in others] == [2, 2]
    assert all(step["seconds"] > 0 for turn in others for step in turn["steps"])
    assert others[-1]["kl"] < first["kl"]
    assert all(first[name] > 0 for name in ("setup", "setup_warm", "no_context_kl"))


@pytest.mark.slow
def test_jaxsp_answers_every_query_in_each_turn(tiny_job: Job, monkeypatch):
    messages = []

    def end_turn(**result):
        messages.append(result)
        if len(messages) == 3:
            sys.exit()

    monkeypatch.setattr(jaxsp_side, "end_turn", end_turn)
    with pytest.raises(SystemExit):
        jaxsp_side.VARIANTS["answers"](tiny_job)
    first, second = (turn["answers"] for turn in messages[1:])
    assert first == second
    assert len(first) == 6
