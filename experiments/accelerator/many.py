"""Many prompts trained side by side, beside one after the other: the update of SmolLM2's shape."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.accelerator.checks import Check, Goal, seconds
from experiments.decoder_speed.jobs import decoder_config, random_params
from experiments.decoder_speed.workload import SHAPES
from experiments.suite import Run
from jaxsp import distributions
from jaxsp.data.examples import Rows, make_rows
from jaxsp.data.packing import Packing
from jaxsp.models.config import DecoderConfig
from jaxsp.prompts import with_defaults
from jaxsp.settings import make_settings
from jaxsp.training.drivers import sharded_update
from jaxsp.training.optimizers import make_optimizer, make_rates, make_schedule
from jaxsp.training.state import TrainState, initial_state, stack
from jaxsp.training.update import Frozen, UpdateSettings

PROMPTS, QUERIES, CONTEXT, PREAMBLE = 64, 24, 354, 32


def checks(run: Run) -> list[Check]:
    """The ratio, and that both ways compute the same."""
    found: dict[str, Any] = {}

    def both() -> dict[str, Any]:
        if not found:
            found.update(measure(run))
        return found

    goal = Goal(least=5.0) if run.full else None
    return [
        Check(
            f"{PROMPTS if run.full else 2} prompts at once",
            "seconds of a step of each, one after the other, as a multiple of those of all at once",
            "×",
            lambda: (both()["loop"] / both()["at_once"], both()),
            goal,
        ),
        Check(
            "at once as alone",
            "largest difference between the losses of a prompt at once and alone",
            "of the loss",
            lambda: both()["difference"],
            Goal(most=0.02),
        ),
    ]


def measure(run: Run) -> dict[str, Any]:
    """Seconds of a step of all prompts both ways, and how far their losses are apart."""
    config = decoder_config(SHAPES["smollm2-135m" if run.full else "tiny"], "bfloat16")
    prompts, length = (PROMPTS, 16) if run.full else (2, 4)
    settings = with_defaults(make_settings({"prompt_length": length, "batch_size": 8 if run.full else 2}))
    params, before = random_params(config), np.arange(PREAMBLE)[None] % config.vocab_size
    frozen = Frozen(params, distributions.context_prefix(params, config, before))
    chosen = UpdateSettings.of(config, settings)
    batches = [batch(config, settings.training.batch_size, seed, run.full) for seed in range(prompts)]
    states = [start(frozen, config, settings, seed) for seed in range(prompts)]
    one = [
        jax.device_put((stack([state]), jax.tree.map(lambda leaf: leaf[None], rows)))
        for state, rows in zip(states, batches, strict=True)
    ]
    every = jax.device_put((stack(states), jax.tree.map(lambda *leaves: np.stack(leaves), *batches)))

    def step(given: tuple[TrainState, Rows]) -> Any:
        return sharded_update(*given, frozen=frozen, settings=chosen)

    repeats = 5 if run.full else 1
    losses = jnp.concatenate([step(given)[1]["loss"] for given in one])
    difference = jnp.max(jnp.abs(step(every)[1]["loss"] / losses - 1))
    at_once = seconds(lambda: step(every), repeats)
    loop = seconds(lambda: [step(given) for given in one], repeats)
    return {
        "prompts": prompts, "tokens_a_prompt": int(batches[0].tokens.size), "kind": settings.prompt.kind,
        "at_once": at_once, "loop": loop, "difference": float(difference),
    }  # fmt: skip


def batch(config: DecoderConfig, size: int, seed: int, full: bool) -> Rows:
    """Random questions and answers, packed, with random states of the teacher."""
    random = np.random.default_rng(seed)

    def ids(longest: int) -> list[list[int]]:
        # Of one length: the shapes of all prompts' batches are the same.
        return random.integers(0, config.vocab_size, (QUERIES, longest)).tolist()

    rows = make_rows(ids(24 if full else 4), ids(32 if full else 4))
    hidden = random.standard_normal((*rows.mask.shape, config.width), np.float32)
    rows = rows.with_targets(hidden=np.asarray(hidden).astype(jnp.dtype(config.dtype)))
    packing = Packing.of(rows.lengths, size)
    return packing.pack(rows, packing.draw(rows.lengths, 0, [seed]))


def start(frozen: Frozen, config: DecoderConfig, settings: Any, seed: int) -> TrainState:
    """A prompt of the default kind, which begins as a document's first tokens."""
    key = jax.random.key(seed)
    context = np.random.default_rng(seed).integers(0, config.vocab_size, CONTEXT)
    sigma = distributions.initial_prompt(
        frozen.params, config, context, frozen.preamble, key=key, initial="first",
        prompt_length=settings.prompt.prompt_length, kind=settings.prompt.kind, rank=settings.prompt.rank,
    )  # fmt: skip
    optimizer, schedule = make_optimizer(settings.training), make_schedule(settings.training)
    return initial_state(sigma, optimizer, key=key, schedule=schedule, rates=make_rates(settings, sigma))
