"""Pages, notebooks and PDFs as text."""

from __future__ import annotations

import json
import sys
import time
import types

import pytest
from hypothesis import example, given, strategies as st

from jaxsp.data.documents import read_context
from jaxsp.data.plain_text import from_html, from_notebook
from jaxsp.typing import UserError
from tests.fuzz.documents import PDF

PAGE = """<!-- saved --><!DOCTYPE html>
<html><head><title>The  cup</title><style>p { }</style><script>if (a < b) { }</script></head>
<body><h2>Cups of <em>tea</em></h2><p>Small &amp; red,<br>on a
line<p>Next<noscript>no</noscript>
<ul><li>One<ul><li>within</ul><li>Two</ul><ol><li>First<li>Second</ol>
<table><tr><th>Name<th>Price</tr>
<tr><td>Cup<br>red</td><td>3 | 4</td></tr></table>
<table><tr><td>mere layout</table>
<pre>
def f():
    return  1
</pre></body></html>"""
TEXT = """The cup

## Cups of tea

Small & red,
on a line

Next

- One
   - within
- Two

1. First
2. Second

| Name | Price |
|---|---|
| Cup red | 3 \\| 4 |

mere layout

```
def f():
    return  1
```"""


def test_a_page_keeps_its_lines_and_nothing_that_no_reader_sees(tmp_path):
    assert from_html(PAGE) == TEXT
    for name in ("page.html", "page.txt", "-page"):  # known by its first tags, too
        (tmp_path / name).write_text(PAGE)
        assert read_context(tmp_path / name) == TEXT
    markdown = tmp_path / "readme.md"
    markdown.write_text('<p align="center">As it is')
    assert read_context(markdown) == '<p align="center">As it is'
    (tmp_path / "empty.html").write_text("<script>1</script>")
    with pytest.raises(UserError, match="holds no text"):
        read_context(tmp_path / "empty.html")
    for odd in ("<![odd[ x", f"<p>&#{'9' * 5000};"):
        (tmp_path / "odd.html").write_text(odd)
        with pytest.raises(UserError, match=r"odd.html: it is no HTML"):
            read_context(tmp_path / "odd.html")


TAGS = [
    f"<{end}{tag}>"
    for tag in ("p", "li", "ul", "ol", "table", "tr", "td", "pre", "br", "svg")
    for end in ("", "/")
]


@example(["<tr>", "word", "<td>", "word"])
@given(st.lists(st.sampled_from([*TAGS, "word", " ", "\n", "|", "&", "<", "<!--"])))
def test_any_page_becomes_text(parts):
    """All words are there, but for those in a picture or a comment."""
    text = from_html("".join(parts))
    assert text.count("word") <= parts.count("word")
    if not {"<svg>", "<!--", "<"} & set(parts):
        assert text.count("word") == parts.count("word")


def test_a_damaged_page_takes_no_longer_than_its_length():
    """Python's parser by itself looks for the end of a comment or a tag again and again."""
    begun = time.perf_counter()
    for part in ("<!-- x", "<a b="):
        from_html(part * 5_000)
    assert time.perf_counter() - begun < 5
    assert from_html("3 < 4") == "3 < 4"
    assert len(from_html("<ul><li>a" * 2_000)) < 10**5


def test_a_notebook_is_its_words_and_its_code(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["# Cups\n", "They are small."]},
        {"cell_type": "code", "source": "print('```')\n", "outputs": [{"text": "```"}]},
        {"cell_type": "raw", "source": "left out"},
        {"cell_type": "code", "source": []},
    ]
    file = tmp_path / "a.ipynb"
    file.write_text(json.dumps({"cells": cells, "nbformat": 4}))
    assert read_context(file) == "# Cups\nThey are small.\n\n````\nprint('```')\n````"
    for odd in ('{"worksheets": []}', "[]", '{"cells": 3}', '{"cells": [{}]}', "text", "[" * 100_000):
        file.write_text(odd)
        with pytest.raises(UserError, match=r"a\.ipynb: it is no notebook of format 4"):
            read_context(file)
    assert from_notebook('{"cells": []}') == ""


def test_a_pdf_needs_its_extra(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"  # known by its first characters: it may be all in ASCII
    file.write_bytes(b"%PDF-1.4 (source)")
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(UserError, match=r"a\.txt: it is a PDF, .* pip install 'jaxsp\[pdf\]'\.$"):
        read_context(file)

    def reader(texts):
        pages = [types.SimpleNamespace(extract_text=lambda text=text: text) for text in texts]
        monkeypatch.setitem(sys.modules, "pypdf", types.SimpleNamespace(PdfReader=lambda file: named(pages)))

    def named(pages):
        return types.SimpleNamespace(pages=pages)

    reader(["One. ", " ", "Two."])
    assert read_context(file) == "One.\n\nTwo."
    reader([""])
    with pytest.raises(UserError, match="holds no text; if its pages are pictures"):
        read_context(file)
    monkeypatch.setitem(sys.modules, "pypdf", types.SimpleNamespace(PdfReader=lambda file: 1 / 0))
    with pytest.raises(UserError, match="PDF that can't be read"):
        read_context(file)


def test_a_real_pdf(tmp_path):
    file = tmp_path / "a.pdf"
    file.write_bytes(PDF)
    assert read_context(file) == "The cable is 90 cm long."
    file.write_bytes(b"%PDF-1.4 damaged")
    with pytest.raises(UserError, match="PDF that can't be read"):
        read_context(file)


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"{\\rtf1 A cup.}", "is RTF"), (b"PK\x03\x04", "zip archive"), (b"\xd0\xcf\x11\xe0", "older Office")],
)
def test_documents_that_are_to_be_saved_as_text(tmp_path, data, words):
    (tmp_path / "a.doc").write_bytes(data)
    with pytest.raises(UserError, match=f"{words}.*save it as text"):
        read_context(tmp_path / "a.doc")
