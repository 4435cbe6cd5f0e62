"""The report for people, word for word."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxsp.evaluation import report as report_module
from jaxsp.evaluation.brackets import BRACKETS, Measured
from jaxsp.evaluation.report import markdown
from jaxsp.settings import make_settings

NAMES = [
    "kl",
    "decisive_agreement",
    "zero_one",
    "reverse_kl",
    "js",
    "nll",
    "rank_agreement",
    "confidence_shift",
]
TRAIN_ROW = dict.fromkeys(NAMES, 0.25)
ROW = {**TRAIN_ROW, **dict.fromkeys(("facts_right", "sequence_mismatch", "rouge_l"), 0.25)}
TABLE = f"""\
| bracket | {" | ".join(ROW)} |
|---|{"---:|" * len(ROW)}
| the trained soft prompt σ |{" 0.250 |" * len(ROW)}
| nothing where the context stood | nan |{" 0.250 |" * (len(ROW) - 1)}
"""
TRAIN_TABLE = f"""\
| bracket | {" | ".join(TRAIN_ROW)} |
|---|{"---:|" * len(TRAIN_ROW)}
| the trained soft prompt σ |{" 0.250 |" * len(TRAIN_ROW)}
"""


def query(text: str, split: str, kl: float, answer: str = "yes") -> dict:
    answers = {f"answer_{name}": answer for name in ("full_context", "prompt", "no_context")}
    measured = {"kl": kl, "kl_no_context": 1.0, "peak_kl": 2 * kl, "captured": kl < 0.3}
    return {"query": text, "split": split, **measured, **answers}


def example() -> dict:
    """All that the report for people shows, but for the plots."""
    part = {"queries": 2, "brackets": {"prompt": ROW, "no_context": {**ROW, "kl": float("nan")}}}
    return {
        "prompt_length": 4,
        "context_tokens": 87,
        "teacher": {"text": "The model itself is right."},
        "verdict": {"text": "σ closes most of it."},
        "kind": "embedding",
        "settings": {"artifact_dtype": "int8"},
        "stored": {"float32": {"kl": 0.25, "bytes": 2**22}, "int8": {"kl": 0.26, "bytes": 2**20}},
        "by_length": {},
        "prefill_seconds": {"prompt": 0.01, "full_context": 2.5},
        "prefix_bytes": {"prompt": 2**20, "full_context": 5 * 2**30},
        "model": "tiny <i> & {{ 1 }}",
        "dtype": "float32",
        "quantization": "none",
        "compression": 21.75,
        "objective": "kl",
        "steps": 2,
        "gap_closed": {"value": 0.8125, "low": -0.5, "high": 1.0},
        "gap_closed_vs_truncated": {"value": 0.5, "low": 0.25, "high": 0.75},
        "kept": "best",
        "held_out": part,
        "train": {"queries": 2, "brackets": {"prompt": TRAIN_ROW}},
        "queries": [
            query("Near?", "held_out", 0.25, "yes | no"),
            query("Only {% trained %} on?", "train", 9.0),
            query("<b>Far</b> & {{ verdict }}?", "held_out", 0.5, "one\n\n <two>\t{{ 3 }} # "),
            query("As near?", "held_out", 0.25, " \n"),
        ],
        "seconds": {"load": 0.0, "total": 12.345},
    }


@pytest.fixture
def report() -> dict:
    return example()


def test_the_report_for_people(report):
    """Users' texts stand as they are but in one line; queries of equal KL keep their order."""
    assert (
        re.sub(r"## The columns\n\n.*?\n\n", "", markdown(report))
        == f"""\
# 4 slots for 87 tokens

The model itself is right.

σ closes most of it.

These lose it (with what σ's answer lacks):

- \\<b\\>Far\\</b\\> \\& {{{{ verdict }}}}?

- model: tiny \\<i\\> \\& {{{{ 1 }}}} (float32, quantization: none)
- σ: embedding, 4 slots for 87 tokens (21.8×)
- keys and values in front of a query: 1.0 MiB for σ, 5.00 GiB for the whole context; preparing them\
 takes 0.010 s and 2.500 s
- saved as int8; held-out KL by dtype of the file: float32 0.2500 (4.0 MiB), int8 0.2600 (1.0 MiB)
- training: kl, 2 steps
- gap closed on held-out queries: 81.2% (95% interval -50.0% to 100.0%) (0: no context, 1: full context)
- the same against the truncated context: 50.0% (95% interval 25.0% to 75.0%)

The σ kept is the one with the lowest held-out KL of those evaluated during training.

## Held-out queries (2)

{TABLE}
## Training queries (2)

{TRAIN_TABLE}
![training](plots/training.png)

![by position](plots/by_position.png)

![by query](plots/by_query.png)

## All held-out answers

| query | full context | σ | no context | captured | KL: σ / no context / worst token of σ |
|---|---|---|---|---|---:|
| \\<b\\>Far\\</b\\> \\& {{{{ verdict }}}}? | one \\<two\\> {{{{ 3 }}}} \\# | one \\<two\\> {{{{ 3 }}}} \\# |\
 one \\<two\\> {{{{ 3 }}}} \\# | **no** | 0.500 / 1.000 / 1.000 |
| Near? | yes \\| no | yes \\| no | yes \\| no | yes | 0.250 / 1.000 / 0.500 |
| As near? | (empty) | (empty) | (empty) | yes | 0.250 / 1.000 / 0.500 |

Seconds: load 0.0, total 12.3.
"""
    )


