"""Two processes on this machine: equal to one, agreeing, and not waiting for ever."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

import jaxsp
from jaxsp import compile_cache
from tests.conftest import CONTEXT, QUERIES, assert_same_sigma

STEPS = 12


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


# A start that is solved for amplifies rounding, which differs with the number of devices in a process.
SETTINGS: dict[str, Any] = {
    "prompt_length": 4, "steps": STEPS, "max_answer_tokens": 6, "initial": "first", "study": "off",
}  # fmt: skip


@pytest.fixture
def start(calm_directory, job):
    """Starts a process of a run, with four fake devices of its own."""
    started = []
    one = ("compress", job["context"], "--queries", job["queries"], "--checkpoint-every", 1)

    def run(out: Path, *more: str, own: int = 4, command=one, **changed) -> subprocess.Popen[str]:
        settings = {
            "model": calm_directory, "dtype": "float32", "out": out, "parallel": "mesh",
            **SETTINGS, **changed,
        }  # fmt: skip
        options = [part for name, value in settings.items() for part in (f"--{name}", value)]
        environment = os.environ | {
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={own}"),
            # Several processes keep no programs by themselves.
            "JAX_COMPILATION_CACHE_DIR": str(compile_cache.cache_folder() / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(compile_cache.MIN_SECONDS),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxsp", *map(str, (*command, *options)), *more],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def two(start, out, *more, **other):
    """Both processes of a run; ``other`` is what process 1 is told besides."""
    together = ("--coordinator", free_address(), "--num-processes", "2")
    also = other.pop("also", ())
    return [
        start(out, *together, "--process-id", str(i), *more, *(also if i else ()), **other) for i in (0, 1)
    ]


def killed_after(steps, processes, folder, victim):
    """Kills one of two after some steps; the other ends within a minute, with a sentence."""
    while steps_done(folder) < steps and processes[0].poll() is None:
        time.sleep(0.005)
    processes[victim].kill()
    begun = time.monotonic()
    code, _, err = finished([processes[1 - victim]])[0]
    assert time.monotonic() - begun < 60
    assert code not in (0, None)
    assert re.search("jaxsp: .* process of th(e|is) run is gone.* with --resume", err)
    assert steps <= steps_done(folder) < STEPS


def finished(processes):
    told = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, told, strict=True)]


def sigma(out):
    return jaxsp.SoftPrompt.load(out).sigma


def steps_done(out):
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") - 1 if file.exists() else 0


@pytest.mark.slow
def test_two_processes_are_one_whoever_dies(start, calm_model, tmp_path):
    """One of two is killed; a single process goes on where they stopped, and so do two; on own answers."""
    out, by_one = tmp_path / "out", tmp_path / "by-one"
    policy: dict[str, Any] = {"on_policy": 0.5, "on_policy_every": 5}
    settings = {**SETTINGS, **policy, "parallel": "mesh", "progress": False}
    expected = jaxsp.compress(calm_model, CONTEXT, QUERIES, **settings)
    ours = expected.prompt.sigma
    kl = expected.report["held_out"]["brackets"]["prompt"]["kl"]

    killed_after(2, two(start, out, **policy), out, victim=1)
    shutil.copytree(out, by_one)
    alone = jaxsp.compress(
        calm_model, CONTEXT, QUERIES, out=by_one, resume=True, checkpoint_every=1, **settings
    )
    assert_same_sigma(alone.prompt.sigma, ours, within=1e-5)

    results = finished(two(start, out, "--resume", "--mesh", "data=4,model=2", **policy))
    assert [code for code, *_ in results] == [0, 0], results
    assert ["Report: " in shown for _, shown, _ in results] == [True, False]
    assert_same_sigma(sigma(out), ours, within=1e-5)
    report = json.loads((out / "report.json").read_text())
    assert report["held_out"]["brackets"]["prompt"]["kl"] == pytest.approx(kl, rel=1e-4)
    for folder in (out, by_one):
        assert steps_done(folder) == STEPS


@pytest.mark.slow
def test_many_contexts_are_divided_among_processes(start, calm_model, tmp_path):
    """The first dies in the midst of the second one's jobs; each is what one process gives, to the bit."""
    jobs = [{"id": str(i), "context": f"{CONTEXT} No. {i}.", "queries": QUERIES, "seed": i} for i in range(3)]
    contexts, out = tmp_path / "contexts.jsonl", tmp_path / "out"
    contexts.write_text("".join(json.dumps(row) + "\n" for row in jobs))
    command = ("compress-many", contexts, "--at-once", 1, "--checkpoint-every", 1)
    # The mesh is that of the four devices of each process.
    layout: dict[str, Any] = {"parallel": "mesh", "mesh": "data=4", "at_once": 1}
    expected = list(jaxsp.compress_many(calm_model, jobs, progress=False, **layout, **SETTINGS))

    killed_after(4, two(start, out, command=command), out / "2", victim=0)
    begun = (out / "2" / "metrics.jsonl").read_text().splitlines()[:4]
    results = finished(two(start, out, "--resume", command=command))
    assert [code for code, *_ in results] == [0, 0], results
    shown = [re.findall(r"^ *(\d) +kl ", text, re.MULTILINE) for _, text, _ in results]
    assert shown == [[row["id"] for row in jobs], []]
    assert not list((out / "run" / "checkpoints").iterdir())
    # It went on, and did not start anew.
    assert (out / "2" / "metrics.jsonl").read_text().splitlines()[:4] == begun
    table = pyarrow.parquet.read_table(out / "results.parquet").to_pylist()
    for result, row in zip(expected, table, strict=True):
        assert_same_sigma(sigma(out / row["id"]), result.prompt.sigma)
        assert row["gap_closed"] == pytest.approx(result.report["gap_closed"]["value"], abs=1e-4)


