"""Several runs side by side: what differs, what can't be compared, and the page."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest

from jaxsp.errors import UserError
from jaxsp.evaluation import compare as module
from jaxsp.evaluation.compare import Run, compare, html
from tests.browser import browsing
from tests.evaluation.test_page import EVIL, LINES, WIDTHS, check, needs_browser, open_all, report, shown


def run(name: str, document: str | None = "One.", page: str | None = None, **changes: Any) -> Run:
    own = copy.deepcopy(report())
    own["settings"] |= changes
    return Run(name, own, document, page)


def other_queries(name: str) -> Run:
    found = run(name)
    for query in found.report["queries"]:
        query["query"] += " Really?"
    return found


def test_settings_that_differ_are_said_in_a_sentence():
    found = compare([run("a", steps=10, objective="kl"), run("b", steps=20, objective="kl")])
    assert found.text == "They differ in steps (10, 20)."
    assert found.differing == {"steps": [10, 20]}
    assert compare([run("a"), run("b", mesh="data=2")]).text == "All their settings are the same."
    several = [run(str(i), steps=i, rates=rates) for i, rates in enumerate(["", "", "", "", "", "keys=1"])]
    assert (
        compare(several).text == "They differ in steps (0, 1, 2, 3 and 2 more) and rates ((empty), keys=1)."
    )


def test_a_setting_that_an_older_run_lacks_is_a_dash():
    assert compare([run("a"), run("b", rates="")]).text == "They differ in rates (–, (empty))."


def test_another_model_is_another_teacher():
    own = run("b")
    assert isinstance(own.report, dict)
    own.report["model"] = "big"
    text = compare([run("a"), own]).text
    assert text.startswith("They differ in model (")
    assert text.endswith("The KL of each is to what its own teacher says.")


def test_what_can_not_be_compared_is_refused():
    with pytest.raises(UserError, match=r"b can't be compared with a: .* other held-out queries \(3 and 3, "):
        compare([run("a"), other_queries("b")])
    with pytest.raises(UserError, match="b can't be compared with a: they stand in for other documents"):
        compare([run("a"), run("b", document="Two.")])
    assert compare([run("a"), run("b", document=None)]).same_queries
    own = run("c")
    assert isinstance(own.report, dict)
    own.report["taught_by"] = {"name": "big", "signal": "answers"}
    with pytest.raises(UserError, match=r"c can't be compared with a: .*another figure"):
        compare([run("a"), run("b"), own])


def test_the_jobs_of_one_run_may_have_queries_of_their_own():
    found = compare([run("a"), other_queries("b")], of_many=True)
    assert not found.same_queries
    assert found.text.endswith("compare the gap closed, not the KL.")
    assert "side by side" not in check(html(found)).text


def test_the_page_has_the_numbers_of_the_reports():
    first, second = run("a", page="a/report.html", steps=10), run("b", steps=20)
    assert isinstance(second.report, dict)
    second.report["gap_closed"] = {"value": 0.5, "low": None, "high": None}
    second.report["held_out"]["brackets"]["prompt"]["kl"] = 0.75
    found = check(html(compare([first, second])))
    for text in ("81.2% (-50.0% to 100.0%)", "50.0%", "0.750", "0.250 (0.125 to 0.375)", "2 of 3", "steps"):
        assert text in found.text
    assert "a/report.html" in found.addresses
    assert found.text.count("yes | no") == 3  # the full context's, and that of each run


def test_names_and_texts_are_no_markup():
    def evil(name: str) -> Run:
        own = run(name, page="a%22%3E.html", **{EVIL: name})
        for query in own.report["queries"]:
            query["query"] = query["answer_prompt"] = query["answer_full_context"] = EVIL
        return own

    found = compare([evil(EVIL), evil(f"{EVIL}2")])
    assert check(html(found)).text.count("alert(1)") > 10


def test_curves_of_a_few_runs_are_drawn(monkeypatch):
    runs = [dataclasses.replace(run(name), lines=LINES) for name in "ab"]
    text = html(compare(runs))
    check(text)
    assert text.count('class="run-') == 2
    assert "--run-1:" in text
    assert "Training" not in html(compare([run("a"), run("b")]))  # without lines
    monkeypatch.setattr(module, "MOST_CURVES", 1)
    assert "Training" not in html(compare(runs))


def test_there_is_a_colour_for_each_curve():
    text = html(compare([run("a"), run("b")]))
    for i in range(module.MOST_CURVES):
        assert text.count(f"--run-{i}: #") == 2  # light and dark


def test_answers_of_many_runs_are_left_out(monkeypatch):
    monkeypatch.setattr(module, "MOST_ANSWERS", 1)
    monkeypatch.setattr(module, "MOST_BARS", 1)
    shown = check(html(compare([run("a"), run("b")]))).text
    assert "side by side" not in shown
    assert "Of the first 1 runs." in shown


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_the_comparison_at_every_width(tmp_path):
    runs = [dataclasses.replace(run(name), lines=LINES) for name in (EVIL, "a" * 200, "c")]
    url = shown(tmp_path, html(compare(runs)))
    with browsing(tmp_path / "profile") as view:
        for width in WIDTHS:
            view.open(url, width)
            open_all(view)
            assert view.js("document.documentElement.scrollWidth") <= width
            view.picture(tmp_path / f"{width}.png", whole=True)
        heads = "[...document.querySelectorAll('.cards thead')].map((head) => head.offsetHeight > 0)"
        assert view.js(heads) == [True, *[False] * len(runs[0].held_out)]  # on a phone those alone that sort
        assert view.js("document.querySelectorAll('img').length") == 0
        assert (view.errors, view.dialogs) == ([], [])
