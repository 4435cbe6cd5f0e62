"""Queries from the files that people have."""

from __future__ import annotations

import time
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from jaxsp.data import formats
from jaxsp.data.documents import Query, as_queries, read_queries
from jaxsp.typing import UserError

USER, ASSISTANT = ({"role": role, "content": f"{role} speaks"} for role in ("user", "assistant"))
CHAT = [
    {"role": "system", "content": "Be kind."},
    USER,
    ASSISTANT,
    {"role": "user", "content": "And?"},
    ASSISTANT,
]


@pytest.fixture
def read(tmp_path):
    def read(name, content, column=None):
        file = tmp_path / name
        if isinstance(content, dict):
            pyarrow.parquet.write_table(pyarrow.table(content), file)
        else:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_queries(file, column)

    return read


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "q.csv",
            '\ufeffid,query,answer\n1,"What, is it?",A\n\n2,"B\n""b""?",\n',
            [("What, is it?", "A"), ('B\n"b"?',)],
        ),
        ("q.csv", "aspect,query,Id\nx,a?,1\n", [("a?",)]),
        ("q.csv", "Question;Answer\r\nWhat, is it?;A, b\r\n", [("What, is it?", "A, b")]),
        ("Q.TSV", "Input\tExpect\nWhat, is it?\t4.5\n", [("What, is it?", None, ("4.5",))]),
        ("q.csv", f"context,prompt\n{'x' * 200_000},a?\n", [("a?",)]),
        ("q.json", '[{"instruction": "a?", "response": "x"}, " b? "]', [("a?", "x"), ("b?",)]),
        ("q.json", '{"query": "a?", "id": 3}\n{"query": "b?"}\n', [("a?",), ("b?",)]),
        ("q.jsonl", '{"question": "a?", "answer": ["x", "y"]}', [("a?", "x")]),
        ("q.jsonl", '{"question": "a?", "answers": {"text": [], "answer_start": []}}', [("a?",)]),
        ("q.jsonl", '{"query": "a?", "answer": "x", "output": "y"}', [("a?", "x")]),
        ("q", '[\n{"prompt": "a?", "completion": "x"}]', [("a?", "x")]),
        ("q.txt", "[Chapter 1] a?\n\n b? \n", [("[Chapter 1] a?",), ("b?",)]),
        (
            "q.parquet",
            {"context": ["c"], "question": ["a?"], "answers": [{"text": ["x", "y"]}]},
            [("a?", "x")],
        ),
        (
            "q.parquet",
            {"query": ["a?", "b?"], "expect": [["1", "2"], None]},
            [("a?", None, ("1", "2")), ("b?",)],
        ),
        ("q.parquet", {"messages": [CHAT, CHAT[:2]]}, [("And?", "assistant speaks"), ("user speaks",)]),
    ],
)
def test_files_of_queries(read, name, content, expected):
    assert read(name, content) == [Query(*row) for row in expected]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("q.csv", "a?\nb?\n", ("line 1", "columns are a?.", "--query-column")),
        ("q.csv", '"a\nb?"\nc?\n', ("line 1", "columns are a b?.")),
        ("q.csv", "query,answer\na,b,c\n", ("line 2: 3 cells", "2 columns", "quotes")),
        ("q.csv", 'query,answer\n"a,b\n', ("no table",)),
        ("q.csv", "query,anwser\na,b\n", ("'anwser'", "did you mean answer?")),
        ("q.csv", "query,answers\na?,\"['x']\"\n", ("line 2", "JSON lines")),
        ("q.csv", "messages\n[]\n", ("line 2", "a list of turns")),
        ("q.csv", "query,note\n,x\n", ("line 2", "empty")),
        ("q.json", "[1,", ("not valid JSON",)),
        ("q.json", "[" * 100_000, ("not valid JSON",)),
        ("q.json", "[3]", ("row 1: expected",)),
        ("q.jsonl", '["a?"]', ("line 1: expected",)),  # by its name each line is a row
        (
            "q.jsonl",
            '{"instruction": "a", "input": "b", "output": "c"}',
            ("line 1", "instruction, input, output"),
        ),
        ("q.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', ("no turn of the user",)),
        ("q.jsonl", '{"messages": [{"role": "user", "content": [1]}]}', ("turn 1",)),
        ("q.jsonl", '{"question": 3}', ("a text, not 3",)),
        ("q.jsonl", '{"query": "a", "answer": {"x": 1}}', ("answer must be a text",)),
        ("q.jsonl", '{"query": "a", "expect": ["/[/"]}', ("line 1", "no regular expression")),
        ("q.parquet", {"text": ["a"]}, ("columns are text.", "--query-column")),
        ("q.parquet", {"query": ["a", None]}, ("row 2", "not None")),
        ("q.parquet", b"PAR1 damaged", ("damaged Parquet",)),
        ("q.parquet", "a?", ("no Parquet",)),
        ("q.txt", b"%PDF-1.4 all in ASCII", ("is a PDF",)),
        ("q.txt", b"PK\x03\x04", ("a zip archive",)),
        ("q", "{\\rtf1 What?}", ("is RTF",)),
        ("q.txt", "<!DOCTYPE html>\n<p>What?", ("HTML", "one query per line")),
        ("q.html", "What?", (".html", "one query per line")),
        ("q.yaml", "- What?", (".yaml", ".parquet")),
        ("q.jsonl.gz", b"\x1f\x8b", (".gz",)),
    ],
)
def test_files_that_are_refused(read, name, content, words):
    with pytest.raises(UserError) as error:
        read(name, content)
    assert all(word in str(error.value) for word in (name, *words)), error.value


