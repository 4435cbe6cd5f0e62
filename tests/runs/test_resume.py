"""An interrupted run goes on and ends as if nothing had happened; killed ones are in test_crash.py."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

import jax
import pytest

import jaxsp
from jaxsp.prompts import PROMPT_KINDS
from jaxsp.runs import folder, problems
from jaxsp.training.slots import Step
from jaxsp.typing import Interrupted
from tests.conftest import CONTEXT, QUERIES, assert_same_sigma

SETTINGS = {
    "prompt_length": 4, "steps": 12, "batch_size": 4, "max_answer_tokens": 6, "evaluate_every": 7,
    "checkpoint_every": 5,
}  # fmt: skip


def compress(model, out: Path, **more) -> jaxsp.Result:
    return jaxsp.compress(model, CONTEXT, QUERIES, out=out, progress=False, **SETTINGS, **more)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_every_kind_goes_on_where_it_was_interrupted(kind, tiny_model, tmp_path):
    """Also the parts of σ that are drawn at every step, and those that are not trained."""

    def stop(step: Step) -> None:
        if step.number == 8:
            raise KeyboardInterrupt

    out, settings = tmp_path / "pieces", {**SETTINGS, "kind": kind, "steps": 12}
    whole = jaxsp.compress(tiny_model, CONTEXT, QUERIES, out=tmp_path / "whole", progress=False, **settings)
    with pytest.raises(Interrupted):
        jaxsp.compress(tiny_model, CONTEXT, QUERIES, out=out, progress=False, callbacks=[stop], **settings)
    pieces = jaxsp.compress(tiny_model, CONTEXT, QUERIES, out=out, progress=False, resume=True, **settings)
    assert_same_sigma(pieces.prompt.sigma, whole.prompt.sigma)
    for a, b in zip(whole.lines, pieces.lines, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_a_run_that_ended_before_its_settings_has_taken_no_folder(tmp_path):
    ours = folder.RunFolder(tmp_path / "out")
    ours.settings.parent.mkdir(parents=True)
    (ours.settings.parent / "settings.json.0123abcd.part").write_text("{")
    ours.check(resume=False, overwrite=False)
    for file in ("run/x.txt", "settings.json.0123abcd.part"):
        (tmp_path / "out" / file).write_text("")
        with pytest.raises(jaxsp.UserError, match="is not empty"):
            ours.check(resume=False, overwrite=False)
        (tmp_path / "out" / file).unlink()


def test_two_runs_in_one_folder(tiny_model, tmp_path):
    """The second is told; what the first has written stays."""
    first = folder.RunFolder(tmp_path / "out")
    with first.locked():
        (tmp_path / "out" / "run").mkdir()
        (tmp_path / "out" / "run" / "settings.json").write_text("{}")
        for how in ("resume", "overwrite"):
            with pytest.raises(jaxsp.UserError, match=r"Another run is at work in .*out; wait"):
                compress(tiny_model, tmp_path / "out", **{how: True})
        assert (tmp_path / "out" / "run" / "settings.json").read_text() == "{}"
    with first.locked():  # it is free again
        pass


def test_who_looks_at_a_folder_stops_no_run(tmp_path):
    """``is_at_work`` takes a shared lock for a moment."""
    first = folder.RunFolder(tmp_path / "out")
    (tmp_path / "out").mkdir()
    looking = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    timer = threading.Timer(0.02, os.close, [looking])
    timer.start()
    with first.locked():
        assert first.is_at_work
    timer.join()


@pytest.mark.slow
def test_pmap_compresses_like_jit(calm_model):
    def gap(parallel):
        result = jaxsp.compress(
            calm_model, CONTEXT, QUERIES, prompt_length=4, steps=5, batch_size=8, max_answer_tokens=6,
            parallel=parallel, progress=False,
        )  # fmt: skip
        return result.report["gap_closed"]["value"]

    assert gap("pmap") == pytest.approx(gap("jit"), abs=1e-5)
    assert jax.local_device_count() == 8


@pytest.mark.slow
def test_the_queries_of_a_document_are_made_once(calm_model, tmp_path, heeded, monkeypatch):
    """A run without queries goes on with those that it made; its report tells of them."""
    settings = {**SETTINGS, "max_answer_tokens": 48, "steps": 8}

    def stop(step: Step) -> None:
        if step.number == 6:
            raise KeyboardInterrupt

    def run(out: str, **more) -> jaxsp.Result:
        return jaxsp.compress(calm_model, CONTEXT, out=tmp_path / out, progress=False, **settings, **more)

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("pieces", callbacks=[stop])
    monkeypatch.setattr(problems, "study", None)
    pieces = run("pieces", resume=True)
    assert_same_sigma(pieces.prompt.sigma, whole.prompt.sigma)
    assert pieces.report["study"] == whole.report["study"]
    assert pieces.report["study"]["given"] == 0
    assert pieces.report["held_out"]["queries"] >= 1
    assert "sentences are asked for" in (tmp_path / "pieces" / "report.md").read_text()
    texts = [(tmp_path / out / "report.json").read_text() for out in ("whole", "pieces")]
    kept = [[query["query"] for query in json.loads(text)["queries"]] for text in texts]
    assert kept[0] == kept[1]
