"""Asks a vLLM server with the soft prompt of this folder: python client.py "How long is the cable?"."""

import json
import os
import sys
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent


def body(question, max_tokens=128):
    """The request for the greedy answer to a question."""
    chat = json.loads((HERE / "chat.json").read_text("utf-8"))
    if odd := [word for word in chat["refused"] if word in question]:
        raise ValueError(f"The question holds {odd[0]!r}, a control token; take it out.")
    sigma = {"type": "prompt_embeds", "data": (HERE / "prompt_embeds.b64").read_text()}
    content = [sigma, {"type": "text", "text": chat["lead"] + question}]
    options = {name: chat[name] for name in ("stop_token_ids", "chat_template_kwargs")}
    options |= {"temperature": 0, "repetition_penalty": 1, "max_tokens": max_tokens}
    return {"messages": [{"role": "user", "content": content}], **options}


def ask(question, url="http://localhost:8000/v1", key="EMPTY"):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    data = json.dumps(body(question)).encode()
    request = urllib.request.Request(f"{url}/chat/completions", data, headers)
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]["message"]["content"]


if __name__ == "__main__":
    print(ask(" ".join(sys.argv[1:]), os.environ.get("VLLM_URL", "http://localhost:8000/v1")))
