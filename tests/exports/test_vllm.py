"""The request to a vLLM server: the file it loads, the chat it lays out, what a client refuses."""

from __future__ import annotations

import base64
import dataclasses
import http.server
import io
import json
import pickletools
import runpy
import sys
import threading
import zipfile

import numpy as np
import pytest

from experiments.random_llama import CHAT_TEMPLATE, tokenizer
from jaxsp.artifact import tokenizer_fingerprint
from jaxsp.exports import check, export
from jaxsp.exports.vllm import torch_file
from jaxsp.typing import UserError
from tests.exports import consumer
from tests.exports.consumer import model, prompt

PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that takes parts alone; vLLM gives it those, and joins nothing."""


@pytest.fixture
def exported(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_read_there", lambda *_: {"missing": "torch"})
    return export(prompt("llama", "embedding"), model("llama"), "vllm", tmp_path / "out").folder


def test_the_file_holds_the_prompt_alone(exported):
    """The server writes the chat's text before it: it would stand there twice."""
    data = base64.b64decode(sent(exported)["messages"][0]["content"][0]["data"], validate=True)
    archive = zipfile.ZipFile(io.BytesIO(data))
    found = np.frombuffer(archive.read("archive/data/0"), "<f4").reshape(consumer.SLOTS, -1)
    np.testing.assert_array_equal(found, prompt("llama", "embedding").sigma["embeddings"])
    pickletools.dis(archive.read("archive/data.pkl"), io.StringIO())


@pytest.mark.torch
@pytest.mark.skipif(not consumer.HAS_TORCH, reason="torch is optional")
def test_torch_loads_it():
    import torch

    array = np.random.RandomState(0).standard_normal((3, 300)).astype(np.float32)
    found = torch.load(io.BytesIO(torch_file(array)), weights_only=True)
    assert (found.dtype, found.shape, found.is_contiguous()) == (torch.float32, (3, 300), True)
    np.testing.assert_array_equal(found.numpy(), array)


def sent(folder):
    """The request in an export."""
    return json.loads((folder / "request.json").read_text())


def run_client(folder, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["client.py", *arguments])
    runpy.run_path(str(folder / "client.py"), run_name="__main__")


def test_the_client_asks_a_server(exported, monkeypatch, capsys):
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            data = json.dumps({"choices": [{"message": {"content": "90 cm"}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format, *args):
            pass

    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        run_client(exported, monkeypatch, f"http://127.0.0.1:{server.server_port}/v1", "How long?")
    assert capsys.readouterr().out == "90 cm\n"
    ((path, body),) = asked
    assert path == "/v1/chat/completions"
    (message,) = body["messages"]
    sigma, question = message["content"]
    assert sigma == sent(exported)["messages"][0]["content"][0]
    assert sigma["type"] == "prompt_embeds"
    assert "refused" not in body
    # The server puts one end of a line between two parts of a template that takes texts.
    assert question == {"type": "text", "text": "\nHow long?"}
    assert "--chat-template-content-format string" in (exported / "README.md").read_text()
    assert "vLLM itself was not run" in (exported / "README.md").read_text()
    served = f"llama-{model('llama').fingerprint[:8]}"  # another server does not know it
    assert body["model"] == served
    assert f"--served-model-name {served} " in (exported / "README.md").read_text()
    assert body["temperature"] == 0
    assert body["stop_token_ids"] == list(model("llama").stop_ids)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize("word", ["<|im_end|>", "<|im_start|>", "<prompt_embeds>"])
def test_a_question_with_a_control_token_is_refused(exported, monkeypatch, word):
    with pytest.raises(SystemExit, match="a control token; take it out"):
        run_client(exported, monkeypatch, "http://127.0.0.1:1/v1", f"What is {word}?")


def with_template(template, monkeypatch, **chat):
    """The prompt and the model, with another chat template."""
    monkeypatch.setattr(check, "_read_there", lambda *_: {"missing": "torch"})
    own, given = (
        prompt("llama", "embedding"),
        dataclasses.replace(model("llama"), tokenizer=tokenizer(template)),
    )
    manifest = {**own.manifest, "slots": {**own.manifest["slots"], **chat}}
    manifest["tokenizer"] = {"fingerprint": tokenizer_fingerprint(given.tokenizer)}
    return dataclasses.replace(own, manifest=manifest), given


def test_a_template_that_takes_parts_is_given_all_of_the_text(monkeypatch, tmp_path):
    own, given = with_template(PARTS, monkeypatch)
    out = export(own, given, "vllm", tmp_path / "out").folder
    assert "--chat-template-content-format openai" in (out / "README.md").read_text()
    assert sent(out)["messages"][0]["content"][1]["text"] == "\n\n"


def test_the_word_of_what_is_unknown_is_refused_too(monkeypatch, tmp_path):
    """It may be the one that ends a text, as SmolLM2's; jaxsp's own question may have it."""
    own, given = with_template(CHAT_TEMPLATE, monkeypatch)
    assert given.tokenizer is not None
    given.tokenizer.unk_token = "<|endoftext|>"
    out = export(own, given, "vllm", tmp_path / "out").folder
    assert "<|endoftext|>" in sent(out)["refused"]


@pytest.mark.parametrize("case", ["no template", "a system text", "another template"])
def test_a_chat_that_a_server_lays_out_otherwise_is_refused(monkeypatch, tmp_path, case):
    template, chat = CHAT_TEMPLATE, {}
    if case == "no template":
        template = None
    elif case == "a system text":
        before = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        chat = {"before": before, "before_ids": tokenizer().encode(before)}
    else:
        template = template.replace("assistant", "model")
    own, given = with_template(template, monkeypatch, **chat)
    with pytest.raises(UserError, match="A server would not lay out the chat with llama as this prompt was"):
        export(own, given, "vllm", tmp_path / "out")
    assert not list(tmp_path.iterdir())
