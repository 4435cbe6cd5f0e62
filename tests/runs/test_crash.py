"""A run dies at any moment; gone on with, it ends as if nothing had happened, to the bit."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxsp
from jaxsp.evaluation import plots
from tests.conftest import CONTEXT, QUERIES
from tests.runs.photographs import Photographs
from tests.runs.zygote import Zygote

SETTINGS: dict[str, Any] = {
    "prompt_length": 4, "steps": 4, "batch_size": 4, "max_answer_tokens": 6, "evaluate_every": 2,
    "checkpoint_every": 1,
}  # fmt: skip
MANY: dict[str, Any] = {**SETTINGS, "checkpoint_every": 2, "at_once": 2}
JOBS = [
    {"id": "a", "context": CONTEXT, "queries": QUERIES, "steps": 2},
    {"id": "b", "context": f"{CONTEXT} No. b.", "queries": QUERIES, "steps": 6},
    {"id": "c", "context": CONTEXT, "queries": QUERIES, "seed": 1, "steps": 2},
]


def compress(model: Any, out: Path, **more: Any) -> None:
    jaxsp.compress(model, CONTEXT, QUERIES, out=out, progress=False, **SETTINGS, **more)


def compress_many(model: Any, out: Path, **more: Any) -> None:
    list(jaxsp.compress_many(model, JOBS, out=out, progress=False, **MANY, **more))


def outcome(out: Path) -> dict[str, Any]:
    """All that a run has left, but for how long it took."""
    found: dict[str, Any] = {}
    for file in sorted(out.glob("**/report.json")):
        folder, report = file.parent, json.loads(file.read_text())
        for name in ("seconds", "prefill_seconds"):
            del report[name]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        name = str(folder.relative_to(out))
        found[f"{name}/report"] = json.dumps(report)
        found[f"{name}/metrics"] = [{**line, "seconds": 0} for line in lines]
        for other in ("prompt.safetensors", "context.txt", "manifest.json"):
            found[f"{name}/{other}"] = (folder / other).read_bytes()
        assert {path.suffix for path in (folder / "plots").iterdir()} == {".png"}
    assert not any(out.glob("run/checkpoints/*"))
    return found


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], when: str) -> None:
    assert ours.keys() == theirs.keys(), when
    for name in ours:
        assert ours[name] == theirs[name], f"{name}, {when}"


@pytest.fixture(autouse=True, scope="module")
def without_pictures():
    """Half of a tiny run's time is drawing."""

    def written(*things: Any) -> None:
        things[-1].write_bytes(b"a picture")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("training_curve", "by_position", "by_query", "by_length"):
            patch.setattr(plots, name, written)
        yield


# Before its n-th change of a file


@pytest.fixture(scope="module")
def photographed(request, without_pictures, tiny_model, tmp_path_factory):
    """A command, the photographs of a run of it, and what it has left in the end."""
    folder = tmp_path_factory.mktemp("photographed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXSP_CACHE", str(folder / "files" / "cache"))
        patch.delenv("JAXSP_TEACHER_CACHE")
        found = Photographs(folder / "files", folder / "album")
        with found.taken():
            request.param(tiny_model, folder / "files" / "out")
    return request.param, found, outcome(folder / "files" / "out")


def go_on(photographed, model, monkeypatch, number: int, to: Path, *, machine: bool) -> None:
    """From one of the photographs to the end."""
    run, photographs, whole = photographed
    photographs.copy(number, to, machine=machine)
    monkeypatch.setenv("JAXSP_CACHE", str(to / "cache"))
    monkeypatch.delenv("JAXSP_TEACHER_CACHE", raising=False)
    begun = (to / "out" / "run" / "settings.json").exists()
    what = "the machine" if machine else "the process"
    when = f"{what} stopped before {photographs.events[number]} ({number})"
    try:
        run(model, to / "out", **({"resume": True} if begun else {}))
    except jaxsp.UserError as error:
        pytest.fail(f"{error} ({when})")
    assert_same(outcome(to / "out"), whole, when)


@pytest.mark.slow
@pytest.mark.parametrize(
    "photographed", [compress, compress_many], indirect=True, ids=lambda run: run.__name__
)
def test_it_dies_before_its_nth_change(photographed, tiny_model, monkeypatch, tmp_path):
    """Every other time the machine stops, and half of what nobody waited for is lost."""
    count = len(photographed[1].events)
    for number in np.linspace(0, count - 1, 17).astype(int):
        go_on(photographed, tiny_model, monkeypatch, number, tmp_path / str(number), machine=bool(number % 2))


# At a random moment

LONGER = {"steps": 24, "evaluate_every": 8, "checkpoint_every": 3}
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL]


@pytest.fixture(scope="module")
def zygote(tmp_path_factory) -> Iterator[Zygote]:
    found = Zygote(tmp_path_factory.mktemp("zygote"))
    yield found
    found.close()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("compress", 12), ("compress-many", 8)])
def test_it_is_killed_at_random_moments(name, most, zygote, tiny_directory, job, tmp_path):
    """Again and again, in the midst of going on, too; those that are asked to end say how to go on."""
    settings = {**(SETTINGS if name == "compress" else MANY), **LONGER}
    options = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    if name == "compress":
        words = [name, str(job["context"]), f"--queries={job['queries']}", *options]
    else:
        rows = [{**row, "steps": 4 * row["steps"]} for row in JOBS]
        (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        words = [name, str(tmp_path / "jobs.jsonl"), *options]
    words += [f"--model={tiny_directory}", "--dtype=float32"]

    def begin(out: str, *more: str) -> int:
        return zygote.begin([*words, f"--out={tmp_path / out}", *more])

    started = time.perf_counter()
    begin("whole")
    code, said = zygote.end()
    assert code == 0, said
    seconds, whole = time.perf_counter() - started, outcome(tmp_path / "whole")
    for file in tmp_path.glob("whole/**/report.json"):  # later ones find what it has compiled
        seconds -= json.loads(file.read_text())["seconds"]["compile"]
    seed = random.randrange(1 << 32)
    draw, kills, history = random.Random(seed), 0, [f"seed {seed}, {seconds:.2f} s"]
    how = signal.SIGKILL
    for chain in itertools.count():
        out, code = f"chain-{chain}", -1
        while code != 0:
            last = kills >= most
            begun = (tmp_path / out / "run" / "settings.json").exists()
            child = begin(out, *(["--resume"] if begun else []))
            if not last:
                how = SIGNALS[kills % len(SIGNALS)]
                # To be asked, it must have come to where it listens.
                after = draw.uniform(0.05 if how == signal.SIGKILL else 0.5, max(seconds, 1.0))
                time.sleep(after)
                os.kill(child, how)  # of one that has ended, its zygote has not yet said so
                kills += 1
                history.append(f"{out}: {how.name} after {after:.2f} s")
            code, said = zygote.end()
            where = f"{history}: {code} {said}"
            assert "Traceback" not in said, where
            assert code in ((0,) if last else (0, -signal.SIGKILL) if how == signal.SIGKILL else (0, 130)), (
                where
            )
            assert code != 130 or re.search("[Ii]nterrupted", said), where
        assert_same(outcome(tmp_path / out), whole, str(history))
        if kills >= most:
            break
