"""jaxsp.evaluation.brackets: the report checks what the teacher is said to have said."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxsp.data.documents import as_queries
from jaxsp.evaluation.brackets import check_teacher
from jaxsp.progress import Display
from jaxsp.settings import make_settings
from jaxsp.teacher.problem import read_preamble, run_teacher, tokenize
from jaxsp.typing import UserError
from tests.conftest import CONTEXT, QUERIES


@pytest.fixture(scope="module")
def problem(calm_model):
    settings = make_settings({"max_answer_tokens": 6})
    train, held_out = as_queries(QUERIES[:3]), as_queries(QUERIES[7:9])
    job = tokenize(calm_model, CONTEXT, train, held_out, settings)
    return run_teacher(calm_model, job, settings.teacher, read_preamble(calm_model), Display(visible=False))


def test_a_teacher_of_this_text_and_model_is_believed(calm_model, problem):
    check_teacher(calm_model, problem)


def test_one_of_another_text_is_not(calm_model, problem):
    job = tokenize(
        calm_model, CONTEXT.replace("steel", "brass"), as_queries(QUERIES[:3]), as_queries(QUERIES[7:9]),
        make_settings({"max_answer_tokens": 6}),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"not what the model says after the context: KL .* instead of 0"):
        check_teacher(calm_model, dataclasses.replace(problem, job=job))


def test_signals_that_are_no_numbers_are_not(calm_model, problem):
    hidden = np.full_like(np.asarray(problem.rows.targets["hidden"]), np.nan)
    rows = problem.rows.with_targets(hidden=hidden)
    with pytest.raises(UserError, match="KL nan instead of 0"):
        check_teacher(calm_model, dataclasses.replace(problem, rows=rows))
