"""experiments.decoder_speed: how many tokens a second questions are written at."""

from __future__ import annotations

import types

import pytest

import jaxsp
from experiments.decoder_speed import experiment, questions
from experiments.suite import Run
from jaxsp import demo


def test_all_that_the_seeds_begin_is_written_and_its_tokens_are_counted(monkeypatch, tmp_path):
    calls = []

    def completed(model, preamble, drafts, text, key, on_written):
        calls.append((drafts, text))
        for _ in drafts:
            on_written(5)

    model = types.SimpleNamespace(name="tiny", encode_context=str.split)
    monkeypatch.setattr(jaxsp, "load_model", lambda dtype: model)
    monkeypatch.setattr(questions, "read_preamble", lambda model: None)
    monkeypatch.setattr(questions, "completed", completed)
    found = experiment.measure("questions", Run(full=True, out=tmp_path))
    assert len(calls) == 4  # one before those that count
    drafts, text = calls[0]
    assert text == demo.read()[0]
    assert all(draft.source for draft in drafts)
    assert len({draft.sentences for draft in drafts}) > 15
    assert found["tokens"] == 5 * len(drafts) == 5 * found["questions"]
    line = questions.line({**found, "seconds": 2.0})
    assert line.endswith(f"{found['tokens']:,} tokens written in 2.0 s, {found['tokens'] / 2:,.0f} tokens/s.")


@pytest.mark.parametrize("name", experiment.PARTS)
def test_every_part_is_a_setting(name):
    assert name in experiment.EXPERIMENT.settings
