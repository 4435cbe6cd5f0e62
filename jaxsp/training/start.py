"""The training state of a problem before the first step."""

from __future__ import annotations

import jax
import numpy as np

from jaxsp import distributions
from jaxsp.models.language_model import LanguageModel
from jaxsp.prompts import with_defaults
from jaxsp.settings import Settings
from jaxsp.teacher.problem import Problem, TokenizedJob
from jaxsp.training.optimizers import make_optimizer, make_rates, make_schedule
from jaxsp.training.state import TrainState, initial_state
from jaxsp.typing import Int


def _held(model: LanguageModel, job: TokenizedJob, settings: Settings) -> Int[np.ndarray, " c"]:
    """The context, or as much of it as σ can stand for where the model has no room for all of it.

    Keys and values stand where the context did, and the queries after them: within the model's window, with
    at least as much room left for other queries.
    """
    if job.fits(model.config.window, settings.teacher):
        return job.context_ids
    room = model.config.window - len(job.preamble_ids) - job.longest(settings.teacher) - 1
    return job.context_ids[: max(settings.prompt.prompt_length, room // 2)]


def start_state(model: LanguageModel, problem: Problem, settings: Settings) -> TrainState:
    """The state that the settings ask for: σ, optimizer, schedule, key."""
    key, context_ids = jax.random.key(settings.training.seed), _held(model, problem.job, settings)
    own = jax.random.fold_in(key, 1)
    settings = with_defaults(settings)
    sigma = distributions.initial_prompt(
        model.params, model.config, context_ids, problem.preamble, key=own, rows=problem.train,
        prompt_length=settings.prompt.prompt_length, initial=settings.prompt.initial,
        kind=settings.prompt.kind, rank=settings.prompt.rank,
    )  # fmt: skip
    optimizer, schedule = make_optimizer(settings.training), make_schedule(settings.training)
    return initial_state(sigma, optimizer, key=key, schedule=schedule, rates=make_rates(settings, sigma))
