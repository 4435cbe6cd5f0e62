"""jaxsp compare: the runs as they lie in their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxsp.errors import UserError
from jaxsp.runs.compared import read_runs
from tests.evaluation.test_page import report


def write(folder: Path, text: str = "One.", **changes: Any) -> Path:
    """A finished run, as far as a comparison reads it."""
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({**report(), "error": None, **changes}))
    (folder / "context.txt").write_text(text)
    (folder / "report.html").touch()
    return folder


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    """Two runs by themselves, and one of three jobs, of which one failed."""
    monkeypatch.chdir(tmp_path)
    write(Path("a"))
    write(Path("b b"), prompt_length=8)
    for name in ("x", "y"):
        write(Path("many") / name, text=name)
    write(Path("many/z"), error="no")
    return tmp_path


def test_two_runs_are_a_table_a_page_and_a_sentence(folders, jaxsp_command):
    code, out, err = jaxsp_command("compare", "a", "b b")
    assert (code, err) == (0, "")
    assert "81.2%" in out
    assert "All their settings are the same." in " ".join(out.split())
    assert "Page: compare.html" in out
    page = Path("compare.html").read_text("utf-8")
    assert 'href="a/report.html"' in page
    assert 'href="b%20b/report.html"' in page
    assert jaxsp_command("compare", "a", "b b")[0] == 0  # a page of ours is replaced


def test_the_jobs_of_many_are_named_by_their_ids(folders, jaxsp_command):
    code, out, _ = jaxsp_command("compare", "many", "--out", "many/all.html")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["x", "y"]
    assert "many/z is left out: its training failed (no)" in " ".join(out.split())
    assert 'href="x/report.html"' in Path("many/all.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to compare"),
        (["a"], "needs two finished runs, and there is one"),
        (["many/z"], "there is none (many/z is left out: its training failed (no))"),
        (["a", "a"], "a is given twice"),
        (["a", "./a/report.json"], "a is given twice"),
        (["a", "many"], "many holds 3 runs; compare it alone"),
        (["a", "nowhere"], "nowhere holds no finished run"),
        (["a", ""], "The folder must be a path"),
        (["a", "many/x"], "many/x can't be compared with a: they stand in for other documents"),
        (["a", "b b", "--out", "a/context.txt"], "a/context.txt is there already and is no page of jaxsp"),
        (["a", "b b", "--out", "a/report.html"], "a/report.html is the report of a run"),
        (["a", "b b", "--out", "a"], "a is a folder; give a file"),
        (["a", "b b", "--out", "c/d.html"], "There is no folder c"),
    ],
    ids=" ".join,
)
def test_what_can_not_be_compared_is_a_sentence(folders, jaxsp_command, words, said):
    code, out, err = jaxsp_command("compare", *words)
    assert (code, out) == (2, "")
    assert err.startswith("jaxsp: ")
    assert said in err
    assert err.count("\n") == 1
    assert not Path("compare.html").exists()


def test_a_damaged_report_is_a_sentence(folders):
    write(folders / "c")
    for text in ("{", "[]", '{"held_out": 3}', '{"queries": [3], "held_out": {"brackets": {}}}'):
        (folders / "c" / "report.json").write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            read_runs(["a", "c"], folders / "out.html")
