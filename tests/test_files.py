"""jaxsp.files: all readers of JSON, and whatever may be wrong with a file; writes that leave no halves."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxsp import files
from jaxsp.artifact import SoftPrompt
from jaxsp.console import print_prompt
from jaxsp.data.documents import read_queries
from jaxsp.errors import Damaged, UserError
from jaxsp.models.lazy_tokenizer import LazyTokenizer
from jaxsp.models.load import model_config
from jaxsp.models.weights import weight_files
from jaxsp.runs.folder import Result, RunFolder, write_reports
from jaxsp.runs.job import read_rows
from jaxsp.study.questions import Study
from jaxsp.teacher import samples, targets
from jaxsp.teacher.store import Store
from jaxsp.training.slots import past_lines
from tests import tiny

SIGMA = {"embeddings": np.arange(12, dtype=np.float32).reshape(3, 4)}
CONTEXT = "The tank\r\nholds 1.2 litres.\n"


def prompt(**changes: Any) -> SoftPrompt:
    """A prompt of no model, for what reads and writes it."""
    slots = {"before": "a", "between": "b", "after": "c", "before_ids": [1, 2]}
    manifest: dict[str, Any] = {
        "format": 2, "kind": "embedding", "prompt_length": 3, "model": {"name": "m", "fingerprint": "f"},
        "tokenizer": {"fingerprint": "t"}, "slots": slots, "dtype": "float32", "context_tokens": 9,
    }  # fmt: skip
    return SoftPrompt(SIGMA, manifest | changes, CONTEXT)


def result(folder: Path) -> None:
    """A run whose training failed: it is saved without measurements."""
    Result(prompt(), {"id": "a", "error": "no", "steps": 1}, [{"step": 0}, {"step": 1, "loss": 0.5}]).save(
        folder
    )


def with_tokens(folder: Path) -> None:
    """An older run but for the tokens."""
    result(folder)
    (folder / "run" / "checksums.json").unlink()
    (folder / "tokens.json").write_text("[]")


def store_entry(folder: Path) -> None:
    Store(folder).write("key", {}, lambda entry: samples._write(entry, [[1, 2]]), samples._read)


def model(folder: Path) -> None:
    tiny.write(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    (folder / "tokenizer_config.json").write_text("{}")


def signals(folder: Path) -> None:
    (folder / "answers.json").write_text("[[1]]")
    (folder / "signals.json").write_text("{}")


def no_rows(answers: list[list[int]]) -> Any:
    """None: what is looked at here fails before rows are needed."""
    del answers


def in_rows(file: Path) -> None:
    """The rows' errors are said later, with the line."""
    ((where, row),) = read_rows(file)
    if isinstance(row, UserError):
        raise UserError(f"{where}: {row}")
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object.")


def test_a_result_saved_over_another_leaves_nothing_of_it(tmp_path):
    """Its pages and tokens would be taken for those of the new one."""
    result(tmp_path)
    for name in ("tokens.json", "report.html", "report.md"):
        (tmp_path / name).write_text("[]")
    assert Result.load(tmp_path).tokens is None  # the checksums don't name them
    result(tmp_path)
    assert not any((tmp_path / name).exists() for name in ("tokens.json", "report.html", "report.md"))


