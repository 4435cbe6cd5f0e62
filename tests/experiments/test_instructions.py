"""experiments.instructions: its texts are sound, its formats tell what keeps them, and it runs."""

from __future__ import annotations

import re
import types

import pytest

import jaxsp
from experiments.instructions.experiment import ANSWERED, EXPERIMENT, FORMATS, KEPT, is_right, measure, table
from experiments.suite import HERE, Run
from jaxsp.data.documents import read_context, read_queries


@pytest.mark.parametrize("name", EXPERIMENT.settings)
def test_the_context_keeps_its_own_format_and_no_held_out_query_is_trained_on(name):
    folder = HERE / "instructions" / name
    context = read_context(folder / "context.md")
    queries, held_out = (read_queries(folder / f"{part}.jsonl") for part in ("queries", "held_out"))
    assert len({query.text for query in [*queries, *held_out]}) == len(queries) + len(held_out)
    asked = queries[0].text.rsplit("\n", 1)[1]  # as the examples have it before each answer
    examples = re.findall(rf"{re.escape(asked)} (.+)", context)
    assert len(examples) >= 3
    assert all(map(FORMATS[name], examples))
    assert not FORMATS[name]("It is a nice day.")


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ('{"item": "mug", "count": 2, "urgent": true}', True),
        ('{"item": "mug", "count": "2", "urgent": true}', False),
        ('{"item": "mug", "count": 2}', False),
        ('{"item": "mug", "count": 2, "urgent": true} Thanks!', False),
        ('["mug", 2, true]', False),
    ],
)
def test_an_order_has_the_keys_and_their_types(answer, kept):
    assert FORMATS["json"](answer) is kept


def test_answers_are_counted(monkeypatch, tmp_path):
    """Those that keep the format, and those that are right, after the context, after σ and without."""

    def compress(model, context, queries, held_out, **settings):
        said = {
            "full_context": '{{"item": "x", "count": {}, "urgent": true}}',
            "prompt": "count {}",
            "no_context": "",
        }
        rows = [
            {"split": "held_out", "query": q.text}
            | {f"answer_{name}": text.format(q.expect[0].split()[1]) for name, text in said.items()}
            for q in held_out
        ]
        report = {**dict.fromkeys(KEPT, 1), "gap_closed": {"value": 0.5, "low": 0.4, "high": 0.6}}
        return types.SimpleNamespace(report={**report, "queries": [*rows, {"split": "train"}]})

    monkeypatch.setattr(jaxsp, "compress", compress)
    found = measure("json", Run(full=True, out=tmp_path))
    assert found["held_out_queries"] == 40
    assert [(found[c]["format"], found[c]["right"]) for c in ANSWERED] == [(1, 1), (0, 1), (0, 0)]
    assert "| 100% / 0% / 0% | 100% / 100% / 0% |" in table({"json": found})


@pytest.mark.parametrize(
    ("answer", "expect", "right"),
    [
        ("Payment", ["payment"], True),
        ("It is about payment.", ["payment"], True),
        ("Payment\n\nDelivery\n\nRepair\n\nAccount", ["payment"], False),
        ("Repair", ["payment"], False),
        ('{"item": "mug", "count": 8, "urgent": false}', ["count 8"], True),
        ('{"item": "mug", "count": 3, "urgent": false}', ["count 8"], False),
    ],
)
def test_an_answer_that_names_every_group_is_not_right(answer, expect, right):
    assert is_right(answer, expect) is right
