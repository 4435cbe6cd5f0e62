"""Documents, chat chat and rows."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsp.data.documents import Query, as_queries, read_context, read_queries, split_queries
from jaxsp.data.examples import batch_indices, make_rows
from jaxsp.models.chat import ChatTexts, encode
from jaxsp.typing import EMPTY, UserError
from tests import tiny


def test_read_context_strips_and_drops_the_byte_order_mark(tmp_path):
    file = tmp_path / "c.md"
    file.write_bytes(b"\xef\xbb\xbf\n# Title\n\nText. \n")
    assert read_context(file) == "# Title\n\nText."


def test_read_queries_in_both_forms(tmp_path):
    plain, jsonl = tmp_path / "q.txt", tmp_path / "q.jsonl"
    plain.write_text(" One?\n\n  \nTwo?\n")
    jsonl.write_text('{"query": "One?"}\n\n{"query": "Two?", "answer": " 2 "}\n')
    assert read_queries(plain) == [Query("One?"), Query("Two?")]
    assert read_queries(jsonl) == [Query("One?"), Query("Two?", "2")]
    plain.write_text(jsonl.read_text())  # JSONL is known by its first character, too
    assert read_queries(plain) == read_queries(jsonl)
    assert as_queries(["One?", {"query": "Two?", "answer": "2"}]) == read_queries(jsonl)


def test_split_is_seeded_and_disjoint():
    queries = [Query(str(i)) for i in range(20)]
    train, held_out = split_queries(queries, 0.25, seed=1)
    assert (len(train), len(held_out)) == (15, 5)
    assert {q.text for q in train} | {q.text for q in held_out} == {str(i) for i in range(20)}
    assert split_queries(queries, 0.25, seed=1) == (train, held_out)
    assert split_queries(queries, 0.25, seed=2) != (train, held_out)
    assert len(split_queries(queries[:2], 0.01, seed=0)[1]) == 1


def test_slots_of_a_chat_template():
    tokenizer = tiny.tokenizer()
    chat = ChatTexts.of(tokenizer)
    end, start = "<|im_end|>\n", "<|im_start|>"
    assert chat == ChatTexts(f"{start}user\n", "\n\n", f"{end}{start}assistant\n", end=end)
    ids = [
        *chat.before_ids(tokenizer),
        *encode(tokenizer, "C", control=False),
        *chat.query_ids(tokenizer, "Q?"),
    ]
    assert tokenizer.decode(ids) == ("<|im_start|>user\nC\n\nQ?<|im_end|>\n<|im_start|>assistant\n")


def test_control_tokens_in_the_users_text_are_text():
    tokenizer = tiny.tokenizer()
    chat = ChatTexts.of(tokenizer)
    ids = chat.query_ids(tokenizer, "<|im_end|>")
    assert ids.count(2) == 1  # the template's own
    assert len(ids) > len(chat.query_ids(tokenizer, "")) + 5


def test_plain_layout_without_a_template_and_a_template_that_loses_text():
    tokenizer = tiny.tokenizer(chat_template=None)
    chat = ChatTexts.of(tokenizer)
    assert chat == ChatTexts("<|endoftext|>", "\n\n", "\n")
    with pytest.raises(UserError, match="does not keep the user's text"):
        ChatTexts.of(tiny.tokenizer("{{ messages[0]['content'] | length }}"))


def test_rows_read_the_query_and_all_but_the_last_answer_token():
    rows = make_rows([[5, 6], [7]], [[8, 2], [9, 10, 11, 2]])
    assert rows.tokens.tolist() == [[5, 6, 8, 0], [7, 9, 10, 11]]
    assert rows.offsets.tolist() == [[0, 1, 2, EMPTY], [0, 1, 2, 3]]
    assert rows.answer_index.tolist() == [[1, 2, 0, 0], [0, 1, 2, 3]]
    assert rows.targets["tokens"].tolist() == [[8, 2, 0, 0], [9, 10, 11, 2]]
    assert rows.mask.tolist() == [[True, True, False, False], [True] * 4]
    blank = rows.take([1, 5])
    assert blank.tokens[0].tolist() == [7, 9, 10, 11]
    assert (blank.offsets[1] == EMPTY).all()
    assert not blank.mask[1].any()


def test_the_stream_visits_every_row_once_an_epoch_and_can_be_entered_anywhere():
    stream = batch_indices(7, 0, 70, key=[0, 3])
    for epoch in stream.reshape(10, 7):
        assert sorted(epoch) == list(range(7))
    assert not (stream[:7] == stream[7:14]).all()
    for cursor in (0, 5, 13, 41):
        np.testing.assert_array_equal(batch_indices(7, cursor, 9, key=[0, 3]), stream[cursor : cursor + 9])
    assert not (batch_indices(7, 0, 7, key=[0, 4]) == stream[:7]).all()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is it?", "what  is it", True),
        ("Caf\u00e9?", "cafe\u0301", True),
        ('"Straße" (where)?', "STRASSE where", True),
        ("5-3?", "5+3?", False),
        ("C++", "C", False),
        ("What is C#?", "What is C?", False),
        ("-5 + 3?", "5 + 3?", False),
        (".NET", "net", False),
        ("__init__", "init", False),
        ("?", "!", False),
        ("ab", "a b", False),
    ],
)
def test_queries_that_are_the_same(one, other, same):
    queries = [Query(text) for text in ("Another?", one)]
    given = queries, [Query(other)], 0
    if same:
        with pytest.raises(UserError, match=r"is both for training \(there as .*\) and held out"):
            split_queries(*given)
        with pytest.raises(UserError, match="is given twice, also as"):
            split_queries([*queries, Query(other)], 0.5, 0)
    else:
        assert split_queries(*given)[1] == [Query(other)]
