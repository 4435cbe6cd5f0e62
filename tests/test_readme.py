"""README and CONTRIBUTING are true: command lines run, Python runs, files and tables are there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import jaxsp
from jaxsp.arguments import parse
from jaxsp.cli import COMMANDS
from tests.conftest import CONTEXT, QUERIES

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ((ROOT / name).read_text("utf-8") for name in ("README.md", ".github/CONTRIBUTING.md"))
FEW_STEPS = {"steps": 2, "batch_size": 2, "max_answer_tokens": 4}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def lines(text: str, program: str) -> list[list[str]]:
    """The words of each shell line that calls the program, without comments."""
    found = [shlex.split(line, comments=True) for block in blocks(text, "sh") for line in block.splitlines()]
    return [words[1:] for words in found if words[:1] == [program]]


JAXSP = lines(README, "jaxsp")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the files that the README names, smaller."""
    monkeypatch.chdir(tmp_path)
    demo = tmp_path / "jaxsp" / "demo"
    demo.mkdir(parents=True)
    (demo / "manual.md").write_text(CONTEXT)
    (demo / "questions.txt").write_text("\n".join(QUERIES[:4]))
    held_out = (json.dumps({"query": query, "expect": ["steel"]}) for query in QUERIES[4:6])
    (demo / "held_out.jsonl").write_text("\n".join(held_out))
    return tmp_path


@pytest.mark.parametrize("words", JAXSP, ids=" ".join)
def test_a_command_line_can_be_parsed(words):
    assert isinstance(parse(COMMANDS, words), COMMANDS[words[0]])


def test_all_commands_are_shown():
    shown = {words[0] for words in JAXSP} | set(re.findall(r"uv run -q jaxsp (\S+)", README))
    comments = [re.findall(r"# .*", block) for block in blocks(README, "sh")]
    shown |= set(re.findall(r"jaxsp ([\w-]+)", str(comments)))
    assert shown == set(COMMANDS)


@pytest.mark.slow
def test_the_lines_after_the_two_commands_run_one_after_the_other(clone, calm_directory, jaxsp_command):
    """As printed, but for a tiny model and few steps."""
    few = [word for name, value in FEW_STEPS.items() for word in (f"--{name.replace('_', '-')}", value)]
    first, *others = JAXSP[1:5]
    assert [words[0] for words in JAXSP[1:5]] == ["compress", "ask", "evaluate", "inspect"]
    code, out, err = jaxsp_command(*first, "--model", calm_directory, "--dtype", "float32", *few)
    assert code == 0, err
    for words in others:
        code, out, err = jaxsp_command(*words)
        assert code == 0, err
        assert out.strip()


def test_a_document_alone_comes_second():
    """After the demo, of all lines that call the program."""
    first, second = re.findall(r"(?:uv run -q )?\bjaxsp (\S+.*)", "\n".join(blocks(README, "sh")))[:2]
    assert first == "demo"
    assert shlex.split(second, comments=True)[:3] == ["compress", "jaxsp/demo/manual.md", "--out"]


def test_the_first_line_makes_the_others_work():
    """Plain ``jaxsp`` is found from there on, and the files are in a clone."""
    after = README.partition("<!-- test -->")[2]
    activate, compress = blocks(after, "sh")[1].splitlines()[:2]
    assert activate.startswith("source .venv/bin/activate")
    files = re.findall(r"jaxsp/demo/\S+", blocks(after, "sh")[1])
    assert len(files) >= 3
    assert all((ROOT / file).is_file() for file in files)
    assert compress.startswith("jaxsp compress")


@pytest.mark.slow
def test_the_python_runs(clone, calm_directory, monkeypatch):
    """All of it in one session, on a tiny model with few steps."""
    plain = jaxsp.compress
    monkeypatch.setattr(jaxsp, "compress", lambda *args, **given: plain(*args, **FEW_STEPS, **given))
    code = "\n".join(blocks(README, "python")).replace('"smollm2-135m-instruct"', repr(str(calm_directory)))
    session: dict = {}
    exec(compile(code, "README", "exec"), session)
    assert "squared_distance" in session["result"].prompt.manifest["training"]["objective"]


def test_the_python_is_short():
    first, own = ([line for line in block.splitlines() if line] for block in blocks(README, "python"))
    assert max(len(first), len(own)) <= 10
    assert len(README.splitlines()) <= 130
    assert all(len(line) <= 110 for line in README.splitlines())


def test_one_version():
    version = jaxsp.__version__
    assert f"version = {{{version}}}" in README
    newest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md"])
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text("utf-8")):
        assert target.startswith("https://") or (ROOT / name).parent.joinpath(target).exists(), target


def test_files_and_tables_of_contributing_are_there():
    for path in re.findall(r"`((?:jaxsp|tests|experiments)/[\w./]*)`", CONTRIBUTING):
        assert (ROOT / path).exists(), path
    of = r"`(_?[A-Z_]{5,})`(?: line)?(?:\s+of|,\s+and in[^.]*?of)\s+`([\w./]+\.py)`"
    tables = re.findall(of, CONTRIBUTING)
    assert len(tables) >= 10
    for table, file in tables:
        assert re.search(rf"^{table}\b", (ROOT / file).read_text("utf-8"), re.MULTILINE), (table, file)


def test_lines_of_contributing_name_what_is_there():
    for words in lines(CONTRIBUTING, "pytest"):
        assert all((ROOT / word).exists() for word in words if word.startswith("tests"))
    inline = re.findall(r"`pytest ([^`]*)`", CONTRIBUTING)
    assert len(inline) >= 10
    for text in inline:
        assert all((ROOT / word).exists() for word in text.split() if word.startswith("tests")), text
    for name in ("ruff", "pyright", "pytest"):
        assert lines(CONTRIBUTING, name)
        assert shutil.which(name, path=Path(sys.executable).parent)


def test_the_plan_of_files_is_whole():
    """Every file and folder at the top of the package has its place in the plan."""
    plan = CONTRIBUTING.partition("## The plan of files")[2].partition("Some decisions")[0]
    rooms = {file.name for file in (ROOT / "jaxsp").iterdir() if not file.name.startswith(("_", "py."))}
    assert {room for room in rooms if room not in plan} == set()
