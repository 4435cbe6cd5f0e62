"""Killed at any moment, a run goes on and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.conftest import CONTEXT, QUERIES

STEPS = 400


@pytest.fixture
def command(tmp_path, tiny_directory, job):
    def arguments(out: Path, *more: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "jaxsp",
            "compress",
            str(job["context"]),
            "--queries",
            str(job["queries"]),
            "--model",
            str(tiny_directory),
            "--dtype",
            "float32",
            "--out",
            str(out),
            "--prompt-length",
            "4",
            "--steps",
            str(STEPS),
            "--batch-size",
            "4",
            "--max-answer-tokens",
            "6",
            "--evaluate-every",
            "7",
            "--checkpoint-every",
            "5",
            *more,
        ]

    return arguments


def steps_done(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") - 1 if file.exists() else 0


def stop_after(arguments: list[str], out: Path, steps: int, how: signal.Signals):
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while steps_done(out) < steps and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert steps <= steps_done(out) < STEPS, err
    return process.returncode, err


def test_killed_and_resumed_equals_uninterrupted(command, tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    subprocess.run(command(whole), check=True, capture_output=True)
    stop_after(command(pieces), pieces, 12, signal.SIGKILL)
    stop_after(command(pieces, "--resume"), pieces, 123, signal.SIGKILL)
    code, err = stop_after(command(pieces, "--resume"), pieces, 250, signal.SIGINT)
    assert code == 130
    assert "Interrupted after step" in err
    assert "--resume" in err
    subprocess.run(command(pieces, "--resume"), check=True, capture_output=True)

    def sigma(out):
        return load_file(out / "prompt.safetensors")["embeddings"]

    assert (sigma(whole) == sigma(pieces)).all()
    texts = [(d / "metrics.jsonl").read_text().splitlines() for d in (whole, pieces)]
    lines = [[json.loads(line) for line in text] for text in texts]
    assert [line["step"] for line in lines[1]] == list(range(STEPS + 1))
    for a, b in zip(*lines, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_killed_before_the_first_checkpoint(command, tmp_path):
    """Only the settings are there yet: resuming starts from the beginning."""
    out = tmp_path / "out"
    process = subprocess.Popen(command(out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (out / "run" / "settings.json").exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    short = [*command(out, "--resume")]
    subprocess.run(short, check=True, capture_output=True)
    assert steps_done(out) == STEPS


def test_pmap_compresses_like_jit(calm_model):
    import jaxsp

    def gap(parallel):
        return jaxsp.compress(
            calm_model,
            CONTEXT,
            QUERIES,
            prompt_length=4,
            steps=5,
            batch_size=8,
            max_answer_tokens=6,
            parallel=parallel,
            progress=False,
        ).report["gap_closed"]["value"]

    assert gap("pmap") == pytest.approx(gap("jit"), abs=1e-5)
    assert os.environ["XLA_FLAGS"].endswith("8")