def test_all_held_out_answers_are_shown_and_the_last_prompt_is_named(report):
    report |= {"kept": "last", "queries": [query(f"q{i}?", "held_out", float(i)) for i in range(7)]}
    text = markdown(report)
    assert re.findall(r"^\| (q\d\?) ", text, re.MULTILINE) == [f"q{i}?" for i in range(6, -1, -1)]
    assert "\n\nThe σ kept is that of the last step.\n\n" in text


def test_answers_that_are_cut_and_those_that_are_right_are_counted(report):
    held_out = {"full_context": 1, "prompt": 2, "no_context": 0}
    report["cut_answers"] = {"max_answer_tokens": 6, "train": 3, "train_answers": 5, "held_out": held_out}
    report["right"] = {"known": 2, "full_context": 2, "prompt": 1, "no_context": 0}
    text = markdown(report)
    assert (
        "\n- answers cut at 6 tokens (`--max-answer-tokens`): 3 of the teacher's 5 to train on; of 2 held out"
        " 1 after the full context, 2 with σ, 0 without context\n- right answers of 2 whose facts are known:"
        " 2 after the full context, 1 with σ, 0 without context\n"
    ) in text
    report["cut_answers"]["train_answers"] = 0  # all are given
    assert "(`--max-answer-tokens`): of 2 held out" in markdown(report)


def test_an_answer_without_its_end_is_cut():
    """Those given are none of the teacher's, and those sampled are."""
    model: Any = SimpleNamespace(stop_ids=(2,))
    problem: Any = SimpleNamespace(
        job=SimpleNamespace(is_train=np.array([True, True, True, False]), given_ids=[None, None, [5], None]),
        answers=[[7, 2], [7, 8], [7, 8], [7, 8]],
        samples=SimpleNamespace(answers=[[9, 9], [2]]),
    )
    measured = {"no_context": Measured({}, [[]]), "full_context": Measured({}, [[7, 8]])}
    settings = make_settings({"max_answer_tokens": 2})
    found = report_module._cut_answers(model, problem, measured, settings, None)
    assert found == {
        "max_answer_tokens": 2,
        "train": 2,
        "train_answers": 4,
        "held_out": {"full_context": 1, "no_context": 1},
    }
    teacher: Any = SimpleNamespace(difference=None, model=SimpleNamespace(stop_ids=(8,)))
    assert report_module._cut_answers(model, problem, measured, settings, teacher)["train"] == 1
    teacher.difference = "another vocabulary, in which 8 is something else"
    assert report_module._cut_answers(model, problem, measured, settings, teacher)["train"] == 2


def test_no_gap_is_said_and_one_query_has_no_interval(report):
    nothing = dict.fromkeys(("value", "low", "high"))
    report |= {"gap_closed": nothing, "by_length": {"1": 0.0, "4": 0.0}}
    report["gap_closed_vs_truncated"] = {"value": 0.5, "low": None, "high": None}
    text = markdown(report)
    assert "\n- gap closed on held-out queries: no gap to close\n" in text
    assert "\n- the same against the truncated context: 50.0% (no interval: one query)\n" in text
    assert "| 1 | 0.000 | no gap |\n" in text


