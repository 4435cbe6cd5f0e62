"""The list of experiments is complete, and the tables in the READMEs are those of the committed results."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

from experiments import suite
from experiments.documents.experiment import DOCUMENTS
from experiments.suite import Experiment, Run
from jaxsp import demo
from jaxsp.evaluation.facts import has_expected

RUNS = {
    "a": {"date": "2026-01-02", "commit": "abc", "rows": [{"x": 1, "at": {"low": 0.5}}, {"x": 2}]},
    "b": {"date": "2026-01-01", "commit": "def", "seconds": 2.5, "rows": [{"x": 3, "y": ["u", "σ"]}]},
}


def test_the_list_has_every_folder():
    assert {file.parent.name for file in suite.HERE.glob("*/experiment.py")} == set(suite.NAMES)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_right_answers_have_stands_in_our_documents(name):
    context, queries, held_out = demo.read() if name == "demo" else suite.own_document(name)
    assert queries
    for query in held_out:
        assert query.expect, query.text
        assert has_expected(context, query), query.text


@pytest.mark.parametrize("name", suite.NAMES)
def test_an_experiment_has_all_that_the_list_shows(name):
    experiment, results, row = suite.load(name), suite.committed(name), suite.summary(name)
    assert all(row.values())
    assert experiment.question.endswith("?")
    assert row["command"].startswith(f"python -m experiments {name} --full")
    assert "\n" not in row["result"]
    assert (set(results) < set(experiment.settings)) == bool(experiment.missing)
    for record in results.values():
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", record["date"])
        assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", record["commit"])
        assert record["environment"]["versions"]["jaxsp"]
    text = (suite.HERE / name / "README.md").read_text("utf-8")
    assert f"<!-- results: {name} -->" in text


@pytest.mark.parametrize("file", suite.readmes(), ids=lambda file: str(file.relative_to(suite.HERE.parent)))
def test_a_table_is_that_of_the_results(file):
    text = file.read_text("utf-8")
    assert suite.drawn(text) == text, "python -m experiments --redraw"


def test_experiments_do_not_import_tests():
    for file in suite.HERE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "tests" for name in names), file


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_results_are_read_as_they_were_written(kind, tmp_path):
    file = tmp_path / f"results.{kind}"
    assert suite.read(file) == {}
    suite.write(file, RUNS)
    assert suite.read(file) == RUNS
    assert list(tmp_path.iterdir()) == [file]


def test_a_run_keeps_the_results_of_other_settings(tmp_path, monkeypatch):
    made = Experiment(
        question="?", cost="", run=lambda setting, run: {"rows": [{"x": run.full}]},
        table=lambda results: f"{len(results)} settings", result=lambda results: "", settings=("a", "b"),
        draw=lambda results, folder: (folder / "picture").write_text(",".join(results)),
    )  # fmt: skip
    monkeypatch.setattr(suite, "load", lambda name: made)
    suite.write(tmp_path / "results.json", RUNS)
    suite.measure("made", "b", Run(full=True, out=tmp_path))
    results = suite.read(tmp_path / "results.json")
    assert results["a"] == RUNS["a"]
    assert results["b"]["rows"] == [{"x": True}]
    assert results["b"]["environment"]["cores"] > 0
    assert results["b"]["peak_memory_gib"] > 0
    assert (tmp_path / "picture").read_text() == "a,b"
    monkeypatch.setattr(suite, "committed", lambda name: results)
    text = "x\n<!-- results: made -->\nold\n\nlines\n<!-- end -->\ny\n"
    assert suite.drawn(text) == "x\n<!-- results: made -->\n2 settings\n<!-- end -->\ny\n"


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) or name for name in "ab"}
    seconds, values = suite.in_turns(calls, 2)
    assert order == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    assert values == {"a": "a", "b": "b"}
    assert len(suite.in_turns(calls, 5, most=0)[0]["a"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nothing"], "There is no experiment 'nothing'"), (["peers", "--only", "x"], "has no setting 'x'")],
)
def test_a_mistake_is_told(arguments, message):
    command = [sys.executable, "-m", "experiments", *arguments]
    done = subprocess.run(command, cwd=suite.HERE.parent, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
