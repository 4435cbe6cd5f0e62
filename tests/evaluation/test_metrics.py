"""Metrics, the bootstrap and the verdict."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsp.evaluation.metrics import ANSWER_METRICS, Answer, gap_closed, rouge_l
from jaxsp.evaluation.report import _verdict


def test_rouge_l():
    assert rouge_l("a b c d", "a b c d") == 1.0
    assert rouge_l("a b c d", "D C b a") == pytest.approx(2 * 1 / 8)
    assert rouge_l("the cat sat on the mat", "the cat lay on a mat") == pytest.approx(2 * 4 / 12)
    assert rouge_l("Price: 9 euros.", "price 9 EUROS") == 1.0
    assert rouge_l("something", "") == 0.0
    assert rouge_l("", "!") == 1.0


@pytest.mark.parametrize("name", ANSWER_METRICS)
def test_metrics_of_answers_lie_between_the_same_answer_and_another(name):
    """The contract over the table: what it says of equal answers, it says of no others."""
    metric = ANSWER_METRICS[name]
    same, other = Answer([1, 2], "a b"), Answer([7, 8, 9], "c d e")
    best, worst = metric(same, same), metric(same, other)
    assert {best, worst} == {0.0, 1.0}
    assert metric(other, other) == best
    assert metric(same, Answer([], "")) == worst
    assert isinstance(best, float)


def test_sequence_mismatch():
    mismatch = ANSWER_METRICS["sequence_mismatch"]
    for ids, expected in (([1, 2], 0.0), ([1, 2, 3], 1.0), ([1, 3], 1.0)):
        assert mismatch(Answer([1, 2], "x"), Answer(ids, "x")) == expected


def test_gap_closed_weighs_tokens_not_queries():
    counts = np.array([1.0, 9.0])
    gap = gap_closed((np.array([1.0, 0.9]), counts), (np.array([2.0, 9.0]), counts))
    assert gap["value"] == pytest.approx(1 - 1.9 / 11)
    assert gap["low"] <= gap["value"] <= gap["high"]


def test_gap_closed_interval_covers_and_narrows():
    """About 95% of the intervals of 200 experiments with a known gap hold it."""
    random = np.random.default_rng(0)
    held, widths = 0, {20: [], 200: []}
    for i in range(200):
        for n in widths:
            theirs = random.gamma(4.0, 0.5, n)
            ours = theirs * random.uniform(0.0, 0.4, n)  # true gap 0.8
            ones = np.ones(n)
            gap = gap_closed((ours, ones), (theirs, ones), seed=i)
            widths[n].append(gap["high"] - gap["low"])
            held += n == 200 and gap["low"] <= 0.8 <= gap["high"]
    assert 180 <= held <= 199
    assert np.mean(widths[200]) < 0.45 * np.mean(widths[20])


def query(split, kl, captured):
    return {"query": f"{split} {kl}", "split": split, "kl": kl, "captured": captured}


def verdict(gap, queries, truncated=1.0, learnt=1.0, kind="per_head"):
    ours = float(np.mean([q["kl"] for q in queries if q["split"] == "held_out"]))
    brackets = {"prompt": {"kl": ours}, "truncated_context": {"kl": truncated}}
    return _verdict(
        {
            "queries": queries,
            "gap_closed": {"value": gap, "low": gap - 0.1, "high": gap + 0.1},
            "held_out": {"brackets": brackets},
            "train": {"brackets": {"prompt": {"decisive_agreement": learnt}}},
        },
        kind,
    )


def test_verdicts():
    good = verdict(0.9, [query("held_out", 0.1, True), query("train", 0.1, True)])
    assert "answers to all 1 held-out queries" in good["text"]
    assert good["missed"] == good["suggestions"] == []

    unseen = verdict(0.5, [query("held_out", 0.9, False), query("train", 0.1, True)])
    assert "1 lose it" in unseen["text"]
    assert unseen["missed"] == ["held_out 0.9"]
    assert any("--queries" in s for s in unseen["suggestions"])
    assert not any("--prompt-length" in s for s in unseen["suggestions"])

    small = verdict(0.5, [query("held_out", 0.9, False), query("train", 0.9, False)], learnt=0.5)
    assert any("--prompt-length" in s for s in small["suggestions"])
    assert not any("--queries" in s for s in small["suggestions"])

    kept = verdict(0.5, [query("held_out", 0.9, True)])
    assert "answers to all 1 held-out queries" in kept["text"]
    assert kept["suggestions"]

    weak = verdict(0.5, [query("held_out", 0.9, False)], kind="embedding")
    assert "--kind per_head" in weak["suggestions"][0]
    assert "per_head" not in small["text"]

    useless = verdict(0.1, [query("held_out", 1.5, False)], truncated=1.2)
    assert "no better than the context cut to its length" in useless["text"]
