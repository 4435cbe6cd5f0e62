"""The report as a page: whole, escaped, without a network; and what older runs lack is left out."""

from __future__ import annotations

import copy
import importlib.resources
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from jaxsp.evaluation import page
from jaxsp.evaluation.page import Passage, html, next_steps
from tests.browser import CHROMIUM, Page, browsing
from tests.evaluation.test_report import example

EVIL = "</script><script>alert(1)</script></style><img src=x onerror=alert(2)>\"'><b>&amp;"
LINES = [
    {"step": 0, "held_out_kl": 0.5},
    {"step": 1, "loss": 0.75},
    {"step": 2, "loss": 0.5, "held_out_kl": 0.25},
]
VOID = {"meta", "link", "img", "br", "rect", "path", "input"}


class Reader(HTMLParser):
    """A page as a browser reads it: its elements, its texts, and the addresses in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "action", "data", "poster", "srcset"):
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(**changes: Any) -> dict[str, Any]:
    """All that the page shows."""
    found = {**example(), "by_position": {}, **changes}
    found["held_out"] = copy.deepcopy(found["held_out"])
    found["held_out"]["brackets"]["no_context"]["kl"] = 2.0
    found["held_out"]["kl_intervals"] = {
        "prompt": {"value": 0.25, "low": 0.125, "high": 0.375},
        "no_context": {"value": 2.0, "low": 1.5, "high": 2.5},
    }
    return found


def token(row: int, *pieces: str) -> dict[str, Any]:
    """An answer token by token."""
    pairs = [[[piece, 0.75], ["x", 0.125]] for piece in pieces]
    return {
        "row": row, "pieces": list(pieces), "kl": [0.25] * len(pieces), "kl_no_context": [1.5] * len(pieces),
        "decisive": [True] * len(pieces), "prompt": pairs, "full_context": pairs,
    }  # fmt: skip


def check(text: str) -> Reader:
    """The page is whole and needs nothing else: one script, which is ours, and no address of another host."""
    found = Reader(text)
    assert found.open == []
    assert found.scripts == [
        importlib.resources.files("jaxsp.evaluation").joinpath("html/page.js").read_text("utf-8")
    ]
    assert found.tags.count("script") == found.tags.count("style") == 1
    assert not {"img", "iframe", "object", "embed", "base"} & set(found.tags)
    assert not found.handlers
    assert all(re.fullmatch(r"data:,|#[\w-]+|[\w./%-]+\.html", address) for address in found.addresses)
    assert {a[1:] for a in found.addresses if a.startswith("#")} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))
    bare = re.sub(r"\s", "", text)
    assert not re.search(r"https?:|url\(|@import", bare)
    return found


def test_the_numbers_of_the_page_are_those_of_the_report():
    own = report()
    shown = check(html(own, LINES, [token(2, "one", " two")])).text
    assert "4 slots for 87 tokens" in shown
    assert "81.2%" in shown
    assert "95%: -50.0% to 100.0%" in shown
    assert "0.250 (0.125 to 0.375)" in shown
    assert "2.000 (1.500 to 2.500)" in shown
    assert "2 0.2500" in shown  # an evaluation
    assert "KL 0.2500" in shown  # a token
    assert "1.5000 without the context" in shown
    assert "75.0%" in shown
    for query in own["queries"]:
        assert " ".join(query["query"].split()) in shown


def test_the_teacher_comes_before_the_verdict():
    shown = check(html(report(), LINES)).text
    assert shown.index("The model itself is right.") < shown.index("σ closes most of it.")


def test_brackets_of_equal_figures_are_one_bar():
    own = report()
    own["held_out"]["brackets"]["initial"] = dict(own["held_out"]["brackets"]["prompt"])
    text = html(own, LINES)
    words = "the trained soft prompt σ, which is also σ before training"
    assert check(text).text.count("σ before training") == check(text).text.count(words) == 1  # its bar
    assert text.count(f'title="{words}"') == text.count("σ before training") - 1 == 1  # its column


def test_bars_end_where_their_values_are():
    text = html(report(), LINES)
    assert re.search(r'<rect width="10.0".*?M5.0 5H15.0M', text, re.DOTALL)  # 0.25 of 2.5
    assert re.search(r'<rect width="80.0".*?M60.0 5H100.0M', text, re.DOTALL)


def test_texts_of_users_and_models_are_no_markup():
    own = report(model=EVIL, objective=f"{EVIL}.loss", kind=EVIL)
    own["taught_by"] = {"name": EVIL, "signal": "answers"}
    own["verdict"]["text"] = own["teacher"]["text"] = EVIL
    own["verdict"]["suggestions"] = [EVIL]
    own["settings"][EVIL] = EVIL
    own["environment"] = {"versions": {EVIL: EVIL}, "python": EVIL, "device": EVIL, "devices": 1}
    own["study"] = {"sentences": [EVIL], "asked": [], "coverage": 0.5}
    for query in own["queries"]:
        query |= dict.fromkeys(("query", "answer_full_context", "answer_prompt", "answer_no_context"), EVIL)
    pieces = [Passage(EVIL, ()), Passage(EVIL, (0,))]
    found = check(html(own, LINES, [token(0, EVIL)], pieces, own["queries"][:1]))
    plain = " ".join(EVIL.split())
    assert found.text.count(plain) > 25
    assert "alert(1)" not in "".join(found.scripts)


def test_control_characters_are_shown_as_signs():
    own = report()
    own["queries"][0]["query"] = "a\x00b\x1bc"
    assert "a␀b␛c" in html(own, LINES)
    assert "\x00" not in html(own, LINES)


def test_the_document_has_marks_where_answers_were_lost():
    own = report()
    lost = [query for query in own["queries"] if query["split"] == "held_out" and not query["captured"]]
    lost[0]["lost"] = ["249 euros", "4"]
    text = html(own, LINES, None, [Passage("One. ", ()), Passage("Two.", (0,))], lost)
    check(text)
    assert '>One. <mark>Two.</mark><sup><a href="#lost-1"' in text
    assert 'id="lost-1"' in text
    assert ">249 euros; 4<" in text
    none = check(html(own, LINES, None, [Passage("One.", ())], [])).text
    assert "Nothing is marked" in none
    nowhere = check(html(own, LINES, None, [Passage("One.", ())], lost)).text
    assert "(no sentence shares enough)" in nowhere


def test_the_document_is_underlined_where_nobody_asks():
    """A sentence that is underlined is not listed once more."""
    own = report()
    own["study"] = {
        "given": 5, "added": 1, "sentences": ["One.", "Two."], "asked": [1], "by_given": [1], "guessed": [],
        "coverage": 0.5, "seeds": {},
    }  # fmt: skip
    title, asked = (
        "Sentences that no query depends on",
        "Your 5 queries to train on ask for 1 of the 2 sentences",
    )
    text = html(own, LINES, None, [Passage("One.", (), asked=False), Passage(" Two.", ())], [])
    shown = check(text).text
    assert '<u class="unasked">One.</u> Two.</div>' in text
    assert asked in shown
    assert "no query to train on asks for it." in shown
    assert title not in shown
    lost = html(own, LINES, None, [Passage("One.", (0,), asked=False)], own["queries"][:1])
    assert '<mark class="unasked">One.</mark>' in lost
    listed = check(html(own, LINES, None, [Passage("One. Two.", ())], [])).text
    assert title in listed
    assert "Underlined" not in listed
    del own["study"]["by_given"]  # of an older run
    assert asked not in check(html(own, LINES, None, [Passage("One.", ())], [])).text


def test_what_an_older_run_lacks_is_left_out():
    own = report()
    del own["held_out"]["kl_intervals"]
    for name in ("by_length", "prefill_seconds", "prefix_bytes", "stored", "seconds"):
        del own[name]
    shown = check(html(own, [{"step": 0}])).text
    assert "There are no intervals." in shown
    for left_out in ("Token by token", "The document", "Training Training", "right answers", "in memory"):
        assert left_out not in shown
    assert "held-out answers" in shown


def test_a_run_with_one_query_and_one_with_nothing_to_close():
    own = report()
    own["queries"] = own["queries"][:1]
    own["gap_closed"] = {"value": 0.5, "low": None, "high": None}
    del own["held_out"]["kl_intervals"], own["train"]
    assert "one query: no interval" in check(html(own, LINES)).text
    own["gap_closed"] = dict.fromkeys(("value", "low", "high"))
    shown = check(html(own, LINES)).text
    assert "no gap to close" in shown
    assert "Ask what only the document answers" in shown


def test_numbers_that_are_none_are_drawn_nowhere():
    own = report()
    own["held_out"]["brackets"]["prompt"]["kl"] = math.nan
    own["queries"][0]["kl"] = math.inf
    text = html(own, [*LINES, {"step": 3, "loss": math.inf, "held_out_kl": math.nan}])
    check(text)
    assert not re.search(r'(width|d)="[^"]*(nan|inf)', text)


def test_an_objective_other_than_kl_has_a_chart_of_its_own():
    text = html(report(objective="nll"), LINES)
    check(text)
    assert text.count('class="plot"') == 2
    assert html(report(), LINES).count('class="plot"') == 1


def test_a_teacher_of_answers_alone_is_called_so():
    own = report(taught_by={"name": "big", "signal": "answers"})
    answer = token(0, "one")
    del answer["full_context"]
    shown = check(html(own, LINES, [answer])).text
    assert "NLL of the teacher's answers 0.2500" in shown


def test_long_runs_and_many_queries_are_cut():
    own = report()
    own["queries"] += [{**own["queries"][1], "query": f"Number {i}?", "kl": i} for i in range(300)]
    own["train"]["queries"] = 301
    lines = [{"step": i, "loss": 1.0 + i} for i in range(5000)]
    text = html(own, lines)
    assert f"the {page.MOST_TRAINED} of 301 with the largest KL" in text
    assert "Number 299?" in text
    assert "Number 5?" not in text
    (path,) = re.findall(r'class="loss"[^>]* d="M([^"]*)"', text)
    assert path.count("L") <= page.MOST_POINTS
    assert path.split("L")[-1].startswith("100.0 ")  # the last step is there


def test_a_field_that_is_missing_is_no_blank():
    own = report()
    del own["verdict"]
    with pytest.raises((ValueError, KeyError), match="verdict"):
        html(own, LINES)


def test_next_steps():
    own = report()
    assert "Keep the document itself for questions like the 1 " in " ".join(next_steps(own))
    own["queries"][2]["right"] = False  # the document doesn't help
    assert "Keep the document" not in " ".join(next_steps(own))
    del own["queries"][2]["right"]
    own["verdict"]["suggestions"] = ["more steps (--steps)"]
    own["teacher"]["weak"] = True
    own["cut_answers"] = {
        "max_answer_tokens": 6, "train": 2, "train_answers": 2, "held_out": {"full_context": 1},
    }  # fmt: skip
    first, second, third, *_ = next_steps(own)
    assert "--teacher" in first
    assert second == "More steps (--steps)."
    assert "3 of the teacher's 5 answers are cut at 6 tokens" in third
    for query in own["queries"]:
        query["captured"] = True
    assert next_steps(own)[0].startswith("Ask it")


def test_blanks_of_tokens_are_seen():
    text = html(report(), LINES, [token(0, " a", "\n", "")])
    assert "<code>␣a</code>" in text
    assert "<code>⏎</code>" in text
    assert "a part of the next character" in text


WIDTHS = (1280, 390)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def shown(folder: Path, text: str) -> str:
    """The address of a page in a file."""
    (folder / "report.html").write_text(text)
    return (folder / "report.html").as_uri()


def fits(view: Page, selector: str) -> bool:
    """Whether an element is seen whole."""
    return view.js(
        f"(({{x, y, right, bottom, width}}) => width > 0 && x >= 0 && y >= 0"
        f" && right <= document.documentElement.clientWidth && bottom <= innerHeight)"
        f"(document.querySelector({selector!r}).getBoundingClientRect())"
    )


def open_all(view: Page) -> None:
    view.js("document.querySelectorAll('details').forEach((one) => { one.open = true })")


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_the_report_at_every_width_in_light_and_dark(tmp_path):
    own, long = report(study=None), ["The", *(f" number{i}" for i in range(200))]
    lost = [query for query in own["queries"] if query["split"] == "held_out"][:1]
    pieces = [Passage("A line that goes on. " * 200, ()), Passage("This is lost.", (0,))]
    url = shown(tmp_path, html(own, LINES, [token(2, *long)], pieces, lost))
    colours = []
    with browsing(tmp_path / "profile") as view:
        for width in WIDTHS:
            for dark in (False, True):
                view.open(url, width, dark=dark)
                open_all(view)
                assert view.js("document.documentElement.scrollWidth") <= width
                colours.append(view.js("getComputedStyle(document.body).backgroundColor"))
                assert view.js("document.querySelector('.document').getBoundingClientRect().height") < 844
                view.point(".tokens .t:nth-child(7)")
                assert fits(view, ".t:hover .tip")
                assert "75.0%" in view.js("document.querySelector('.t:hover .tip').textContent")
                view.point("h1")
                view.js("document.querySelector('.tokens .t').focus()")
                for key in ("ArrowRight", "ArrowDown", "ArrowLeft"):
                    view.call("Input.dispatchKeyEvent", type="keyDown", key=key)
                assert view.js("document.activeElement.firstChild.textContent") == " number0"
                assert fits(view, ".t:focus .tip")
                view.picture(tmp_path / f"{width}-{dark}.png", whole=True)
                assert (tmp_path / f"{width}-{dark}.png").stat().st_size > 10_000
        assert colours[:2] == colours[2:]
        assert colours[0] != colours[1]
        assert {request for request in view.requests if not request.startswith("data:")} == {url}
        assert (view.errors, view.dialogs) == ([], [])


@pytest.mark.slow
@needs_browser
def test_in_a_browser_the_answers_are_sorted_and_come_again_in_order(tmp_path):
    own = report()
    held_out = [query for query in own["queries"] if query["split"] == "held_out"]
    kls = sorted(f"{query['kl']:.3f}" for query in held_out)
    assert len(set(kls)) > 1
    rows = "[...document.querySelectorAll('table.sortable')[0].tBodies[0].rows]"
    with browsing(tmp_path / "profile") as view:
        view.open(shown(tmp_path, html(own, LINES)))
        heads = view.js(
            "[...document.querySelectorAll('table.sortable')[0].tHead.rows[0].cells]"
            ".map((head) => head.textContent.trim())"
        )
        column = heads.index("KL of σ")
        for expected, said in ((kls, "ascending"), (kls[::-1], "descending")):
            view.js(f"document.querySelectorAll('table.sortable th button')[{column}].click()")
            found = view.js(f"{rows}.map((row) => row.cells[{column}].textContent.trim())")
            assert found == expected
            assert view.js(f"document.querySelectorAll('th[aria-sort=\"{said}\"]').length") == 1


@pytest.mark.slow
@needs_browser
def test_in_a_browser_markup_in_a_report_is_text_and_nothing_of_it_runs(tmp_path):
    own = report(model=EVIL)
    for query in own["queries"]:
        query |= dict.fromkeys(("query", "answer_full_context", "answer_prompt", "answer_no_context"), EVIL)
    pieces = [Passage(EVIL, ()), Passage(EVIL * 20, (0,))]
    url = shown(tmp_path, html(own, LINES, [token(2, EVIL, EVIL)], pieces, own["queries"][:1]))
    with browsing(tmp_path / "profile") as view:
        for width in WIDTHS:
            view.open(url, width)
            open_all(view)
            view.point(".tokens .t")
            assert EVIL.replace(" ", "␣") in view.js("document.querySelector('.t:hover .tip').textContent")
            assert view.js("document.querySelectorAll('img, .document b, .t b b').length") == 0
            assert view.js("document.scripts.length") == 1
            assert view.js("document.documentElement.scrollWidth") <= width
        assert (view.errors, view.dialogs) == ([], [])
