"""The table of objectives: everything a prompt can be trained on or measured by, position by position."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp

from jaxsp.losses.checks import number
from jaxsp.losses.divergence import (
    js_divergence,
    kl_divergence,
    reverse_kl_divergence,
    total_variation,
)
from jaxsp.losses.likelihood import negative_log_likelihood
from jaxsp.losses.mismatch import rank_agreement, top_k_mismatch, zero_one
from jaxsp.losses.similarity import cosine_similarity, distribution_cosine_similarity, hidden_mse
from jaxsp.losses.topk import top_k, topk_kl_divergence, truncated_kl_divergence
from jaxsp.losses.uncertainty import confidence_shift, entropy
from jaxsp.typing import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxsp.typing import Array, Bool, Float

# What an input asks of the teacher; those that are not here ask nothing.
_NEEDS = {
    "teacher_logits": "hidden",  # the frozen head makes the one from the other
    "teacher_hidden": "hidden",
    "teacher_log_probs": "top-k",
    "targets": "tokens",
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """One entry of ``OBJECTIVES``; call it with everything there is, it takes what it needs.

    Attributes:
      function: called ``function(*inputs, mask, **options)``; gives ``[*b, t]``.
      inputs: names of what it compares, in its order: ``teacher_logits``, ``student_logits``,
        ``teacher_hidden``, ``student_hidden``, ``teacher_log_probs``, ``teacher_ids``, ``targets``.
      sense: whether a good prompt makes it small, large, or brings it to zero from either side.
      differentiable: whether its gradient says anything.
      reference: where it comes from.
      options: keyword arguments of the function, by name.
    """

    function: Callable[..., Array]
    inputs: tuple[str, ...] = ("teacher_logits", "student_logits")
    sense: Literal["minimise", "maximise", "zero"] = "minimise"
    differentiable: bool = True
    reference: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def needs(self) -> str:
        """What it needs from the teacher: ``hidden`` states, ``top-k`` entries, ``tokens`` or ``nothing``.

        A mixture's needs are joined by `` + ``.
        """
        found = dict.fromkeys(_NEEDS[name] for name in self.inputs if name in _NEEDS)
        return " + ".join(found) or "nothing"

    def __call__(
        self, *, mask: Bool[Array, "*b t"] | None = None, **available: Array | None
    ) -> Float[Array, "*b t"]:
        """The unreduced values ``[*b, t]`` of this objective, as they are reported.

        Args:
          mask: True where a position counts; all if ``None``.
          **available: arrays by the names of ``inputs``; more than it needs will do. Where the
            teacher's top-k entries are not given, they are taken from ``teacher_logits``.

        Raises:
          ValueError: an input is missing or does not fit.
        """
        logits = available.get("teacher_logits")
        absent = all(available.get(name) is None for name in _TOP_K[:2])
        if "teacher_ids" in self.inputs and absent and logits is not None:
            available = {**available, **dict(zip(_TOP_K, top_k(logits), strict=False))}
        for name in self.inputs:
            if available.get(name) is None:
                raise ValueError(f"This objective needs {name}; it was not given.")
        arrays = (available[name] for name in self.inputs)
        return self.function(*arrays, mask, **dict(self.options))

    def check_differentiable(self) -> None:
        """Raises ``UserError`` if there is no gradient to train on."""
        if not self.differentiable:
            choices = ", ".join(name for name, entry in OBJECTIVES.items() if entry.differentiable)
            name = getattr(self.function, "__name__", "this objective")
            raise UserError(
                f"One can't train on {name}: it is piecewise constant, so its gradient is zero almost"
                f" everywhere. Train on one of {choices}; {name} can be measured all the same."
            )

    def cost(self, values: Float[Array, "*b t"]) -> Float[Array, "*b t"]:
        """The values turned so that less is better: what a trainer minimises."""
        turn = {"minimise": lambda v: v, "maximise": lambda v: -v, "zero": jnp.abs}
        return turn[self.sense](values)


_TOP_K = ("teacher_log_probs", "teacher_ids", "student_logits")

OBJECTIVES: dict[str, Objective] = {
    "kl": Objective(kl_divergence, reference="arXiv:1503.02531"),
    "reverse_kl": Objective(reverse_kl_divergence, reference="arXiv:2306.08543"),
    "js": Objective(js_divergence, reference="arXiv:2306.13649"),
    "total_variation": Objective(total_variation, reference="arXiv:2307.15190"),
    "topk_kl": Objective(topk_kl_divergence, _TOP_K, reference="Cover & Thomas 2006, ch. 2"),
    "truncated_kl": Objective(truncated_kl_divergence, _TOP_K, reference="arXiv:2506.06266"),
    "nll": Objective(
        negative_log_likelihood, ("student_logits", "targets"), reference="arXiv:2501.09223"
    ),
    "zero_one": Objective(zero_one, differentiable=False, reference="arXiv:2501.09223"),
    "top_k_mismatch": Objective(top_k_mismatch, differentiable=False, reference="arXiv:1409.0575"),
    "rank_agreement": Objective(
        rank_agreement,
        sense="maximise",
        differentiable=False,
        reference="doi:10.1093/biomet/30.1-2.81",
    ),
    "entropy": Objective(entropy, ("student_logits",), reference="Grandvalet & Bengio 2004"),
    "confidence_shift": Objective(confidence_shift, sense="zero", reference="arXiv:1706.04599"),
    "cosine_similarity": Objective(
        cosine_similarity,
        ("teacher_hidden", "student_hidden"),
        sense="maximise",
        reference="arXiv:1910.01108",
    ),
    "distribution_cosine_similarity": Objective(
        distribution_cosine_similarity, sense="maximise", reference="Salton, Wong & Yang 1975"
    ),
    "hidden_mse": Objective(
        hidden_mse, ("teacher_hidden", "student_hidden"), reference="arXiv:1412.6550"
    ),
}


def mixture(*, temperature: float = 1.0, **weights: float) -> Objective:
    r"""A weighted sum of table entries, each turned so that less is better.

    .. math:: \sum_i w_i\, s_i

    Args:
      temperature: given to every entry that has one (the divergences of distributions).
      **weights: by name of the entry, each positive.

    Returns:
      An ``Objective`` to minimise.

    Raises:
      UserError: an unknown or non-differentiable entry, a weight that is not positive and finite, or
        a temperature where no entry has one.

    Example:
      >>> import jax.numpy as jnp
      >>> p, q = jnp.log(jnp.array([[0.6, 0.3, 0.1]])), jnp.log(jnp.array([[0.8, 0.1, 0.1]]))
      >>> both = mixture(kl=0.7, nll=0.3)
      >>> both.needs
      'hidden + tokens'
      >>> both(teacher_logits=p, student_logits=q, targets=jnp.array([0])).round(4)
      Array([0.1768], dtype=float32)

    Reference:
      Hinton et al. 2015 (arXiv:1503.02531) mix the teacher's distribution and the gold label.
    """
    if not weights:
        raise UserError("A mixture needs at least one objective, such as kl=0.7.")
    parts = []
    temperature = number(temperature=temperature)
    if not 0 < temperature < math.inf:
        raise UserError(f"The temperature must be positive, not {temperature}.")
    for name, weight in weights.items():
        weight = number(**{name: weight})
        entry = _differentiable(name)
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"The weight of {name} must be positive, not {weight}.")
        if "temperature" in inspect.signature(entry.function).parameters:
            entry = dataclasses.replace(entry, options=(("temperature", temperature),))
        parts.append((weight, entry))
    if temperature != 1.0 and not any(entry.options for _, entry in parts):
        raise UserError(f"None of {', '.join(weights)} has a temperature.")
    if len(parts) == 1 and parts[0][0] == 1 and parts[0][1].sense == "minimise":
        return parts[0][1]  # which compiles to less
    inputs = dict.fromkeys(name for _, entry in parts for name in entry.inputs)
    return Objective(_Mixture(tuple(parts), tuple(inputs)), tuple(inputs))


@dataclasses.dataclass(frozen=True)
class _Mixture:
    """The function of a mixture; equal mixtures are equal, so that they compile once."""

    parts: tuple[tuple[float, Objective], ...]
    inputs: tuple[str, ...]

    def __call__(self, *arrays_and_mask: Array) -> Array:
        *arrays, mask = arrays_and_mask
        available = dict(zip(self.inputs, arrays, strict=True))
        costs = (w * entry.cost(entry(mask=mask, **available)) for w, entry in self.parts)
        return sum(costs, start=jnp.float32(0))


def trainable(name: str) -> Objective:
    """The objective of that name, if a prompt can be trained on it.

    Args:
      name: a key of ``OBJECTIVES``, or a mixture written ``kl=0.7,nll=0.3`` or
        ``kl=1,temperature=2``.

    Returns:
      The ``Objective``.

    Raises:
      UserError: there is none, or its gradient is zero almost everywhere.

    Example:
      >>> trainable("kl").sense
      'minimise'
      >>> trainable("kl=0.7,nll=0.3") == mixture(kl=0.7, nll=0.3)
      True
    """
    if "=" not in name:
        return _differentiable(name)
    weights = {}
    for part in name.split(","):
        key, _, value = part.partition("=")
        if key.strip() in weights:
            raise UserError(f"Objective {name!r} has {key.strip()} twice.")
        try:
            weights[key.strip()] = float(value)
        except ValueError:
            raise UserError(
                f"Objective {name!r} is no mixture: {part!r} should read like kl=0.7."
            ) from None
    return mixture(**weights)


def named(name: str) -> Objective:
    """The entry of ``OBJECTIVES``; raises ``UserError`` with the choices if there is none."""
    if name not in OBJECTIVES:
        raise UserError(f"Unknown objective {name!r}; choose one of {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name]


def _differentiable(name: str) -> Objective:
    choices = ", ".join(key for key, entry in OBJECTIVES.items() if entry.differentiable)
    if name not in OBJECTIVES:
        raise UserError(f"Unknown objective {name!r}; choose one of {choices}.")
    OBJECTIVES[name].check_differentiable()
    return OBJECTIVES[name]