def test_another_teacher_is_named(report):
    report["taught_by"] = {
        "name": "big", "dtype": "bfloat16", "quantization": "none", "fingerprint": "0123456789abcdef",
        "signal": "distributions",
    }  # fmt: skip
    report["held_out"]["brackets"]["full_context"] = {**ROW, "kl": 0.0}
    text = markdown(report)
    assert "\n- taught by: big (bfloat16, quantization: none, weights 0123456789ab)\n" in text
    assert "| the context, read by the teacher big: what σ should be | 0.000" in text
    assert "tokens only" not in text
    report["taught_by"]["signal"] = "answers"
    assert "\n- **tokens only**: the teacher has another vocabulary" in markdown(report)


def test_sentences_that_no_query_depends_on_are_listed(report):
    report["study"] = {
        "given": 0, "sentences": ["One.", "Two.", "Three."], "asked": [1], "coverage": 1 / 3,
        "seeds": {"quote": {"drafted": 2, "kept": 1}},
    }  # fmt: skip
    text = markdown(report)
    assert "No query depends on these sentences:\n\n- One.\n- Three.\n" in text
    assert "- Two." not in text


def test_queries_given_and_those_of_the_document_are_kept_apart(report):
    study = {
        "given": 5, "added": 2, "sentences": ["One.", "Two.", "Three."], "asked": [0, 1, 2], "coverage": 1.0,
        "by_given": [1], "guessed": [], "seeds": {"quote": {"drafted": 2, "kept": 2}},
    }  # fmt: skip
    report["study"] = study
    text = markdown(report)
    assert "\n5 queries to train on are yours; they ask for 1 of the document's 3 sentences." in text
    assert "The document gave 2 more; by all together 3 of 3 sentences are asked for.\n" in text
    assert "too much to read" not in text
    report["study"] = {**study, "guessed": [1]}
    assert "1 of them were not taken away, as that would be too much to read" in markdown(report)
    del report["study"]["by_given"]  # of an older run
    assert "\n5 queries to train on are yours. The document gave the others" in markdown(report)


def test_brackets_of_equal_figures_are_one_row(report):
    """A start that is the truncated context; and σ where no step is better than its start."""
    brackets = {name: {**ROW, "kl": i / 10} for i, name in enumerate(BRACKETS)}
    for first, other in (("initial", "truncated_context"), ("prompt", "initial")):
        report["held_out"]["brackets"] = {**brackets, other: dict(brackets[first])}
        text = markdown(report)
        assert f"| {BRACKETS[first]}, which is also {BRACKETS[other]} | {brackets[first]['kl']:.3f} |" in text
        assert f"\n| {BRACKETS[other]} |" not in text
        assert text.count("\n| the context cut to the length of σ |") == (other == "initial")
    three = dict.fromkeys(("prompt", "initial", "truncated_context"), brackets["prompt"])
    report["held_out"]["brackets"] = {**brackets, **three}
    assert "σ, which is also σ before training and the context cut to the length of σ |" in markdown(report)


def test_the_words_that_are_lost_are_named(report):
    report["queries"][2]["lost"] = ["249 euros", "<4>"]
    assert "\n- \\<b\\>Far\\</b\\> \\& {{ verdict }}? (249 euros; \\<4\\>)\n\n- model" in markdown(report)
    report["queries"][2]["right"] = False
    assert "(249 euros; \\<4\\>): wrong after the full context, too\n" in markdown(report)
    for query in report["queries"]:
        query["captured"] = True
    assert "lose it" not in markdown(report)


def test_shorter_prompts_have_a_table_of_their_own(report):
    assert "Shorter prompts" not in markdown(report)
    report["by_length"] = {"1": 0.75, "4": 0.25}
    report["held_out"]["brackets"]["no_context"]["kl"] = 1.0
    text = markdown(report)
    assert "| 1 | 0.750 | 0.250 |\n| 4 | 0.250 | 0.750 |\n" in text
    assert "![by length](plots/by_length.png)" in text


def test_every_column_is_explained(report):
    explained = markdown(report).partition("## The columns")[2]
    assert all(f"`{name}`" in explained or name.replace("_", " ") in explained.lower() for name in ROW)


def test_every_condition_has_its_words(report):
    report["held_out"]["brackets"] = {name: {**ROW, "kl": i / 10} for i, name in enumerate(BRACKETS)}
    text = markdown(report)
    for i, words in enumerate(BRACKETS.values()):
        assert f"\n| {words} | {i / 10:.3f} |" in text


def test_a_field_that_is_missing_is_no_blank(report):
    del report["verdict"]
    with pytest.raises(ValueError, match="verdict"):
        markdown(report)
