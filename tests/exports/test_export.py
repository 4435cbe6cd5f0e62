"""Refusals, the files left behind then, and an export where torch is missing."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

import jaxsp
from jaxsp.artifact import SoftPrompt
from jaxsp.exports import check, export
from jaxsp.typing import UserError
from tests import tiny
from tests.exports.consumer import HAS_TORCH, QUESTION, model, prompt


@pytest.fixture
def saved(tmp_path):
    """A saved prompt and its folder."""
    prompt("llama", "embedding").save(tmp_path / "prompt")
    return tmp_path / "prompt"


def files(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def answers(monkeypatch, **found):
    monkeypatch.setattr(check, "_read_there", lambda *_: found)


def test_where_torch_is_missing_the_files_are_there_and_unchecked(
    saved, jaxsp_command, monkeypatch, tmp_path
):
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    (lacking / "torch.py").write_text("raise ImportError('none', name='torch')")
    monkeypatch.setenv("PYTHONPATH", str(lacking))
    code, out, err = jaxsp_command("export", saved, "--to", "peft")
    assert code == 0, err
    again = f"jaxsp export {saved} --to peft --out {saved / 'peft'} --overwrite"
    readme = saved / "peft" / "README.md"
    assert "is written, and unchecked: torch is not installed. To check it:" in out
    use = f"How to use it: {readme}; the model: {model('llama').directory}"
    assert out.splitlines()[1:] == ["pip install torch transformers peft", again, use]
    assert "**Unchecked**: torch was missing" in readme.read_text()
    code, _, err = jaxsp_command("export", saved, "--to", "peft")
    assert (code, "peft is there already; replace it with --overwrite" in err) == (2, True)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.skipif(not HAS_TORCH, reason="torch and PEFT are optional")
def test_the_check_has_a_process_of_its_own_and_the_export_stands_alone(saved, python):
    """Both from the command line: jaxsp hides torch from itself."""
    done = python("-m", "jaxsp", "export", str(saved), "--to", "transformers", "--with-model")
    assert done.returncode == 0, done.stderr
    assert f"{saved / 'transformers'}: checked on 1 question, KL" in done.stdout
    text = (saved / "transformers" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.count("How long is the cable?") == 1
    code = "import sys; sys.modules['jaxsp'] = None\n" + code.replace("How long is the cable?", QUESTION)
    found = python("-c", code, cwd=saved / "transformers")
    assert found.returncode == 0, found.stderr
    assert found.stdout == prompt("llama", "embedding").ask(QUESTION, model=model("llama")) + "\n"


def test_what_the_consumer_reads_otherwise_is_refused_and_an_earlier_export_stays(monkeypatch, tmp_path):
    given = prompt("llama", "embedding"), model("llama"), "peft", tmp_path / "out"
    answers(monkeypatch, kl=1e-9, logit_difference=1e-5)
    export(*given)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    answers(monkeypatch, kl=0.01, logit_difference=1.0)
    with pytest.raises(
        UserError, match=r"peft makes something else of this prompt: KL 0\.01 from jaxsp's own"
    ):
        export(*given, overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_consumer_that_fails_is_a_sentence(monkeypatch, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('it broke')")
    monkeypatch.setattr(check, "_SCRIPT", script)
    with pytest.raises(UserError, match="can't be read in its consumer: it broke; nothing was written"):
        export(prompt("llama", "embedding"), model("llama"), "peft", tmp_path / "out")
    assert files(tmp_path) == ["broken.py"]


def test_other_models_and_forms_of_them_are_refused(saved, tmp_path, monkeypatch):
    answers(monkeypatch, missing="torch")
    other = jaxsp.load_model(tiny.write(tmp_path / "other", seed=1), dtype="float32")
    with pytest.raises(UserError, match="belongs to another model: its model weights"):
        jaxsp.export(saved, "peft", out=tmp_path / "out", model=other)
    coarse = dataclasses.replace(model("llama"), config=model("llama").config.replace(dtype="bfloat16"))
    with pytest.raises(UserError, match="made in float32, the model was loaded in bfloat16"):
        jaxsp.export(saved, "peft", out=tmp_path / "out", model=coarse)
    own = prompt("llama", "embedding")
    manifest = {**own.manifest, "model": {**own.manifest["model"], "quantization": "int8"}}
    with pytest.raises(UserError, match="quantized to int8 by jaxsp, which no other program computes"):
        jaxsp.export(SoftPrompt(own.sigma, manifest), "peft", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = jaxsp.export(saved, "peft", out=tmp_path / "out", model=model("llama"))
    assert (found.kl, found.missing) == (None, "torch")


def test_a_nested_prompt_leaves_at_a_length_of_its_own(monkeypatch, tmp_path):
    answers(monkeypatch, missing="torch")
    own = prompt("llama", "nested")
    jaxsp.export(own, "peft", out=tmp_path / "out", model=model("llama"), length=4)
    known = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert known["num_virtual_tokens"] == 6 + 4


def test_the_readme_says_what_the_report_says(monkeypatch, tmp_path):
    answers(monkeypatch, kl=1e-9, logit_difference=1e-5)
    brackets = {"prompt": {"kl": 0.25}, "full_context": {"kl": 0.0}, "no_context": {"kl": 1.5}}
    rows = [{"query": "How\x1b long?", "split": "held_out", "captured": False}]
    rows += [{"query": "Who?", "split": "held_out", "captured": True}]
    report = {"held_out": {"brackets": brackets}, "verdict": {"text": "A good stand-in."}, "queries": rows}
    export(prompt("llama", "embedding"), model("llama"), "peft", tmp_path / "out", report=report)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| prompt | 0.250 |" in text
    assert "A good stand-in." in text
    assert "facts are lost (1):\n\n- How␛ long?\n" in text
    assert "Who?" not in text
