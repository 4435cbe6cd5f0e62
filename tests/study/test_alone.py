"""jaxsp.study.alone: the queries of a document, interrupted and gone on with, with a cache and without."""

from __future__ import annotations

import pytest

import jaxsp
from jaxsp.study import questions

TEXT = "The tank holds 1.2 litres. Its cable is 90 centimetres long."

pytestmark = pytest.mark.usefixtures("heeded")


def asked(model):
    return jaxsp.questions(model, TEXT, max_answer_tokens=48, progress=False)


def test_an_interrupted_study_goes_on_from_what_the_cache_has(calm_model, cache, monkeypatch):
    """Texts and answers that are there are not made again, and once all are nothing is."""
    monkeypatch.setenv("JAXSP_TEACHER_CACHE", "off")
    whole = asked(calm_model)
    monkeypatch.delenv("JAXSP_TEACHER_CACHE")

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(questions, "_fit", stop)
        with pytest.raises(KeyboardInterrupt):
            asked(calm_model)
    assert list((cache / "teachers").glob("*.begun.part"))
    monkeypatch.setattr(questions, "completed", stop)
    monkeypatch.setattr("jaxsp.teacher.problem.answer_ids", stop)
    assert asked(calm_model) == whole
    assert len(list((cache / "teachers").iterdir())) == 1
    monkeypatch.setattr("jaxsp.study.alone.study", stop)
    assert asked(calm_model) == whole


def test_a_cache_that_cannot_be_written_to_keeps_nobody_from_asking(calm_model, cache, monkeypatch):
    cache.write_text("a file where the folder should be")
    assert asked(calm_model).train
