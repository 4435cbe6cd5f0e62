"""Prompts in a repository of the model hub, by a stand-in for it on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import constants

import jaxsp
from jaxsp import hub
from jaxsp.artifact import SoftPrompt
from jaxsp.typing import UserError
from tests import hub_stand_in
from tests.hub_stand_in import TOKEN, Repository
from tests.test_files import prompt

NAME = "somebody/manual-prompt"


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub_stand_in.running() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture
def folder(tmp_path):
    """A prompt in a run's folder, for a model in a folder of this machine."""
    found = tmp_path / "secret place" / "prompt"
    place = tmp_path / "secret place"
    model = {"name": str(place / "small-model"), "fingerprint": "f" * 64}
    teacher = {
        "name": str(tmp_path / "secret place" / "large-model"),
        "fingerprint": "e",
        "quantization": "none",
    }
    prompt(model=model, teacher=teacher, versions={}, training={}).save(found)
    for name in ("run/teachers/x", "metrics.jsonl", "report.html", "tokens.json", ".env"):
        (found / name).parent.mkdir(parents=True, exist_ok=True)
        (found / name).write_text("secret place")
    brackets = {"prompt": {"kl": 0.25}, "no_context": {"kl": 1.5}}
    queries = [{"query": "How\x1b long?", "split": "held_out", "captured": False}]
    report = {"held_out": {"brackets": brackets}, "verdict": {"text": "A good stand-in."}, "queries": queries}
    report["taught_by"] = {**teacher, "signal": "distributions"}
    report["teacher"] = {"text": f"The teacher, {teacher['name']}: 3 of 4 held-out answers are right."}
    (found / "report.json").write_text(json.dumps(report))
    return found


def test_only_the_prompts_own_files_go_and_a_new_repository_is_private(server, folder, jaxsp_command):
    code, out, err = jaxsp_command("push", folder, NAME)
    assert (code, err) == (0, "")
    found = server.repositories[NAME]
    assert found.private
    assert set(found.files) == {"README.md", "manifest.json", "prompt.safetensors"}
    assert found.files["prompt.safetensors"] == (folder / "prompt.safetensors").read_bytes()
    assert out.splitlines() == [
        f"To {NAME}, private:",
        *(f"  {name} ({len(data):,} bytes)" for name, data in found.files.items()),
        f"Uploaded: {server.url}/{NAME}   Ask it: jaxsp ask hf://{NAME}",
    ]
    for data in (*found.files.values(), out.encode()):
        assert b"secret place" not in data
        assert TOKEN.encode() not in data


def test_the_readme_says_what_it_is(server, folder):
    jaxsp.push(folder, NAME)
    text = server.repositories[NAME].files["README.md"].decode()
    assert text.startswith("---\nlibrary_name: jaxsp\n")
    assert "# A soft prompt for small-model" in text
    assert "3 slots of kind embedding were learnt by jaxsp and stand in for a document of 9 tokens" in text
    assert f'jaxsp ask hf://{NAME} --model DIR "How long is the cable?"' in text
    for to in ("peft", "transformers", "vllm", "llama.cpp"):
        assert f"jaxsp export hf://{NAME} --model DIR --to {to} --out {to}/" in text
    assert "f" * 64 in text
    assert "Taught by `large-model`." in text
    assert "| prompt | 0.250 |" in text
    assert "A good stand-in." in text
    assert "facts are lost: 1.\n" in text
    assert "long?" not in text
    jaxsp.push(folder, NAME, with_document=True)
    text = server.repositories[NAME].files["README.md"].decode()
    assert "facts are lost (1):\n\n- How␛ long?\n" in text


def test_a_model_of_the_hub_is_named(server, tmp_path):
    prompt(model={"name": "HuggingFaceTB/SmolLM2-360M-Instruct", "fingerprint": "f"}).save(tmp_path / "p")
    jaxsp.push(tmp_path / "p", NAME)
    text = server.repositories[NAME].files["README.md"].decode()
    assert text.startswith('---\nbase_model: "HuggingFaceTB/SmolLM2-360M-Instruct"\nlibrary_name: jaxsp\n')
    assert f'jaxsp ask hf://{NAME} "How long is the cable?"' in text


def test_the_document_goes_where_it_is_asked_for_and_is_gone_otherwise(server, folder):
    jaxsp.push(folder, NAME, with_document=True)
    found = server.repositories[NAME].files
    assert found["context.txt"] == (folder / "context.txt").read_bytes()
    assert "context_sha256" in json.loads(found["manifest.json"])
    found["more.txt"] = b"theirs"
    jaxsp.push(folder, NAME)
    assert set(found) == {"README.md", "manifest.json", "prompt.safetensors", "more.txt"}
    assert "context_sha256" not in json.loads(found["manifest.json"])
    (folder / "context.txt").unlink()
    with pytest.raises(UserError, match=r"There is no context.txt in .*; leave --with-document away"):
        jaxsp.push(folder, NAME, with_document=True)


def test_what_lies_there_is_a_prompt(server, folder, tmp_path):
    jaxsp.push(folder, NAME, with_document=True)
    for name, data in server.repositories[NAME].files.items():
        (tmp_path / "there").mkdir(exist_ok=True)
        (tmp_path / "there" / name).write_bytes(data)
    own, found = SoftPrompt.load(folder), SoftPrompt.load(tmp_path / "there")
    assert found.context == own.context
    assert found.sigma["embeddings"].tolist() == own.sigma["embeddings"].tolist()
    model = {**own.manifest["model"], "name": "small-model"}
    teacher = {**own.manifest["teacher"], "name": "large-model"}
    assert found.manifest == {**own.manifest, "model": model, "teacher": teacher}


