"""The command: what it refuses, and how it ends."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

import jaxsp
from jaxsp.runs.folder import RunFolder
from jaxsp.serve import address, command
from jaxsp.serve.server import open_shelf
from tests.conftest import CONTEXT, QUERIES
from tests.serve.running import asked, shelf
from tests.test_files import prompt, result


@pytest.fixture
def folder(tmp_path):
    prompt().save(tmp_path / "prompt")
    return tmp_path / "prompt"


def test_a_port_that_is_in_use_is_said_before_anything_is_loaded(folder, jaxsp_command):
    with contextlib.closing(address.bind("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        code, out, err = jaxsp_command("serve", folder, "--port", port)
    assert (code, out) == (2, "")
    assert f"can't listen at 127.0.0.1:{port} (Address already in use); choose another --port" in err


def test_without_its_packages_the_extra_is_named(folder, jaxsp_command, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        command.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    code, _, err = jaxsp_command("serve", folder)
    assert (code, err) == (2, "jaxsp: Serving needs uvicorn: pip install 'jaxsp[serve]'.\n")


def test_a_key_comes_from_the_environment(folder, jaxsp_command, monkeypatch):
    monkeypatch.setenv("JAXSP_API_KEY", "two words ")
    assert "--api-key must be plain letters" in jaxsp_command("serve", folder, "--host", "0.0.0.0")[2]
    monkeypatch.setenv("JAXSP_API_KEY", "secret")
    with contextlib.closing(address.bind("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert "can't listen" in jaxsp_command("serve", folder, "--host", "0.0.0.0", "--port", port)[2]


def test_a_prompt_of_another_model_is_named(tmp_path, jaxsp_command):
    served = shelf()["bike"]
    served.prompt.save(tmp_path / "bike")
    prompt().save(tmp_path / "other")
    words = ["serve", tmp_path / "bike", tmp_path / "other", "--port", 0, "--model", served.model.directory]
    code, _, err = jaxsp_command(*words, "--dtype", "float32")
    assert code == 2
    assert "other: This prompt belongs to another model" in err


def test_a_prompt_that_does_not_know_when_it_is_not_sure_is_named(tmp_path, jaxsp_command):
    served = shelf()["bike"]
    served.prompt.save(tmp_path / "bike")
    words = ["serve", tmp_path / "bike", "--port", 0, "--model", served.model.directory, "--dtype", "float32"]
    code, out, err = jaxsp_command(*words, "--context-fallback", 0.1)
    assert (code, out) == (2, "")
    assert "--context-fallback, bike: The prompt does not say when it is not sure" in err
    assert "jaxsp evaluate --calibrate" in err


def written(many: Path) -> None:
    RunFolder(many).start({})
    for name in ("two", "one"):
        result(many / name)


def trained(many: Path) -> None:
    options: dict[str, Any] = {"prompt_length": 4, "steps": 0, "kind": "embedding", "max_answer_tokens": 4}
    jobs = [{"id": name, "context": CONTEXT, "queries": QUERIES[:4]} for name in ("two", "one")]
    list(jaxsp.compress_many(shelf().model, jobs, out=many, progress=False, **options))
    assert {path.name for path in many.iterdir()} == {"one", "two", "run", "results.parquet"}


@pytest.mark.parametrize("make", [written, pytest.param(trained, marks=pytest.mark.slow)])
def test_a_folder_of_many_stands_for_its_finished_prompts(make, tmp_path, jaxsp_command):
    many = tmp_path / "many"
    make(many)
    assert command._prompts(str(many)) == [many / "one", many / "two"]
    with contextlib.closing(address.bind("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert "can't listen" in jaxsp_command("serve", many, many / "one", "--port", port)[2]  # all is read
    (many / "two" / "report.json").unlink()
    assert command._prompts(str(many)) == [many / "one"]
    (many / "one" / "report.json").unlink()
    code, _, err = jaxsp_command("serve", many)
    assert code == 2
    assert f"{many} holds no finished run" in err


def test_names_are_made_unique(tmp_path):
    bike = shelf()["bike"].prompt
    found = open_shelf(shelf().model, [(tmp_path / a / "prompt", bike) for a in "abc"])
    assert list(found) == ["prompt", "prompt-2", "prompt-3"]


@pytest.fixture
def process(tmp_path):
    """The server as a process of its own; it is given time to compile."""
    for name in ("bike", "lamp"):
        shelf()[name].prompt.save(tmp_path / name)
    words = ["serve", "bike", "lamp", "--port", "0", "--slots", "2", "--dtype", "float32"]
    sizes = ["--max-query-tokens", "128", "--max-answer-tokens", "300"]
    started = subprocess.Popen(
        [sys.executable, "-m", "jaxsp", *words, *sizes], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    yield started
    started.kill()
    started.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_when_all_is_answered(process, number):
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("Serving bike, lamp at http://127.0.0.1:"), process.stderr.read()
    url = line.split(" at ")[1].split(" (")[0]
    client: Any = openai.OpenAI(base_url=url, api_key="any", max_retries=0)

    def ask(i: int) -> str | None:
        found = client.chat.completions.create(
            model=("bike", "lamp")[i % 2], messages=[{"role": "user", "content": "Go on."}], max_tokens=300
        )
        return found.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        first = next(pool.map(ask, [0]))
        asking = [pool.submit(ask, i) for i in range(12)]
        while not any(one.done() for one in asking):
            pass
        process.send_signal(number)
        answers = [one.result() for one in asking]
    assert first == asked("bike", "Go on.", 300)
    assert answers == [asked(("bike", "lamp")[i % 2], "Go on.", 300) for i in range(12)]
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert err.endswith("All requests are answered; the server has ended.\n")
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))
