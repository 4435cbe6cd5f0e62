"""Metrics, the bootstrap and the verdict."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsp.evaluation import verdict as verdicts
from jaxsp.evaluation.metrics import ANSWER_METRICS, Answer, gap_closed, rouge_l


def test_rouge_l():
    assert rouge_l("a b c d", "a b c d") == 1.0
    assert rouge_l("a b c d", "D C b a") == pytest.approx(2 * 1 / 8)
    assert rouge_l("the cat sat on the mat", "the cat lay on a mat") == pytest.approx(2 * 4 / 12)
    assert rouge_l("Price: 9 euros.", "price 9 EUROS") == 1.0
    assert rouge_l("something", "") == 0.0
    assert rouge_l("", " \n") == 1.0


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("दिन", "दान", 0.0),  # marks belong to words
        ("caf\u00e9", "cafe\u0301", 1.0),
        ("水箱容量", "水箱重量", 0.75),
        ("ถัง", "ถุง", 0.5),
        ("\N{THUMBS UP SIGN}", "\N{THUMBS DOWN SIGN}", 0.0),  # without words the texts are compared
        ("\N{THUMBS UP SIGN}", " \N{THUMBS UP SIGN}", 1.0),
        ("", "!", 0.0),
        ("a", "!", 0.0),
    ],
)
def test_rouge_l_in_any_script(reference, answer, expected):
    assert rouge_l(reference, answer) == rouge_l(answer, reference) == expected


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


def test_no_gap_and_no_interval_where_there_is_none():
    tiny, one, counts = np.full(3, 1e-3), np.ones(3), np.full(3, 4.0)
    assert set(gap_closed((0 * tiny, counts), (tiny, counts)).values()) == {None}
    assert gap_closed((0 * one, counts), (one, counts))["value"] == 1.0
    found = gap_closed((one[:1], counts[:1]), (2 * one[:1], counts[:1]))
    assert found == {"value": 0.5, "low": None, "high": None}


def query(split, kl, captured):
    return {"query": f"{split} {kl}", "split": split, "kl": kl, "captured": captured}


def verdict(gap, queries, truncated=1.0, learnt=1.0, kind="per_head", train=(), **more):
    ours = float(np.mean([q["kl"] for q in queries if q["split"] == "held_out"]))
    brackets = {"prompt": {"kl": ours}, "truncated_context": {"kl": truncated}, "no_context": {"kl": 1e-6}}
    low, high = (None, None) if gap is None else (gap - 0.1, gap + 0.1)
    return verdicts.verdict(
        {
            "queries": queries,
            "gap_closed": {"value": gap, "low": low, "high": high},
            "held_out": {"brackets": brackets},
            "train": {"brackets": {"prompt": {"decisive_agreement": learnt}}, **dict(train)},
            **more,
        },
        kind,
    )


def test_a_verdict_without_a_gap():
    found = verdict(None, [query("held_out", 2e-6, True)], truncated=1e-6)
    assert found["text"].startswith("No gap to close: ")
    assert "(KL 1e-06)" in found["text"]
    assert "%" not in found["text"]
    assert "no better" not in found["text"]
    assert found["suggestions"] == []


@pytest.mark.parametrize(("train", "held_out", "said"), [(1, 0, False), (1, 1, True), (0, 2, True)])
def test_a_verdict_on_answers_that_are_cut(train, held_out, said):
    cut = {
        "max_answer_tokens": 6,
        "train": train,
        "train_answers": 8,
        "held_out": {"full_context": held_out, "prompt": 2},
    }
    found = verdict(0.9, [query("held_out", 0.1, True)] * 2, cut_answers=cut)["text"]
    assert (f" {train + held_out} of the teacher's 10 answers are cut at 6 tokens" in found) == said
    assert ("--max-answer-tokens" in found) == said


def test_a_verdict_on_answers_that_are_known():
    right = {"known": 4, "full_context": 4, "prompt": 3, "no_context": 1}
    found = verdict(0.9, [query("held_out", 0.1, True)], right=right)["text"]
    assert (
        "Of 4 answers whose facts are known 4 are right after the full context, 3 with σ and 1 without"
        in found
    )


def test_a_verdict_on_queries_that_the_context_does_not_decide():
    """They are captured by definition: that is no praise of σ."""
    queries = [query("held_out", 0.1, True) | {"decisive_tokens": count} for count in (0, 0, 3)]
    said = "For 2 of the 3 it decides nothing: the model says each token without it, too"
    assert said in verdict(0.9, queries)["text"]
    assert "decides nothing" not in verdict(0.9, queries[2:])["text"]
    known = [queries[0] | {"right": True}]  # it is counted by that
    assert "decides nothing" not in verdict(0.9, known)["text"]
    assert "decides nothing" not in verdict(None, queries)["text"]


def test_a_verdict_on_what_the_document_does_not_answer_either():
    lost = query("held_out", 0.1, False)
    said = "such questions need the whole document. Wrong after the full context, too: 1 of these, where"
    assert said in verdict(0.9, [lost | {"right": right} for right in (False, True)])["text"]
    assert "Wrong after" not in verdict(0.9, [lost, lost | {"right": True}])["text"]


def test_the_cost_of_a_larger_model_stands_beside_the_advice():
    rows = [
        query("held_out", 0.1, True) | {"answer_full_context": "It is 3.", "right": r} for r in (False, True)
    ]
    read = {row["query"]: "It is 2." for row in rows}
    cost = verdicts.cost_of_larger(2**28, 354, 16)
    found = verdicts.on_teacher({"queries": rows}, read, None, cost)
    assert found["weak"]
    assert found["text"].startswith(
        "The model itself, with the whole context: 1 of 2 held-out answers are right;"
    )
    assert "about 768.0 MiB for them and 3 times as long" in found["text"]
    assert "`jaxsp plan MODEL --context-tokens 354 --prompt-length 16`" in found["text"]
    better = verdicts.on_teacher({"queries": rows[1:]}, read, None, cost)
    assert not better["weak"]
    assert "MiB" not in better["text"]


def test_verdicts():
    good = verdict(0.9, [query("held_out", 0.1, True), query("train", 0.1, True)])
    assert "answers to all 1 held-out queries" in good["text"]
    assert good["missed"] == good["suggestions"] == []

    unseen = verdict(0.5, [query("held_out", 0.9, False), query("train", 0.1, True)])
    assert "1 lose it" in unseen["text"]
    assert unseen["missed"] == ["held_out 0.9"]
    assert any("--queries" in s for s in unseen["suggestions"])
    assert not any("--prompt-length" in s for s in unseen["suggestions"])

    other = verdict(  # of the training queries another KL was measured
        0.5, [query("held_out", 0.9, False), query("train", 0.1, True)], train={"best_tokens": 5}
    )
    assert not any("--queries" in s for s in other["suggestions"])

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