# Whatever reads JSON: what writes it into a folder, the file, and what reads it.
READERS: dict[str, tuple[Callable[[Path], Any], str, Callable[[Path], Any]]] = {
    "manifest": (lambda f: prompt().save(f), "manifest.json", SoftPrompt.load),
    "report": (result, "report.json", Result.load),
    "metrics": (result, "metrics.jsonl", Result.load),
    "checksums": (result, "run/checksums.json", Result.load),
    "tokens": (with_tokens, "tokens.json", Result.load),
    "lines": (result, "metrics.jsonl", lambda f: past_lines(f / "metrics.jsonl", 1)),
    "settings": (
        lambda f: RunFolder(f).start({"steps": 2}),
        "run/settings.json",
        lambda f: RunFolder(f).check_same({"steps": 2}),
    ),
    "store": (store_entry, "key/manifest.json", lambda f: Store(f).read("key", samples._read, "")),
    "samples": (lambda f: samples._write(f, [[1]]), "samples.json", samples._read),
    "answers": (signals, "answers.json", lambda f: targets.read(f, no_rows)),
    "layout": (signals, "signals.json", lambda f: targets.read(f, no_rows)),
    "study": (lambda f: Study([], [], {}, [], []).write(f), "study.json", Study.read),
    "config": (model, "config.json", model_config),
    "index": (model, "model.safetensors.index.json", weight_files),
    "tokenizer": (model, "tokenizer_config.json", LazyTokenizer),
    "queries": (
        lambda f: (f / "q.jsonl").write_text('{"query": "a"}'),
        "q.jsonl",
        lambda f: read_queries(f / "q.jsonl"),
    ),
    "rows": (
        lambda f: (f / "r.jsonl").write_text('{"id": "a"}'),
        "r.jsonl",
        lambda f: in_rows(f / "r.jsonl"),
    ),
}
DAMAGE: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "truncated": b'{"a": 1, "b',
    "not UTF-8": b'{"a": "\xff"}',
    "nested": b'{"a": ' + b"[" * 200_000,
    "NaN": b'{"a": NaN, "step": 0}',
    "infinite": b'{"step": 0, "a": 1e999}',
    "a number": b"3",
    "null": b"null",
    "a text": b'"a"',
    "binary": bytes(range(256)),
    "many digits": b'{"a": ' + b"9" * 9000 + b"}",
}
SIGNALS = ("answers.json", "signals.json")
HARMLESS = {
    # What was always there once is missed; numbers that are not finite harm neither; a text is a query.
    ("checksums", "missing"), ("lines", "missing"), ("index", "missing"), ("report", "NaN"),
    ("report", "infinite"), ("tokenizer", "NaN"), ("tokenizer", "infinite"), ("queries", "a text"),
    ("tokens", "missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_every_damage_to_a_file_is_one_sentence_with_its_path(name, tmp_path):
    write, place, read = READERS[name]
    file = tmp_path / place
    write(tmp_path)
    # Signals without any are none, which shows that they were read.
    with pytest.raises(ValueError, match="the signals") if place in SIGNALS else contextlib.nullcontext():
        read(tmp_path)
    checksums = tmp_path / "run" / "checksums.json"
    if name in ("report", "metrics", "lines"):
        checksums.unlink()  # as of an older run: the content itself is looked at
    for kind, data in DAMAGE.items():
        file.unlink(missing_ok=True)
        if data is not None:
            file.write_bytes(data)
        if (name, kind) in HARMLESS:
            read(tmp_path)
            continue
        with pytest.raises(UserError) as caught:
            read(tmp_path)
        message = str(caught.value)
        assert file.name in message, kind
        assert str(tmp_path) in message, kind
        assert "\n" not in message.strip(), kind
        assert message.endswith("."), kind


@pytest.mark.parametrize("depth", [900, 950, 970, 980, 990, 1000])
def test_json_that_is_nested_nearly_too_deeply(tmp_path, depth):
    """It is read, and what looks at it later goes less deep."""
    content = b'{"seal": "", "a": ' + b"[" * depth + b"]" * depth + b"}"
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(Damaged):
        files.unsealed(files.read_json(tmp_path / "a.json"), "a.json")
    with pytest.raises(Damaged):
        files.read_json(tmp_path / "a.json", list)


def test_reports_of_a_damaged_run_are_a_sentence_each(tmp_path):
    for name in ("a", "b"):
        result(tmp_path / name)
    (tmp_path / "a" / "report.json").write_text("{")
    _, problems = write_reports(tmp_path)
    assert [problem.split(" ")[0] for problem in problems] == [
        f"{tmp_path / 'a' / 'report.json'}",
        f"{tmp_path / 'b'}:",
    ]


# Artifacts


def test_what_is_read_is_what_was_saved(tmp_path):
    prompt().save(tmp_path)
    loaded = SoftPrompt.load(tmp_path)
    np.testing.assert_array_equal(loaded.sigma["embeddings"], SIGMA["embeddings"])
    assert loaded.context == CONTEXT
    loaded.save(tmp_path / "again")
    for name in ("manifest.json", "prompt.safetensors", "context.txt"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def unsealed(folder: Path, **changes: Any) -> None:
    """A manifest as older versions wrote it: with the prompt's checksum, and none of itself or the text."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["seal"], content["context_sha256"]
    (folder / "manifest.json").write_text(json.dumps(content | changes))


def test_an_artifact_without_a_seal_loads(tmp_path):
    prompt().save(tmp_path)
    unsealed(tmp_path)
    (tmp_path / "context.txt").write_text("Another.")
    assert SoftPrompt.load(tmp_path).context == "Another."


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_length": 4}, "has 3 slots, its manifest 4"),
        ({"prompt_length": "3"}, "prompt_length is '3'"),
        ({"prompt_length": True}, "prompt_length is True"),
        ({"kind": "key_value"}, "KeyError"),
        ({"kind": ["embedding"]}, "kind is"),
        ({"dtype": "int8", "model": 3}, "model is 3"),
        ({"model": {"name": 3, "fingerprint": "f"}}, "no text"),
        ({"slots": {"before_ids": 3}}, "no text"),
        ({"slots": {"before_ids": [], "after": 3}}, "no text"),
    ],
)
def test_an_artifact_is_what_its_manifest_says(tmp_path, changes, words):
    prompt().save(tmp_path)
    unsealed(tmp_path, **changes)
    with pytest.raises(Damaged, match=words):
        SoftPrompt.load(tmp_path)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((3, 4), np.nan, np.float32), "entries that are not finite"),
        (np.full((3, 4), -np.inf, np.float32), "entries that are not finite"),
        (np.zeros((3, 4), np.float16), "is float16, by its manifest float32"),
        (np.zeros((3, 4), np.int8), "is int8, by its manifest float32"),
        (np.float32(3), "is damaged"),
    ],
)
def test_arrays_that_are_no_prompt(tmp_path, monkeypatch, array, words):
    with monkeypatch.context() as patch:
        patch.setattr("jaxsp.artifact.storage.pack", lambda sigma, dtype: {"embeddings": array})
        prompt().save(tmp_path)
    with pytest.raises(Damaged, match=words):
        SoftPrompt.load(tmp_path)


def test_the_text_is_the_one_that_was_saved(tmp_path):
    prompt().save(tmp_path)
    (tmp_path / "context.txt").write_text(CONTEXT.replace("1.2", "1.3"))
    with pytest.raises(Damaged, match=r"context\.txt is damaged: .*; put back .* or take the file away\.$"):
        SoftPrompt.load(tmp_path)
    (tmp_path / "context.txt").unlink()
    assert SoftPrompt.load(tmp_path).context is None


# Writing


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: order.append("fsync") or fsync(handle))
    monkeypatch.setattr(Path, "replace", lambda self, to: order.append("rename") or replace(self, to))
    files.atomic_write(tmp_path / "a", "text")
    assert order == ["fsync", "rename"]


def test_a_write_that_fails_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "a"
    files.atomic_write(file, "old")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(UserError, match=rf"^{file}: No space left on device; make room\.$"),
        files.os_errors_as_user_errors(advice="make room"),
    ):
        files.atomic_write(file, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_json_is_read_in_one_place():
    """But for a stranger's template, which has a process of its own, and exports, which know no jaxsp."""
    package = Path(files.__file__).parent
    reading = [file for file in package.rglob("*.py") if "json.load" in file.read_text("utf-8")]
    assert sorted(str(file.relative_to(package)) for file in reading) == [
        "exports/consumers/check.py",
        "exports/consumers/question.py",
        "exports/consumers/transformers.py",
        "exports/consumers/vllm.py",
        "files.py",
        "models/chat_renderer.py",
    ]


def test_a_report_may_say_any_number_of_steps(tmp_path):
    result(tmp_path)
    (tmp_path / "run" / "checksums.json").unlink()
    for steps in (2**40, [], "1", None, 1.5):
        (tmp_path / "report.json").write_text(json.dumps({"error": "no", "steps": steps}))
        with pytest.raises(Damaged, match="lacks lines"):
            Result.load(tmp_path)


def test_what_is_shown_of_an_odd_manifest_is_one_sentence():
    for training in ({}, {"objective": "kl", "steps": 1, "learning_rate": [], "seed": 0}):
        with pytest.raises(Damaged, match=r"manifest\.json is damaged \((KeyError|TypeError): "):
            print_prompt(prompt(training=training))
