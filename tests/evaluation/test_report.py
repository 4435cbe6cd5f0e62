"""The report for people, word for word."""

from __future__ import annotations

import jinja2
import pytest

from jaxsp.evaluation.brackets import BRACKETS
from jaxsp.evaluation.report import markdown

METRICS = ("kl", "reverse_kl", "js", "nll", "zero_one", "rank_agreement", "confidence_shift")
ROW = dict.fromkeys((*METRICS, "sequence_mismatch", "rouge_l"), 0.25)
TRAIN_ROW = dict.fromkeys(METRICS, 0.25)
ABOUT = (
    "Per answer position: KL, reverse KL, JS and NLL in nats; 0/1: another first token; rank agreement"
    " (Kendall's τ) of the ten best tokens, 1 at best; confidence shift: how much surer of its first token, 0"
    " at best."
)
TABLE = f"""\
{ABOUT} The last two compare free-running answers with the full context's.

| bracket | {" | ".join(ROW)} |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| the trained soft prompt σ | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 |
| nothing where the context stood | nan | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 |
"""
TRAIN_TABLE = f"""\
{ABOUT}

| bracket | {" | ".join(TRAIN_ROW)} |
|---|---:|---:|---:|---:|---:|---:|---:|
| the trained soft prompt σ | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 |
"""


def query(text: str, split: str, kl: float, answer: str = "yes") -> dict:
    answers = {f"answer_{name}": answer for name in ("full_context", "prompt", "no_context")}
    measured = {"kl": kl, "kl_no_context": 1.0, "peak_kl": 2 * kl, "captured": kl < 0.3}
    return {"query": text, "split": split, **measured, **answers}


@pytest.fixture
def report() -> dict:
    part = {"queries": 2, "brackets": {"prompt": ROW, "no_context": {**ROW, "kl": float("nan")}}}
    return {
        "prompt_length": 4,
        "context_tokens": 87,
        "verdict": {"text": "σ closes most of it."},
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
            query("Near?", "held_out", 0.25),
            query("Only {% trained %} on?", "train", 9.0),
            query("<b>Far</b> & {{ verdict }}?", "held_out", 0.5, "one\n\n <two>\t{{ 3 }} # "),
            query("As near?", "held_out", 0.25, " \n"),
        ],
        "seconds": {"load": 0.0, "total": 12.345},
    }


def test_the_report_for_people(report):
    """Users' texts stand as they are but in one line; queries of equal KL keep their order."""
    assert (
        markdown(report)
        == f"""\
# 4 slots for 87 tokens

σ closes most of it.

- model: tiny <i> & {{{{ 1 }}}} (float32, quantization: none)
- compression: 21.8×, objective: kl, 2 steps
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

## The worst held-out queries

### <b>Far</b> & {{{{ verdict }}}}?

KL 0.500, at its worst token 1.000; no context 1.000: **not captured**.

- full context: one <two> {{{{ 3 }}}} #
- σ: one <two> {{{{ 3 }}}} #
- no context: one <two> {{{{ 3 }}}} #

### Near?

KL 0.250, at its worst token 0.500; no context 1.000: captured.

- full context: yes
- σ: yes
- no context: yes

### As near?

KL 0.250, at its worst token 0.500; no context 1.000: captured.

- full context: (empty)
- σ: (empty)
- no context: (empty)

Seconds: load 0.0, total 12.3.
"""
    )


def test_the_five_worst_are_shown_and_the_last_prompt_is_named(report):
    report |= {"kept": "last", "queries": [query(f"q{i}?", "held_out", float(i)) for i in range(7)]}
    text = markdown(report)
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        f"### q{i}?" for i in (6, 5, 4, 3, 2)
    ]
    assert "\n\nThe σ kept is that of the last step.\n\n" in text


def test_every_condition_has_its_words(report):
    report["held_out"]["brackets"] = dict.fromkeys(BRACKETS, ROW)
    text = markdown(report)
    assert all(f"\n| {words} | 0.250 |" in text for words in BRACKETS.values())


def test_a_field_that_is_missing_is_no_blank(report):
    del report["verdict"]
    with pytest.raises(jinja2.UndefinedError, match="verdict"):
        markdown(report)
