"""The README of a saved prompt: what it says, and that nobody's own is written over."""

from __future__ import annotations

import logging

import pytest

from jaxsp.artifact import CARD
from jaxsp.exports import EXPORTS, readme
from jaxsp.runs.folder import Result, RunFolder
from jaxsp.terminal import say_once
from tests.test_files import prompt

REPORT = {
    "held_out": {"brackets": {"prompt": {"kl": 0.25}, "no_context": {"kl": 1.5}}},
    "teacher": {"text": "The model itself is right."},
    "verdict": {"text": "A good stand-in."},
    "queries": [{"query": "How\x1b long?", "captured": False}, {"query": "How wide?", "captured": True}],
}
FAILED = {"id": "a", "error": "the loss was \x1bnan", "steps": 0}


def save(folder, **changes):
    Result(prompt(**changes), FAILED, [{"step": 0}]).save(folder)


def test_it_says_what_the_prompt_is_what_was_lost_and_what_loads_it():
    found = readme.text(prompt(model={"name": "/home/me/small-model", "fingerprint": "f" * 64}), REPORT)
    assert "# A soft prompt for small-model\n" in found
    assert "3 slots of kind embedding were learnt by jaxsp and stand in for a document of 9 tokens" in found
    assert "The document lies beside it" in found
    assert "`/home/me/small-model`, weights with the fingerprint `" + "f" * 64 in found
    assert "add `--model DIR`" in found
    assert 'jaxsp ask . "How long is the cable?"\njaxsp serve . ' in found
    for to, export in EXPORTS.items():
        assert f"| {to} | `jaxsp export . --to {to} --out {to}/` | {export.LOADED_BY} |" in found
        script = next(iter(export.SCRIPTS))
        assert to == "peft" or f"{to}/{script}" in export.LOADED_BY
    assert "| prompt | 0.250 |\n| no context | 1.500 |" in found
    assert "\n\nThe model itself is right.\n\nA good stand-in.\n" in found
    assert "facts are lost (1):\n\n- How␛ long?\n" in found
    assert "wide" not in found
    assert "| held-out queries with | KL, nats a token |" in found
    assert "Taught by" not in found


def test_a_teacher_of_another_vocabulary_is_named_and_what_is_measured_beside_it():
    found = readme.text(prompt(), {**REPORT, "taught_by": {"name": "large\x1b", "signal": "answers"}})
    assert "Taught by `large␛`." in found
    assert "| held-out queries with | NLL of the teacher's answers, nats a token |" in found


def test_what_a_run_saves_has_one_and_a_later_run_writes_it_anew(tmp_path):
    save(tmp_path)
    first = (tmp_path / CARD).read_text()
    assert first.startswith(readme.text(prompt(), FAILED))
    assert "## Not measured\n\nIts training failed: the loss was ␛nan\n" in first
    save(tmp_path, prompt_length=3, context_tokens=7)
    assert "a document of 7 tokens" in (tmp_path / CARD).read_text()
    RunFolder(tmp_path).start({})
    assert not (tmp_path / CARD).exists()


def test_a_prompt_saved_alone_leaves_none_of_an_earlier_one(tmp_path):
    save(tmp_path)
    prompt(context_tokens=7).save(tmp_path)
    assert not (tmp_path / CARD).exists()
    (tmp_path / CARD).write_text("My notes.\n")
    prompt(context_tokens=8).save(tmp_path)
    assert (tmp_path / CARD).read_text() == "My notes.\n"


@pytest.mark.parametrize("change", [
    lambda text: "My notes.\n",
    lambda text: text + "More.\n",
    lambda text: text.replace("9 tokens", "8 tokens"),
    lambda text: "",
], ids=["another's", "more at the end", "a word", "empty"])  # fmt: skip
def test_one_that_somebody_else_wrote_or_changed_stays_and_that_is_said(tmp_path, change, caplog):
    save(tmp_path)
    own = change((tmp_path / CARD).read_text())
    (tmp_path / CARD).write_text(own)
    say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="jaxsp"):
        save(tmp_path, context_tokens=7)
    assert caplog.messages == [
        f"{tmp_path / CARD} was not written by jaxsp, or was changed since: it stays as it is."
    ]
    RunFolder(tmp_path).start({})
    assert (tmp_path / CARD).read_text() == own


def test_a_folder_of_that_name_stays(tmp_path):
    (tmp_path / CARD).mkdir()
    save(tmp_path)
    assert (tmp_path / CARD).is_dir()