def test_a_column_by_its_name(read):
    given = "text,query,answers\na?,b?,x\n"
    assert read("q.csv", given) == [Query("b?", "x")]
    assert read("q.csv", given, "text") == [Query("a?", "x")]
    assert read("q.parquet", {"prompt": ["a"], "messages": [CHAT]}, "messages") == [
        Query("And?", "assistant speaks")
    ]
    with pytest.raises(UserError, match="no column 'txt'; the columns are text, query, answers"):
        read("q.csv", given, "txt")


def test_rows_of_data_sets_in_python():
    rows = [{"id": 1, "question": "a?", "answers": ["x"]}, {"messages": CHAT}, "b?"]
    assert as_queries(rows) == [Query("a?", "x"), Query("And?", "assistant speaks"), Query("b?")]
    with pytest.raises(UserError, match="query 1: it isn't known which column"):
        as_queries([{"text": "a?"}])


def test_a_pattern_that_is_none_is_found_before_anything_is_done():
    with pytest.raises(UserError, match="no regular expression"):
        Query("a?", expect=("/(/",))


def test_many_comments_before_a_text_take_no_time():
    text = b"<!-- a -->\n" * 300 + b"A text."
    started = time.perf_counter()
    assert not formats.is_html(text[:4096])
    assert formats.is_html(b"<!-- a -->\n" * 300 + b"<html>")
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("other columns.jsonl", b'{"question": "How long?", "score": NaN, "seed": 7, "span": "a"}'),
        ("blank lines.csv", b"query,answer\nHow long?,\n,\n,\n"),
    ],
)
def test_what_is_not_ours_is_passed_over(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [query.text for query in read_queries(tmp_path / name)] == ["How long?"]


def test_a_text_may_begin_as_a_parquet_file_does(tmp_path):
    (tmp_path / "q.txt").write_text("PAR1 is what?\n")
    assert [query.text for query in read_queries(tmp_path / "q.txt")] == ["PAR1 is what?"]


def test_a_mapping_is_no_list_of_queries():
    mapping: Any = dict.fromkeys("abcde", "?")
    with pytest.raises(UserError, match="must be a list of texts, not one row"):
        as_queries(mapping)
