"""Asks a vLLM server with the soft prompt of this folder: python client.py URL "How long is the cable?"."""

import json
import sys
from pathlib import Path

import openai

SENT = json.loads(Path(__file__).with_name("request.json").read_text("utf-8"))
if odd := [word for word in SENT.pop("refused") if word in sys.argv[2]]:
    sys.exit(f"The question holds {odd[0]!r}, a control token; take it out.")
SENT["messages"][0]["content"][1]["text"] += sys.argv[2]
print(openai.OpenAI(base_url=sys.argv[1]).chat.completions.create(**SENT).choices[0].message.content)
