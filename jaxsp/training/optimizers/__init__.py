"""The optimizers of σ: one file each, one line each in ``OPTIMIZERS`` (optax).

An optimizer is a function from the training settings to an ``optax.GradientTransformation`` for arrays of any
rank. It gives the change of σ at a learning rate of 1; ``update`` scales it by the schedule.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsp.prompts import PROMPT_KINDS
from jaxsp.settings import Settings, TrainingSettings
from jaxsp.training.evolution import Evolution
from jaxsp.training.optimizers import adam, adamw, evolution, muon
from jaxsp.training.optimizers.schedule import Schedule, constant, warmup_cosine
from jaxsp.typing import PyTree, UserError

OPTIMIZERS: dict[str, Callable[[TrainingSettings], optax.GradientTransformation | Evolution]] = {
    "muon": muon.make,
    "adam": adam.make,
    "adamw": adamw.make,
    "evolution": evolution.make,
}


def make_optimizer(settings: TrainingSettings) -> optax.GradientTransformation | Evolution:
    """The optimizer that the settings name, behind the gradient's clipping; one of the user's own as it is.

    Raises:
      UserError: there is none of that name.
    """
    chosen: Any = settings.optimizer
    if not isinstance(chosen, str):
        return chosen
    if chosen not in OPTIMIZERS:
        raise UserError(f"Unknown optimizer {chosen!r}; choose one of {', '.join(OPTIMIZERS)}.")
    # Of the settings, only what the optimizer reads: one object for one choice, so that equal updates
    # compile once.
    return _optimizer(
        TrainingSettings(
            optimizer=chosen, weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm
        )
    )


@functools.lru_cache
def _optimizer(settings: TrainingSettings) -> optax.GradientTransformation | Evolution:
    made = OPTIMIZERS[str(settings.optimizer)](settings)
    if isinstance(made, Evolution) or not settings.max_grad_norm:
        return made  # ranks have no outliers to clip
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), made)


def _is_ours(optimizer: Any) -> bool:
    """Whether the settings say how far an optimizer moves σ; one of the user's own does so itself."""
    return isinstance(optimizer, str | Evolution)


def make_schedule(settings: TrainingSettings) -> Schedule:
    """The learning rate of every step; an optimizer of the user's own has its own."""
    if not _is_ours(settings.optimizer) or settings.learning_rate is None:
        return constant(settings.updates)
    return warmup_cosine(settings.learning_rate, settings.updates, settings.warmup_fraction)


def make_rates(settings: Settings, sigma: PyTree) -> PyTree:
    """Sizes of a step of each entry at a learning rate of 1, as the kind and ``rates`` say.

    An optimizer of the user's own moves all parts alike, but for those that stay.

    Raises:
      UserError: the prompt has no such part.
    """
    kind, factors = settings.prompt.kind, parse_rates(settings.training.rates)
    parts = [name for name, part in sigma.items() if isinstance(part, Mapping) or np.ndim(part)]
    _check_parts(kind, factors, parts)
    rates = _rates(kind, sigma, tuple(factors.items()))
    if _is_ours(settings.training.optimizer):
        return rates
    return jax.tree.map(lambda rate: jnp.where(rate == 0, 0.0, 1.0), rates)


def check_rates(settings: Settings) -> None:
    """Raises ``UserError`` if ``rates`` can't be read, or names what a prompt of this kind does not have.

    Of a kind without a ``FORM`` the parts are known once it has started.
    """
    kind, factors = settings.prompt.kind, parse_rates(settings.training.rates)
    if not (factors and (form := getattr(PROMPT_KINDS[kind], "FORM", None))):
        return
    smallest: dict[str, Any] = {}
    for name, axes in form.items():
        *outer, own = name.split(".")
        part = smallest.setdefault(outer[0], {}) if outer else smallest
        part[own] = jax.ShapeDtypeStruct([1] * len(axes.split()), jnp.float32)
    _check_parts(kind, factors, dict.fromkeys(name.partition(".")[0] for name, axes in form.items() if axes))
    jax.eval_shape(functools.partial(_rates, kind, factors=tuple(factors.items())), smallest)


def _check_parts(kind: str, factors: Mapping[str, float], parts: Iterable[str]) -> None:
    if unknown := factors.keys() - {"first", *parts}:
        raise UserError(
            f"--rates: a prompt of kind {kind} has no part {min(unknown)!r}; its parts are"
            f" {', '.join(parts)}, and first (its first slot)."
        )


@functools.partial(jax.jit, static_argnames=("kind", "factors"))
def _rates(kind: str, sigma: PyTree, factors: tuple[tuple[str, float], ...]) -> PyTree:
    return PROMPT_KINDS[kind].rates(sigma, dict(factors))


def parse_rates(text: str) -> dict[str, float]:
    """Factors by name.

    Raises:
      UserError: the text can't be read.

    Example:
      >>> parse_rates("keys=0.1,first=0")
      {'keys': 0.1, 'first': 0.0}
    """
    factors = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            factors[name.strip()] = float(value)
        except ValueError:
            raise UserError(f"--rates must be like keys=0.1,first=0, not {text!r}.") from None
        if not 0 <= factors[name.strip()] < math.inf:
            raise UserError(f"--rates: a factor must be at least 0 and finite, not {value}.")
    return factors