@pytest.mark.slow
def test_a_start_that_is_solved_for_has_devices_of_both(start, tmp_path):
    """Heads are divided among devices, and the devices among processes; the first one asks the document."""
    out = tmp_path / "out"
    more: dict[str, Any] = {"initial": "match", "steps": 0, "study": "auto", "max_answer_tokens": 48}
    results = finished(two(start, out, "--mesh", "model=2,data=4", **more))
    assert [code for code, *_ in results] == [0, 0], results
    assert all(np.isfinite(leaf).all() for leaf in sigma(out).values())


@pytest.mark.slow
def test_processes_that_disagree(start, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("\n".join(["What else is there?", *QUERIES[1:]]))
    for code, _, err in finished(two(start, tmp_path / "out", also=("--length", "5", "--queries", other))):
        assert code == 2
        difference = "prompt_length is 4 in process 0 and 5 in process 1"
        assert f"jaxsp: The processes disagree: {difference}; " in err
        assert re.search("queries is '[0-9a-f]+' in process 0 and '[0-9a-f]+'", err), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--process-id", "0"), "--coordinator, --process-id and --num-processes go together"),
        (("--coordinator", "here", "--process-id", "0", "--num-processes", "2"), "host:port, not 'here'"),
        (
            ("--coordinator", "a:1", "--process-id", "2", "--num-processes", "2"),
            "--process-id must lie from 0 to 1 (--num-processes - 1), not 2",
        ),
    ],
)
def test_addresses_that_cannot_be(jaxsp_command, job, tmp_path, options, message):
    code, _, err = jaxsp_command(
        "compress", job["context"], "--queries", job["queries"], "--out", tmp_path / "out", *options
    )
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("process", [0, 1])
def test_nobody_is_waited_for_long(python, process):
    code = f"import jaxsp.processes as h; h.PATIENCE = 2; h.join({free_address()!r}, {process}, 2)"
    begun = time.monotonic()
    done = python("-c", code, timeout=120)
    assert time.monotonic() - begun < 60
    assert done.returncode == 2
    said = "Not all the others have come" if process == 0 else "Nobody answers"
    assert f"jaxsp: {said}" in done.stderr
    assert "within 2 s" in done.stderr
