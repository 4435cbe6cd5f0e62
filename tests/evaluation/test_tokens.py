"""Answers token by token: equal to what the model says when it is asked directly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxsp import distributions
from jaxsp.data.documents import as_queries
from jaxsp.evaluation import tokens
from jaxsp.evaluation.brackets import measure
from jaxsp.evaluation.report import summarise
from jaxsp.evaluation.tokens import by_token, decisive, pieces
from jaxsp.progress import Display
from jaxsp.settings import make_settings
from jaxsp.teacher.problem import read_part, read_preamble, run_teacher, tokenize
from jaxsp.teacher.signals import SIGNALS, Wanted
from tests.conftest import CONTEXT, QUERIES


@pytest.fixture(scope="module")
def problem(calm_model):
    settings = make_settings({"max_answer_tokens": 6})
    train, held_out = as_queries(QUERIES[:2]), as_queries(QUERIES[7:9])
    job = tokenize(calm_model, CONTEXT, train, held_out, settings)
    return run_teacher(calm_model, job, settings.teacher, read_preamble(calm_model), Display(visible=False))


@pytest.fixture(scope="module")
def measured(calm_model, problem):
    """With the first half of the context in σ's place."""
    half = problem.job.context_ids[: len(problem.job.context_ids) // 2]
    prefix = distributions.context_prefix(calm_model.params, calm_model.config, half[None], problem.preamble)
    found = {"prompt": prefix, "no_context": problem.preamble}
    return prefix, measure(calm_model, problem, found, 6)


def test_they_are_what_the_model_says(calm_model, problem, measured):
    prefix, found = measured
    answers = by_token(calm_model, problem, found)
    assert sorted(answer["row"] for answer in answers) == [2, 3]
    whole = read_part(calm_model, problem.job, 0, problem.preamble)
    for answer in answers:
        i = answer["row"]
        count = int(problem.rows.mask[i].sum())
        assert "".join(answer["pieces"]) == calm_model.tokenizer.decode(
            problem.rows.targets["tokens"][i, :count].tolist()
        )
        np.testing.assert_allclose(answer["kl"], found["prompt"].positions["kl"][i, :count], atol=6e-5)
        none = found["no_context"].positions
        np.testing.assert_allclose(answer["kl_no_context"], none["kl"][i, :count], atol=6e-5)
        assert answer["decisive"] == (none["zero_one"][i, :count] > 0).tolist()
        for name, before in (("prompt", prefix), ("full_context", whole)):
            given = calm_model.params, calm_model.config, before, problem.rows.take([i])
            p = np.exp(np.asarray(distributions.log_probs(*given))[0, :count])
            best = np.sort(p, axis=-1)[:, : -tokens.LIKELIEST - 1 : -1]
            shown = [[chance for _, chance in pairs] for pairs in answer[name]]
            np.testing.assert_allclose(shown, best, atol=6e-5)
            first = [calm_model.tokenizer.decode([int(token)]) for token in p.argmax(-1)]
            assert [pairs[0][0] for pairs in answer[name]] == first
    assert np.mean(answers[0]["kl"]) >= np.mean(answers[1]["kl"])


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_given_answer_decides_what_the_teacher_says_itself(calm_model, problem, measured, signal):
    """In place of a token that it doesn't say σ is not praised for saying what it says."""
    _, found = measured
    own, rows = decisive(calm_model, problem, found), problem.rows
    np.testing.assert_array_equal(own, rows.mask & (found["no_context"].positions["zero_one"] > 0))
    first = np.array(rows.targets["tokens"])
    i = int(np.argmax(own.sum(axis=1) * problem.job.is_train))
    place, *others = np.flatnonzero(own[i]).tolist()
    assert others
    tokens, given = first.copy(), list(problem.job.given_ids)
    tokens[i, place] += 1
    given[i] = tokens[i, rows.mask[i]].tolist()
    top_k = np.zeros((*first.shape, 1)), first[..., None], np.zeros(first.shape)
    asked = dataclasses.replace(
        problem,
        job=dataclasses.replace(problem.job, given_ids=given),
        rows=rows.with_targets(tokens=tokens, **({"top_k": top_k} if signal == "top_k" else {})),
        wanted=Wanted(signal),
    )
    own[i, place] = False
    np.testing.assert_array_equal(decisive(calm_model, asked, found), own)


def test_where_nothing_is_decisive_there_is_no_figure(calm_model, problem, measured):
    """Else even no context would be all right."""
    whole = read_part(calm_model, problem.job, 0, problem.preamble)
    (same,) = measure(calm_model, problem, {"prompt": whole}, 6).values()
    names = "full_context", "prompt", "truncated_context", "no_context"
    settings = make_settings({"max_answer_tokens": 6})
    found = summarise(calm_model, problem, dict.fromkeys(names, same), CONTEXT, settings)
    assert all("decisive_agreement" not in row for row in found["held_out"]["brackets"].values())
    assert [row["decisive_tokens"] for row in found["queries"]] == [0] * 4
    given = {**dict.fromkeys(names, same), "no_context": measured[1]["no_context"]}
    brackets = summarise(calm_model, problem, given, CONTEXT, settings)["held_out"]["brackets"]
    assert [brackets[name]["decisive_agreement"] for name in names] == [1.0, 1.0, 1.0, 0.0]


def test_states_are_kept_of_the_prompt_alone(measured, problem):
    _, found = measured
    assert found["no_context"].states is None
    assert set(found["prompt"].states) == {2, 3}
    assert all(len(own) == problem.rows.mask[i].sum() for i, own in found["prompt"].states.items())


def test_only_so_many_tokens_are_kept(calm_model, problem, measured, monkeypatch):
    monkeypatch.setattr(tokens, "MOST_TOKENS", 1)
    every, (worst,) = (
        by_token(calm_model, problem, measured[1]),
        by_token(calm_model, problem, measured[1])[:1],
    )
    assert every == [worst]


def test_a_character_of_several_tokens_comes_with_its_last():
    def decode(ids):
        return bytes(ids).decode("utf-8", "replace")

    data = "a水!".encode()
    found = pieces(data, decode)
    assert found == ["a", "", "", "水", "!"]
    assert pieces(data[:2], decode) == ["a", "\ufffd"]


def test_a_tokenizer_that_writes_the_past_anew():
    texts = {1: "do n", 2: "don't", 3: "don't go"}

    def decode(ids):
        return texts[len(ids)] if ids[0] == 0 else f"<{ids[0]}>"

    assert pieces([0, 1, 2], decode) == ["do n", "<1>", " go"]
