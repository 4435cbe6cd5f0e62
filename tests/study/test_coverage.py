"""jaxsp.study.coverage: the sentences that an answer depends on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxsp.data.documents import Query
from jaxsp.models import decoder
from jaxsp.progress import Display
from jaxsp.settings import make_settings
from jaxsp.study import coverage
from jaxsp.study.coverage import by_removal, by_words, candidates, covered
from jaxsp.study.text import Document
from jaxsp.teacher.problem import read_preamble, run_teacher, tokenize

TEXT = """\
The tank of the K7 holds 1.2 litres. The cable of the K7 is 90 centimetres long. The K7 is made in Norway.
"""
ASKED = [Query("How long is the cable?"), Query("In which country is it made?")]


def words_of(text: str) -> int:
    return len(text.split())


@pytest.fixture
def document():
    return Document.of(TEXT, words_of)


@pytest.fixture
def problem(calm_model):
    settings = make_settings({"prompt_length": 1, "max_answer_tokens": 24})
    job = tokenize(calm_model, TEXT, ASKED, [Query("What?")], settings)
    asked = calm_model, job, settings.teacher, read_preamble(calm_model), Display(visible=False)
    return run_teacher(*asked).take([0, 1])


def test_candidates_share_words_with_a_text(document):
    assert candidates(document, "How long is the cable?") == (1, 2, 0)
    assert candidates(document, "centimetres") == (1,)
    assert candidates(document, "Nothing here", "of all this") == (0, 1)
    assert candidates(document, "Ravens") == ()


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("It is 90 cm long.", {1}),
        ("About 1.2, that is, in NORWAY.", {0, 2}),
        ("centimetres", {1}),
        ("The cable is long.", set()),  # short words may stand anywhere
        ("1. It holds 2 litres.", {0}),
        ("7", set()),
        ("It is of plastic.", set()),
        ("", set()),
    ],
)
def test_an_answer_with_a_word_of_a_sentence_alone_depends_on_it(document, answer, found):
    """Figures, names, long words."""
    assert by_words(document, [("What is it?", answer)]) == [found]


def test_a_word_that_the_query_says_tells_nothing(document):
    assert by_words(document, [("Is it 90 centimetres?", "Yes, 90 centimetres."), ("And?", "90")]) == [
        set(),
        {1},
    ]


def test_a_word_that_stands_elsewhere_tells_nothing():
    """In another sentence, or in a heading. A sentence that is repeated is one."""
    lines = (
        "# Filters\n\n- Filters cost 12 euros\n- Lids cost 30 euros\n- Water is free\n- Lids cost 30 euros\n"
    )
    whole = Document.of(lines, words_of)
    asked = [("What?", "12, of the filters"), ("What?", "30"), ("What?", "euros, filters")]
    assert by_words(whole, asked) == [{0}, {1, 3}, set()]


def test_scripts_without_spaces_tell_by_pairs_of_characters():
    whole = Document.of("这台机器的水箱容量为1.2升。它的电源线长九十厘米。", words_of)
    asked = [("电源线多长？", "九十厘米。"), ("水箱呢？", "容量。"), ("什么？", "的")]
    assert by_words(whole, asked) == [{1}, {0}, set()]


@pytest.mark.usefixtures("heeded")
def test_what_words_do_not_tell_is_tried_by_removal(calm_model, document, problem, monkeypatch):
    """Only that; nothing is read where it is few enough to be asked for anyway."""
    read, again = [], decoder.read_again
    monkeypatch.setattr(decoder, "read_again", lambda *a, **k: read.append(a[4]) or again(*a, **k))
    asked = [("How long is the cable?", "90 centimetres"), ("In which country is it made?", "Norway")]
    found = covered(calm_model, document, problem, asked)
    assert len(read) == 1  # the tank's sentence, from where it differs
    assert found.depends == [{0, 1}, {2}]  # with CHANGED at 0 each sentence changes each answer
    assert found.guessed == set()
    assert covered(calm_model, document, problem, asked, spare=1).depends == [{1}, {2}]
    assert len(read) == 1


@pytest.mark.usefixtures("heeded")
def test_beyond_the_tokens_to_read_the_likeliest_sentence_counts(calm_model, document, problem, monkeypatch):
    """The last sentences are tried first, as they cost least."""
    asked = [("How long is the cable?", ""), ("Ravens", "")]
    found = covered(calm_model, document, problem, asked, most_tokens=10)
    assert (found.depends, found.guessed) == ([{1}, set()], {1})
    tokens = len(problem.job.context_ids) + 4 * int(problem.rows.lengths[0])
    some = covered(calm_model, document, problem, asked, most_tokens=tokens)
    assert (some.depends, some.guessed) == ([{1, 2}, set()], set())
    two = dataclasses.replace(problem, job=dataclasses.replace(problem.job, parts=problem.job.parts * 2))
    assert covered(calm_model, document, two, asked).guessed == {1}


def test_a_sentence_without_which_nothing_changes_is_asked_for_by_nobody(
    calm_model, document, problem, monkeypatch
):
    monkeypatch.setattr(coverage, "CHANGED", 1e9)
    assert by_removal(calm_model, document, problem, [[0, 1], [2]]) == ([set(), set()], {0, 1, 2})
    assert by_removal(calm_model, document, problem, [[], []]) == ([set(), set()], set())


def test_the_removal_of_a_sentence_is_what_the_model_reads_without_it(
    calm_model, document, problem, monkeypatch
):
    """The KL is that between the whole document, and the document without the sentence, each read anew."""
    from jaxsp.evaluation.metrics import at_positions

    seen, measure = [], coverage.at_positions

    def measured(*args, **options):
        seen.append(measure(*args, **options))
        return seen[-1]

    monkeypatch.setattr(coverage, "at_positions", measured)
    by_removal(calm_model, document, problem, [[1], [1]])
    without = TEXT.replace("The cable of the K7 is 90 centimetres long. ", "")
    ids = calm_model.encode_context(without)
    prefix = decoder.read_long(calm_model.params, calm_model.config, ids[None], problem.preamble)
    kl = at_positions(calm_model, prefix, problem.rows, problem.packing, ("kl",))["kl"]
    np.testing.assert_allclose(seen[0]["kl"], kl, atol=1e-5)
    assert kl.sum() > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_an_answer_depends_on_the_sentence_that_it_comes_from(smollm2, document):
    settings = make_settings({"prompt_length": 1, "max_answer_tokens": 24})
    job = tokenize(smollm2, TEXT, ASKED, [Query("What?")], settings)
    display = Display(visible=False)
    problem = run_teacher(smollm2, job, settings.teacher, read_preamble(smollm2), display).take([0, 1])
    found, tried = by_removal(smollm2, document, problem, [(0, 1, 2), (0, 1, 2)])
    # Both answers begin with the tank, which the first sentence speaks of.
    assert found == [{0, 1}, {0, 2}]
    assert tried == {0, 1, 2}