def test_a_public_repository_is_written_to_only_if_that_is_meant(server, folder, jaxsp_command):
    server.repositories[NAME] = Repository(private=False)
    code, _, err = jaxsp_command("push", folder, NAME)
    assert (code, "is public: everyone could read the prompt. Give --public if they may" in err) == (2, True)
    assert not server.repositories[NAME].files
    code, out, err = jaxsp_command("push", folder, NAME, "--public")
    assert code == 0, err
    assert out.startswith(f"To {NAME}, for everyone to read if it is new or public:\n")
    assert server.repositories[NAME].files
    jaxsp.push(folder, "somebody/new", public=True)
    assert not server.repositories["somebody/new"].private


def test_a_repository_of_other_files_is_left_alone(server, folder):
    """One with the README alone that the hub made is filled."""
    there = server.repositories[NAME] = Repository()
    there.files.update({"README.md": b"theirs", "model.safetensors": b"theirs"})
    with pytest.raises(UserError, match=r"holds other files \('model.safetensors'\) and no soft prompt"):
        jaxsp.push(folder, NAME)
    assert there.files["README.md"] == b"theirs"
    del there.files["model.safetensors"]
    jaxsp.push(folder, NAME)
    assert "manifest.json" in there.files


def test_a_dry_run_asks_the_hub_nothing(server, folder, jaxsp_command):
    code, out, err = jaxsp_command("push", folder, NAME, "--dry-run", "--with-document")
    assert code == 0, err
    assert "  context.txt (" in out
    assert out.endswith("Nothing was uploaded (--dry-run).\n")
    assert not server.asked


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no token", "Uploading needs a token of the hub: log in with `hf auth login`, or set HF_TOKEN"),
        ("another token", "The hub refuses 'somebody/manual-prompt' (401): log in with `hf auth login`"),
        ("no right", "The hub refuses 'somebody/manual-prompt' (403): log in with `hf auth login`"),
        ("a fault", "The hub refuses 'somebody/manual-prompt' (418: no)."),
        ("no hub", "The model hub can't be reached for 'somebody/manual-prompt' ("),
        ("an odd token", "The model hub can't be reached for 'somebody/manual-prompt' ("),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_without_the_token(
    server, folder, jaxsp_command, monkeypatch, case, said
):
    token = {"another token": "hf_another", "an odd token": "hf_odd\x0bone"}.get(case, TOKEN)
    monkeypatch.setenv("HF_TOKEN", token)
    if case == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif case == "no hub":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    server.refused = {"no right": {"/commit": 403}, "a fault": {"/repos/create": 418}}.get(case, {})
    code, _, err = jaxsp_command("push", folder, NAME)
    assert code == 2
    assert err.startswith(f"jaxsp: {said}")
    assert err.count("\n") == 1
    assert token.partition("\x0b")[0] not in err  # which no header may have


@pytest.mark.parametrize(
    "name", ["prompt", "a/b/c", "", "a/", "/a", "a/b c", "../b", "a/b..c", "a/b--c", "a/ü"]
)
def test_names_that_no_repository_has(folder, name):
    with pytest.raises(UserError, match="A repository of the hub is named OWNER/NAME, not "):
        jaxsp.push(folder, name)
    with pytest.raises(UserError, match="A repository of the hub is named OWNER/NAME, not "):
        SoftPrompt.load(f"hf://{name}")


def test_a_folder_of_that_name_is_no_repository(tmp_path, monkeypatch):
    """Without hf:// nothing is asked of the hub, whatever the path looks like."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^somebody/manual-prompt holds no soft prompt"):
        SoftPrompt.load(NAME)
    prompt().save(NAME)
    assert SoftPrompt.load(NAME).prompt_length == 3
    assert hub.name_of(Path(NAME)) == "manual-prompt"
    assert hub.name_of(tmp_path / "snapshots" / "one") == "one"


def test_a_prompt_is_read_from_the_hub_with_the_token_of_the_environment(server, folder, python, tmp_path):
    """In a process of its own: where the hub is, is read once, at import."""
    jaxsp.push(folder, NAME)
    code = (
        f"import jaxsp; prompt = jaxsp.SoftPrompt.load('hf://{NAME}'); print(prompt, prompt.context)\n"
        f"from jaxsp import hub; print(hub.name_of(hub.local('hf://{NAME}', ['manifest.json'])))\n"
        "try: jaxsp.SoftPrompt.load('hf://somebody/other')\n"
        "except jaxsp.UserError as error: print(error)"
    )
    own = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    done = python("-c", code, env={**own, "HF_HUB_DISABLE_XET": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "SoftPrompt(embedding, 3 slots for 9 tokens, small-model) None",
        "manual-prompt",
        "The model hub has no repository 'somebody/other', or it is private and the token may not see it.",
    ]
    assert not any("README" in asked for asked in server.asked if "/resolve/" in asked)
    kept = [file for file in (tmp_path / "home").rglob("*") if file.is_file()]
    assert not any(TOKEN.encode() in file.read_bytes() for file in kept)
    assert os.environ["HF_TOKEN"] == TOKEN


def test_a_damaged_prompt_stays_here(server, folder):
    (folder / "prompt.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"prompt.safetensors is damaged"):
        jaxsp.push(folder, NAME)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "context_tokens": 8}))
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        jaxsp.push(folder, NAME)
    assert not server.asked
