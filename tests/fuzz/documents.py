"""Sound files of the kinds that users give."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, cast

TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}",
    "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}"
    "{{ m['content'] }}{{ ns.n }}"
    "{%- if loop.last and add_generation_prompt %}<a>{% endif %}{%- endfor -%}",
    "{% macro say(m) %}{{ m.content[:9] | upper }}{% endmacro %}"
    "{% for i in range(3) %}{{ say(messages[0]) }}{% endfor %}",
]
LINES = ["How much?\nHow long is the cable?\n\nWhat for? σ\n", "Why?"]
_ROWS: list[dict[str, Any]] = [
    {"query": "How much?", "answer": "1.2 l", "expect": ["1.2", "/1[.,]2/"], "seed": "facts", "span": [0, 9]},
    {"question": "How long?", "answers": {"text": ["90 cm", "90"], "answer_start": [3]}, "id": 7},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Why?"},
                  {"role": "assistant", "content": "So."}]},
    {"prompt": "Who?", "completion": "I.", "score": 0.5, "tags": ["a", {"b": None}]},
]  # fmt: skip
JSON_LINES = ["".join(json.dumps(row) + "\n" for row in _ROWS), '"How?"\n"Why?"\n']
ARRAYS = [json.dumps(_ROWS), json.dumps(_ROWS, indent=1), '["How?", "Why?"]']
CSV = [
    'query,answer,expect\nHow much?,1.2 l,1.2\n"How, then?","so ""so""\nand so",\n',
    "id;question;answers\n1;How?;So.\n2;Why?;\n\n",
    "\ufeffprompt\nHow?\n",
]
TSV = ["question\tanswer\nHow?\tSo.\nWhy?\t\n", 'question\tq\n"a\tb"\tc\n']
TEXTS = ["# Title\n\nThe tank holds 1.2 litres.\n", "\ufeffσ\r\n\ttext\u2028more"]
PAGES = [
    "<!DOCTYPE html><html><head><title>T</title><style>a{}</style></head><body><h1>Cups</h1>"
    "<p>Small &amp; red."
    "<ul><li>One<ul><li>in</ul><li>Two</ul><ol><li>a</ol><table><tr><th>a<td>b</tr><tr><td>1|2<td>3</table>"
    "<pre>x = 1\n  y</pre><script>let x = '<p>'</script><!-- no --><br>end &#955; &lt;</body></html>",
    "<html><table><tr><td><table><tr><td>in</table></table><svg><text>no</text></svg><p>x<p>y</html>",
    '<?xml version="1.0"?><!-- a --><html xmlns="x"><body><div><![CDATA[x]]>y</div></body></html>',
]
NOTEBOOKS = [
    json.dumps(
        {
            "cells": [
                {"cell_type": "markdown", "metadata": {}, "source": ["# A\n", "text"]},
                {"cell_type": "code", "execution_count": 1, "outputs": [], "source": "a = 1\n```\n"},
                {"cell_type": "raw", "source": []},
            ],
            "metadata": {},
            "nbformat": 4,
        }
    )
]
EXPECTED = [
    json.dumps([{"query": "a", "expect": expect}])
    for expect in (["4.5", "/4[.,]5 kg/"], "/(?:249|250) ?(?P<unit>euros?|EUR)\\b/",
                   ["/^it .*[0-9]+/", "kg", "σ"],
                   "/(a|b)*c{1,3}?(?=x)|\\d+(?<!9)/")
]  # fmt: skip


def _pdf() -> bytes:
    stream = b"BT /F1 12 Tf 9 9 Td (The cable is 90 cm long.) Tj ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 50] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >> stream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, places = b"%PDF-1.4\n", []
    for i, content in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj %s endobj\n" % (i, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(data)
    return data + b"xref\n0 6\n0000000000 65535 f \n" + table + end


PDF = _pdf()


def parquets(folder: Path) -> list[bytes]:
    """Tables with columns of many types."""
    import datetime

    import pyarrow
    import pyarrow.parquet

    found = []
    for columns, options in (
        ({"query": ["How?", "Why?", None], "answer": ["So.", None, ""]}, {}),
        ({"question": ["How?"], "answers": [{"text": ["a", "b"], "start": [1, 2]}]}, {"compression": "none"}),
        ({"prompt": ["How?"] * 50, "n": list(range(50)), "expect": [["a"]] * 50}, {"compression": "gzip"}),
        ({"messages": [[{"role": "user", "content": "How?"}]]}, {"use_dictionary": False}),
        ({"query": [b"\xff\xfe", b"a"], "answer": [1, 2]}, {}),
        ({"query": ["a"], "answer": [datetime.datetime(2020, 1, 1)]}, {"data_page_version": "2.0"}),
    ):
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), sink, **cast("Any", options))
        found.append(sink.getvalue())
    return found


COMMANDS = [
    "\n".join(line.split())
    for line in (
        "compress manual.md --queries q.txt --prompt-length 32 --objective kl=0.7,nll=0.3 --out p/ --seed 3",
        "compress-many jobs.jsonl --at-once 8 --keep-going --learning-rate 0.1 --resume",
        "plan model --batch-size 4 --steps 10 --json",
        "ask prompt/ How long?",
        "questions manual.md --out z.jsonl",
        "evaluate prompt/ --queries q.txt --json",
        "inspect prompt/",
        "report many/",
        "cache prune --max-size 2.5",
        "demo --steps 20 --out try/",
        "compress - --template-option enable_thinking=true --slot system --mesh data=2",
    )
]
JOBS = [
    {
        "id": "a", "context": "The tank holds 1.2 litres, and the cable is 90 cm long.",
        "queries": ["How much?", "How long?"], "held_out": ["What?"], "prompt_length": 4,
        "objective": "kl=0.5,nll=0.5", "learning_rate": 0.1,
    },
    {
        "id": "b", "context": "The lid is made of steel and of glass, as is the cup.", "held_out": 0.5,
        "queries": [{"query": "Of what?", "answer": "Steel.", "expect": ["/ste+l/"]}, "Who?"],
        "prompt_length": 3, "steps": 3,
    },
]  # fmt: skip

_SAMPLING = {"max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["\\n", "b"], "n": 1}
CHATS = [
    json.dumps({"model": "a", "messages": messages, **_SAMPLING, **more})
    for messages in (
        [{"role": "user", "content": "Hi"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "One?"}]},
            {"role": "assistant", "content": None, "refusal": None},
            {"role": "user", "content": "Zwölf 🙂?", "name": "Ann"},
        ],
    )
    for more in (
        {"logprobs": True, "top_logprobs": 2},
        {"stream": True, "stream_options": {"include_usage": True}},
    )
]
COMPLETIONS = [json.dumps({"model": "a", "prompt": prompt, **_SAMPLING}) for prompt in ("Hi", ["Hi"], [1, 2])]
