"""Greedy decoding with a cache equals taking the best token of a full forward pass, again and again."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsp import distributions
from jaxsp.data.rows import pad_ids
from jaxsp.models import decoder
from jaxsp.models.generate import greedy, stream
from jaxsp.teacher import answers


@pytest.fixture(scope="module")
def prefix(tiny_model):
    ids = np.array([[5, 100, 7, 9, 200, 31]])
    return distributions.context_prefix(tiny_model.params, tiny_model.config, ids)


QUERIES = [[4, 8, 15], [16], [23, 42, 108, 4, 9, 77, 12], [50, 60]]


def slowly(model, query, stop_ids, max_tokens):
    """By full forward passes over context, query and answer."""
    ids = [5, 100, 7, 9, 200, 31, *query]
    answer = []
    while len(answer) < max_tokens:
        answer.append(int(np.argmax(model.logits(ids + answer)[-1])))
        if answer[-1] in stop_ids:
            break
    return answer


def test_greedy_equals_full_forward_passes(tiny_model, prefix):
    expected = [slowly(tiny_model, query, (), 9) for query in QUERIES]
    ids, offsets = pad_ids([*QUERIES, []])
    tokens, lengths = greedy(
        tiny_model.params, tiny_model.config, prefix, ids, offsets, stop_ids=(), max_tokens=9
    )
    assert np.asarray(tokens)[:4].tolist() == expected
    assert lengths[:4].tolist() == [9] * 4
    streamed = [
        list(stream(tiny_model.params, tiny_model.config, prefix, q, stop_ids=(), max_tokens=9))
        for q in QUERIES
    ]
    assert streamed == expected


def test_rows_stop_each_at_their_own_stop_token(tiny_model, prefix):
    free = [slowly(tiny_model, query, (), 9) for query in QUERIES]
    stops = (free[0][2], free[2][5])  # these tokens now end a turn
    expected = [slowly(tiny_model, query, stops, 9) for query in QUERIES]
    assert len({len(answer) for answer in expected}) > 1
    ids, offsets = pad_ids(QUERIES)
    tokens, lengths = greedy(
        tiny_model.params, tiny_model.config, prefix, ids, offsets, stop_ids=stops, max_tokens=9
    )
    ragged = [row[:n].tolist() for row, n in zip(np.asarray(tokens), lengths, strict=True)]
    assert ragged == expected


def test_the_loop_ends_when_all_rows_have(tiny_model, prefix):
    """With every token a stop token one is chosen; padding rows don't keep the loop running."""
    ids, offsets = pad_ids([*QUERIES, []])
    tokens, lengths = greedy(
        tiny_model.params,
        tiny_model.config,
        prefix,
        ids,
        offsets,
        stop_ids=tuple(range(tiny_model.config.vocab_size)),
        max_tokens=9,
    )
    assert lengths.tolist() == [1] * 5
    assert (np.asarray(tokens)[:, 1:] == 0).all()


def test_batches_change_nothing(tiny_model, prefix, monkeypatch):
    at_once = answers.answer_ids(tiny_model, prefix, QUERIES, max_tokens=6)
    monkeypatch.setattr(answers, "BATCH", 3)
    done: list[int] = []
    in_batches = answers.answer_ids(tiny_model, prefix, QUERIES, max_tokens=6, on_batch=done.append)
    assert in_batches == at_once
    assert done[-1] == len(QUERIES)


def test_a_prompt_of_the_contexts_embeddings_answers_like_the_context(tiny_model, prefix):
    ids = np.array([5, 100, 7, 9, 200, 31])
    sigma = {"embeddings": tiny_model.embed(ids)}
    before = decoder.empty_prefix(tiny_model.config)
    same = distributions.prompt_prefix(tiny_model.params, tiny_model.config, sigma, before)
    assert answers.answer_ids(tiny_model, same, QUERIES, max_tokens=6) == answers.answer_ids(
        tiny_model, prefix, QUERIES, max_tokens=6
    )
