"""The training state of a problem before the first step."""

from __future__ import annotations

import jax
import numpy as np

from jaxsp import distributions
from jaxsp.models.language_model import LanguageModel
from jaxsp.prompts import with_defaults
from jaxsp.settings import Settings
from jaxsp.teacher.problem import Problem
from jaxsp.training.optimizers import make_optimizer, make_rates, make_schedule
from jaxsp.training.state import TrainState, initial_state


def start_state(model: LanguageModel, problem: Problem, settings: Settings) -> TrainState:
    """The state that the settings ask for: σ, optimizer, schedule, key."""
    key, job = jax.random.key(settings.training.seed), problem.job
    parts = [part.ids for part in job.parts]
    own = jax.random.fold_in(key, 1)
    settings = with_defaults(settings)
    sigma = distributions.initial_prompt(
        model.params, model.config, np.concatenate(parts), problem.preamble, key=own, rows=problem.train,
        part_lengths=[len(ids) for ids in parts], part_of=problem.train_part_of,
        prompt_length=settings.prompt.prompt_length, initial=settings.prompt.initial,
        kind=settings.prompt.kind, rank=settings.prompt.rank,
    )  # fmt: skip
    optimizer, schedule = make_optimizer(settings.training), make_schedule(settings.training)
    return initial_state(sigma, optimizer, key=key, schedule=schedule, rates=make_rates(settings, sigma))
