"""Certainty of answers, and the share of them that a calibration sends to the document."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from jaxsp import distributions
from jaxsp.artifact import SoftPrompt
from jaxsp.data.examples import make_rows
from jaxsp.errors import Damaged
from jaxsp.evaluation.certainty import SIGNAL, Calibration, calibrate, certainty, mark, summary
from jaxsp.teacher.answers import answer_ids, answers_with_log_probs
from jaxsp.typing import UserError
from tests.exports import consumer

NINE = Calibration(tuple(-float(n) for n in range(1, 10)), (False,) * 6 + (True,) * 3)
"""Nine answers, of which the three least sure are wrong."""


@pytest.mark.parametrize(
    ("share", "threshold", "sent", "caught"),
    [(0.15, -8.5, 1 / 9, 1 / 3), (0.25, -7.5, 2 / 9, 2 / 3), (0.3, -7, 2 / 9, 2 / 3), (0.35, -6.5, 3 / 9, 1),
     (0.55, -4.5, 5 / 9, 1), (0.01, -9, 0, 0), (0.99, -1, 8 / 9, 1)],
)  # fmt: skip
def test_the_least_sure_are_sent(share, threshold, sent, caught):
    assert NINE.threshold(share) == pytest.approx(threshold)
    assert NINE.caught(share) == pytest.approx((sent, caught))


def test_where_nothing_is_wrong_nothing_is_caught():
    assert Calibration((-1.0, -2.0), (False, False)).caught(0.5) == (0.5, None)


def test_other_queries_are_below_the_threshold_in_the_share_that_was_asked_for():
    """Whatever the number that it was calibrated on."""
    random = np.random.default_rng(0)
    for count in (10, 12, 40):
        drawn = random.random((4000, count))  # so that a threshold is the share below it
        for share in (0.1, 0.3):
            found = [Calibration(tuple(own), (False,) * count).threshold(share) for own in drawn]
            assert np.mean(found) == pytest.approx(share, abs=0.006)


def query(text: str, value: float | None, **more: Any) -> dict[str, Any]:
    own = {} if value is None else {"certainty": value}
    return {"query": text, "split": "held_out", "captured": True, **own, **more}


def test_a_wrong_answer_is_one_without_the_facts_or_else_without_what_is_decisive():
    queries = [
        query("a", -1.0, captured=False),
        query("b", -2.0, captured=False, right_prompt=True),
        query("c", -3.0, right_prompt=False),
        query("d", -4.0, right_prompt=None),
        query("e", -5.0, trained_on=True),
        query("f", None, split="train"),
    ]
    found = Calibration.of_queries(queries)
    assert found == Calibration((-1.0, -2.0, -3.0, -4.0), (True, False, True, False))
    assert Calibration.of_queries(queries[4:]) is None
    assert summary(queries[4:]) is None


def test_held_out_queries_are_marked_and_summed_up():
    queries = [query("a", None, split="train"), *(query(str(n), None, captured=n > 2) for n in range(1, 13))]
    found = mark(queries, [float(n - 13) for n in range(1, 13)])
    assert "certainty" not in queries[0]
    assert [q["certainty"] for q in queries[1:3]] == [-12, -11]
    assert found is not None
    assert (found["signal"], found["certainties"][0]) == (SIGNAL, -12)
    assert found["wrong"] == [True] * 2 + [False] * 10
    assert "the 1 of 12 held-out queries on which σ is least sure" in found["text"]
    assert "1 of its 2 wrong answers are among them" in found["text"]
    assert mark([query("a", None)], None) is None
    with pytest.raises(ValueError, match="zip"):
        mark(queries, [1.0])


def saved(fallback: Any, folder: Any) -> SoftPrompt:
    prompt = consumer.prompt("llama", "nested")
    dataclasses.replace(prompt, manifest={**prompt.manifest, "fallback": fallback}).save(folder)
    return SoftPrompt.load(folder)


def test_a_prompt_keeps_its_calibration(tmp_path):
    stored = mark([query("a", None), query("b", None, captured=False)], [-0.123456789, -2.0])
    found = saved(stored, tmp_path)
    assert Calibration.of(found) == Calibration((-0.123456789, -2.0), (False, True))
    assert Calibration.of(found.cut(found.prompt_length)) == Calibration.of(found)
    with pytest.raises(UserError, match=r"one of the shorter ones of a nested prompt, which are not"):
        Calibration.of(found.cut(2))


def test_an_evaluation_calibrates_a_saved_prompt(tmp_path):
    """Its manifest says the same of all else, and its arrays stay as they are."""
    before = saved(None, tmp_path)
    arrays = (tmp_path / "prompt.safetensors").read_bytes()
    found = mark([query("a", None), query("b", None, captured=False)], [-1.0, -2.0])
    calibrate(tmp_path / "manifest.json", {"fallback": found})
    after = SoftPrompt.load(tmp_path)
    assert Calibration.of(after) == Calibration((-1.0, -2.0), (False, True))
    assert {**after.manifest, "fallback": None} == before.manifest
    assert (tmp_path / "prompt.safetensors").read_bytes() == arrays
    with pytest.raises(UserError, match="was trained on all of these queries"):
        calibrate(tmp_path, {"fallback": None})


@pytest.mark.parametrize(("fallback", "said"), [
    (None, "does not say when it is not sure: it was made by an older version"),
    (3, "damaged: fallback is 3"),
    ({}, "damaged: fallback is {}"),
    ({"signal": "mood"}, "calibrated by 'mood', which this version"),
    ({"signal": SIGNAL}, "has no certainties"),
    ({"signal": SIGNAL, "certainties": [], "wrong": []}, "has no certainties"),
    ({"signal": SIGNAL, "certainties": [-1.0], "wrong": []}, "has no certainties"),
    ({"signal": SIGNAL, "certainties": ["x"], "wrong": [True]}, "has no certainties"),
    ({"signal": SIGNAL, "certainties": [10**400], "wrong": [True]}, "has no certainties"),
    ({"signal": SIGNAL, "certainties": [-1.0], "wrong": [1]}, "has no certainties"),
])  # fmt: skip
def test_what_is_no_calibration_is_said(fallback, said, tmp_path):
    with pytest.raises(UserError, match=said) as found:
        Calibration.of(saved(fallback, tmp_path))
    assert isinstance(found.value, Damaged) == ("damaged" in str(found.value) or "no cert" in said)


def test_the_probabilities_of_answers_are_those_of_full_forward_passes():
    """Answers of several lengths, after several prefixes."""
    prompts = [consumer.prompt("llama", "per_head", bias=True), consumer.prompt("llama", "key_value")]
    model = consumer.model("llama").stopping_at(range(3, 60))  # some of its answers end early
    prefixes = distributions.KeyValues.alike([prompt.prefix(model) for prompt in prompts])
    queries = [prompts[0].chat.query_ids(model.tokenizer, f"What is fact {n}?") for n in range(4)] * 2
    after, several = [0] * 4 + [1] * 4, distributions.KeyValues.side_by_side(prefixes)
    answers, logs = answers_with_log_probs(model, several, queries, max_tokens=9, after=after)
    assert answers == answer_ids(model, several, queries, max_tokens=9, after=after)
    assert len(set(map(len, answers))) > 1
    for i, (ids, own) in enumerate(zip(answers, logs, strict=True)):
        rows = make_rows([queries[i]], [ids])
        expected = distributions.log_probs(model.params, model.config, prefixes[after[i]], rows)[0]
        np.testing.assert_allclose(own, np.asarray(expected)[np.arange(len(ids)), ids], atol=1e-4)
        assert certainty(own) == min(own)
    assert answers_with_log_probs(model, several, [], max_tokens=9, after=[]) == ([], [])
