"""experiments.instructions: its texts are sound, its formats tell what keeps them, and it runs."""

from __future__ import annotations

import re

import pytest

from experiments.instructions.experiment import ANSWERED, EXPERIMENT, FORMATS, measure, table
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


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_small_setting(tmp_path):
    found = measure("json", Run(full=False, out=tmp_path))
    assert found["held_out_queries"] == 4
    for condition in ANSWERED:
        assert 0 <= found[condition]["format"] <= 1
        assert 0 <= found[condition]["right"] <= 1
    assert "| json | " in table({"json": found})
