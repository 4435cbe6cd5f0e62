"""Command lines that can't be meant: each is one sentence with exit code 2, and no model is loaded."""

from __future__ import annotations

import errno
import itertools
import json
import shlex
from pathlib import Path

import pytest

from tests import tiny
from tests.test_files import prompt, result

TABLE = Path(__file__).with_name("command_lines.txt")
"""A line each: the words after ``jaxsp``, ``=>``, and what the sentence says."""

WHOLE = [
    "prompt-length", "rank", "study-queries", "max-answer-tokens", "teacher-context", "steps",
    "on-policy-every", "batch-size", "seed", "evaluate-every", "patience", "grad-accumulation",
    "checkpoint-every",
]  # fmt: skip
NUMBERS = ["on-policy", "learning-rate", "warmup-fraction", "weight-decay", "max-grad-norm"]
TEXTS = [
    "kind",
    "initial",
    "artifact-dtype",
    "study",
    "answers",
    "objective",
    "optimizer",
    "keep",
    "parallel",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that the commands run in: files and folders that the table names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXSP_TEACHER_CACHE", str(tmp_path / "teachers"))
    texts = {
        "c.txt": "The tank holds 1.2 litres.", "q.txt": "How much?\nWhat for?", "empty.txt": " \n",
        "list.jsonl": "[1]", "number.jsonl": "3", "null.jsonl": "null",
        "cut.jsonl": '{"query": "a"', "nan.jsonl": '{"query": NaN}', "deep.jsonl": "[" * 100_000,
        "key.jsonl": '{"query": "a", "anwser": "b"}', "number_query.jsonl": '{"query": 3}',
        "no_answer.jsonl": '{"query": "a", "answer": " "}', "expect.jsonl": '{"query": "a", "expect": [3]}',
        "span.jsonl": '{"query": "a", "span": [1]}', "seed.jsonl": '{"query": "a", "seed": 3}',
        "rows.jsonl": json.dumps({"id": "a", "context": "b"}),
    }  # fmt: skip
    for name, text in texts.items():
        Path(name).write_text(text, "utf-8")
    Path("latin.txt").write_bytes("Zürich".encode("latin-1"))
    Path("binary.txt").write_bytes(b"a\0b")
    Path("full").mkdir()
    Path("full/notes").touch()
    prompt().save("prompt")
    prompt(kind="spiral").save("odd")
    result(Path("failed"))
    for name, change in {
        "cut": lambda f: (f / "manifest.json").write_text("{"),
        "flipped": lambda f: (f / "prompt.safetensors").write_bytes(b"x"),
        "edited": lambda f: (f / "context.txt").write_text("x"),
        "bare": lambda f: (f / "prompt.safetensors").unlink(),
        "later": lambda f: (f / "manifest.json").write_text(
            json.dumps({**json.loads((f / "manifest.json").read_text()), "format": 9, "seal": None})
        ),
    }.items():
        prompt().save(name)
        change(Path(name))
    tiny.write(tmp_path / "model")
    for name, text in {"no_json": "{", "no_object": "[]", "no_family": '{"model_type": "bert"}'}.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(text)
    return tmp_path


def refusals(jaxsp_command, lines: list[tuple[list[str], str]]) -> list[str]:
    """Faults of the answers to these lines; none if each is one sentence."""
    wrong = []
    for words, expected in lines:
        try:
            code, out, err = jaxsp_command(*words)
        except Exception as error:
            wrong.append(f"{words}: {error!r}")
            continue
        said = err.strip().splitlines()
        if code != 2 or out or len(said) != 1 or not said[0].startswith("jaxsp: ") or expected not in said[0]:
            wrong.append(f"{words}: {code} {out!r} {err!r}, not {expected!r}")
    return wrong


def test_every_line_of_the_table_is_refused_in_one_sentence(folder, jaxsp_command):
    lines = []
    for line in TABLE.read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            words, _, expected = line.partition(" => ")
            lines.append((shlex.split(words.replace("LONG", "x" * 300)), expected.strip()))
    assert len(lines) > 100
    wrong = refusals(jaxsp_command, lines)
    assert not wrong, "\n".join(wrong)


def test_every_option_refuses_what_it_can_not_be(folder, jaxsp_command):
    bad = [
        *itertools.product(WHOLE, ("two", "1.5", "", "nan", "-7", "99999999999999999999999")),
        *itertools.product(NUMBERS, ("two", "", "nan", "inf", "-0.5", "1e999")),
        *itertools.product(TEXTS, ("", "nonsense", "σ", "kl=")),
    ]
    lines = []
    for name, value in bad:
        if (name, value) not in {("seed", "-7"), ("objective", "kl=")}:
            said = name.replace("-", " ") if name in TEXTS else f"--{name}"
            lines.append((["plan", "model", f"--{name}={value}"], said))
    assert len(lines) > 120
    wrong = refusals(jaxsp_command, lines)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device."),
        (OSError(errno.EIO, "Input/output error"), "Input/output error."),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied."),
        (OSError("odd"), "odd."),
        (MemoryError(), "The device has not enough memory (MemoryError); "),
        (OverflowError("too large\nfor it"), "The device has not enough memory (too large); "),
    ],
    ids=repr,
)
def test_what_the_system_refuses_in_any_command_is_one_sentence(
    folder, jaxsp_command, monkeypatch, error, said
):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("jaxsp.plan.plan", refuse)
    code, out, err = jaxsp_command("plan", "model")
    assert (code, out) == (2, "")
    assert err.startswith(f"jaxsp: {said}")
    assert err.count("\n") == 1
