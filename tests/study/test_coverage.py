"""jaxsp.study.coverage: the sentences that an answer depends on."""

from __future__ import annotations

import pytest

from jaxsp.data.documents import Query
from jaxsp.progress import Display
from jaxsp.settings import make_settings
from jaxsp.study import coverage
from jaxsp.study.coverage import candidates, covered
from jaxsp.study.text import Document
from jaxsp.teacher.problem import read_preamble, run_teacher, tokenize

TEXT = """\
The tank of the K7 holds 1.2 litres. The cable of the K7 is 90 centimetres long. The K7 is made in Norway.
"""
ASKED = [Query("How long is the cable?"), Query("In which country is it made?")]


@pytest.fixture
def document():
    return Document.of(TEXT, lambda text: len(text.split()))


def test_candidates_share_words_with_a_text(document):
    assert candidates(document, "How long is the cable?") == (1, 2, 0)
    assert candidates(document, "centimetres") == (1,)
    assert candidates(document, "Nothing here", "of all this") == (0, 1)
    assert candidates(document, "Ravens") == ()


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_an_answer_depends_on_the_sentence_that_it_comes_from(smollm2, document, monkeypatch):
    settings = make_settings({"prompt_length": 1, "max_answer_tokens": 24})
    job = tokenize(smollm2, TEXT, ASKED, [Query("What?")], settings)
    display = Display(visible=False)
    problem = run_teacher(smollm2, job, settings.teacher, read_preamble(smollm2), display).take([0, 1])
    found = covered(smollm2, document, problem, [(0, 1, 2), (0, 1, 2)])
    # Both answers begin with the tank, which the first sentence speaks of.
    assert found == [{0, 1}, {0, 2}]
    monkeypatch.setattr(coverage, "MOST_TOKENS", 10)  # too long to read it once without each sentence
    assert covered(smollm2, document, problem, [(0, 2), ()]) == [{0}, set()]
