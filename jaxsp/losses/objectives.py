"""The table of objectives: everything a prompt can be trained on or measured by, position by position."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsp.losses import divergence, likelihood, mismatch, similarity, uncertainty
from jaxsp.losses.checks import Losses, Mask, number
from jaxsp.losses.objective import OBJECTIVES, TEACHER_TOPK, Objective, choices, listed, no_option
from jaxsp.losses.topk import (
    TOPK,
    renormalised_topk_kl_divergence,
    topk_js_divergence,
    topk_kl_divergence,
    topk_reverse_kl_divergence,
    truncated_kl_divergence,
)
from jaxsp.typing import AnyArray, UserError

_HIDDEN = ("teacher_hidden", "student_hidden")
_best = functools.partial(Objective, inputs=(*TEACHER_TOPK, "student_logits"))
_with_tail = functools.partial(_best, optional=("teacher_tail",))
_metric = functools.partial(Objective, differentiable=False)

OBJECTIVES |= {
    "kl": Objective(divergence.kl_divergence, reference="arXiv:1503.02531"),
    "reverse_kl": Objective(divergence.reverse_kl_divergence, reference="arXiv:2306.08543"),
    "js": Objective(divergence.js_divergence, reference="arXiv:2306.13649"),
    "skewed_kl": Objective(divergence.skewed_kl_divergence, reference="arXiv:2402.03898"),
    "alpha": Objective(divergence.alpha_divergence, reference="doi:10.1109/TIT.2009.2030485"),
    "renyi": Objective(divergence.renyi_divergence, reference="arXiv:1206.2459"),
    "total_variation": Objective(divergence.total_variation, reference="arXiv:2307.15190"),
    "topk_kl": _with_tail(topk_kl_divergence, reference="Cover & Thomas 2006, ch. 2"),
    "topk_reverse_kl": _with_tail(topk_reverse_kl_divergence, reference="arXiv:2306.08543"),
    "topk_js": _with_tail(topk_js_divergence, reference="arXiv:2306.13649"),
    "truncated_kl": _best(truncated_kl_divergence, reference="arXiv:2506.06266"),
    "renormalised_topk_kl": _best(renormalised_topk_kl_divergence, reference="arXiv:2503.16870"),
    "nll": Objective(
        likelihood.negative_log_likelihood, ("student_logits", "targets"), reference="arXiv:2501.09223"
    ),
    "zero_one": _metric(mismatch.zero_one, reference="arXiv:2501.09223"),
    "topk_mismatch": _metric(mismatch.topk_mismatch, reference="arXiv:1409.0575"),
    "rank_agreement": _metric(
        mismatch.rank_agreement, sense="maximise", reference="doi:10.1093/biomet/30.1-2.81"
    ),
    "entropy": Objective(uncertainty.entropy, ("student_logits",), reference="Grandvalet & Bengio 2004"),
    "confidence_shift": Objective(uncertainty.confidence_shift, sense="zero", reference="arXiv:1706.04599"),
    "cosine_similarity": Objective(
        similarity.cosine_similarity, _HIDDEN, "maximise", reference="arXiv:1910.01108"
    ),
    "distribution_cosine_similarity": Objective(
        similarity.distribution_cosine_similarity, sense="maximise", reference="Salton, Wong & Yang 1975"
    ),
    "hidden_mse": Objective(similarity.hidden_mse, _HIDDEN, reference="arXiv:1412.6550"),
}
_FORMER = {"top_k_mismatch": "topk_mismatch"}  # of versions before


def _weighted_sum(*inputs_and_mask: Any) -> Any:
    """Stands in a mixture for the function that its terms have."""


@dataclasses.dataclass(frozen=True, repr=False)
class _Mixture(Objective):
    """A weighted sum of objectives, each given all there is; equal ones are equal, and compile once."""

    terms: tuple[tuple[float, Objective], ...] = ()

    def __call__(self, *, mask: Mask = None, axis_name: Any = None, **available: AnyArray | None) -> Losses:
        found = jnp.float32(0)
        for weight, entry in self.terms:
            values = entry(mask=mask, axis_name=axis_name, **available)
            found += weight * self._factor(entry, available.get("temperature")) * entry.cost(values)
        return found

    def __str__(self) -> str:
        return ",".join(f"{entry}={weight!r}".removesuffix(".0") for weight, entry in self.terms)

    @property
    def entries(self) -> int:
        return max((entry.entries for _, entry in self.terms if entry.compares_best), default=TOPK)

    @property
    def is_ours(self) -> bool:
        return all(entry.is_ours for _, entry in self.terms)

    @property
    def sums_over_shards(self) -> bool:
        return all(entry.sums_over_shards for _, entry in self.terms)

    @property
    def known_options(self) -> dict[str, Any]:
        return {name: value for _, entry in self.terms for name, value in entry.known_options.items()}

    def with_options(self, **options: Any) -> Objective:
        """The mixture with each option in all terms that have it; a temperature as in ``mixture``."""
        for name in options.keys() - self.known_options.keys():
            raise no_option(self, name, self.known_options)
        terms = []
        for weight, entry in self.terms:
            own = {name: value for name, value in options.items() if name in entry.known_options}
            changed = entry.with_options(**own)
            terms.append((weight * self._factor(entry, _temperature(changed)), changed))
        return dataclasses.replace(self, terms=tuple(terms))

    def _factor(self, entry: Objective, temperature: Any) -> Any:
        """Factor of a weight at another temperature: of several terms the gradients keep their size."""
        if temperature is None or len(self.terms) == 1 or "temperature" not in entry.known_options:
            return 1.0
        own = _temperature(entry)
        unchanged = isinstance(temperature, float) and temperature == own
        return 1.0 if unchanged else (temperature / own) ** 2


def _temperature(entry: Objective) -> float:
    return dict(entry.options).get("temperature", 1.0)


def mixture(*, temperature: float = 1.0, **weights: float) -> Objective:
    r"""A weighted sum of table entries, each turned so that less is better.

    .. math:: \sum_i w_i\, s_i

    Args:
      temperature: τ, given to every entry that has one (the divergences of distributions). Their gradients
        shrink by 1/τ² as it grows (that of ``total_variation`` by 1/τ alone); so of several terms these are
        multiplied by τ², and the weights keep their meaning.
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
      ('hidden', 'tokens')
      >>> both(teacher_logits=p, student_logits=q, targets=jnp.array([0])).round(4)
      Array([0.1768], dtype=float32)
      >>> mixture(kl=0.7, nll=0.3, temperature=2)
      Objective(kl(temperature=2)=2.8,nll=0.3)

    Reference:
      Hinton et al. 2015 (arXiv:1503.02531), section 2, mix the teacher's distribution and the gold label so.
    """
    terms = [(name, {}, number(name, weight)) for name, weight in weights.items()]
    return _mixed(terms, number("temperature", temperature))


def parse(text: str) -> Objective:
    """The objective that a text names.

    Args:
      text: keys of ``OBJECTIVES``, each with options and a weight if wanted:
        ``NAME(option=value,...)=WEIGHT``, joined by commas. One without a weight is the entry itself;
        of several, a weight that is not written is 1. ``temperature=2`` among them is that of ``mixture``: of
        all that have one, but for those with their own in parentheses.

    Returns:
      The ``Objective``; ``str`` of it gives such a text again.

    Raises:
      UserError: the text names nothing, or an option or a weight is not allowed.

    Example:
      >>> parse("kl") is OBJECTIVES["kl"]
      True
      >>> parse("topk_kl(k=20)").options
      (('k', 20),)
      >>> parse("kl(temperature=2)=0.7, nll(label_smoothing=0.1)=0.3")
      Objective(kl(temperature=2)=0.7,nll(label_smoothing=0.1)=0.3)
      >>> parse("kl=0.7,nll=0.3") == mixture(kl=0.7, nll=0.3)
      True
    """
    terms = []
    for part in re.split(r",(?![^()]*\))", text):  # at commas that stand outside parentheses
        name = re.split(r"[(=]", part)[0].strip()
        known = {} if name == "temperature" else named(name).known_options
        try:
            if (term := _TERM.fullmatch(part)) is None:
                raise ValueError
            _, inside, weight = term.groups()
            pairs = [pair.split("=") for pair in inside.split(",")] if inside else []
            options = {option.strip(): _number(value) for option, value in pairs}
            weight = None if weight is None else _number(weight)
            if len(options) < len(pairs) or (name == "temperature" and (options or weight is None)):
                raise ValueError
        except ValueError:
            form = f" or {name}(OPTION=NUMBER,...), with {choices('', known)}" if known else "."
            raise UserError(
                f"Objective {part.strip()!r} can't be read; it should read like {name}=0.7{form}"
            ) from None
        terms.append((name, options, weight))
    temperatures = [weight for name, _, weight in terms if name == "temperature"]
    if len(temperatures) > 1:
        raise UserError(f"Objective {text!r} has temperature twice.")
    return _mixed([term for term in terms if term[0] != "temperature"], *temperatures)


def as_objective(objective: str | Objective, *, by_gradient: bool = True) -> Objective:
    """The objective to train on, from a text or as it is.

    Args:
      objective: a text that ``parse`` reads, or an ``Objective``.
      by_gradient: refuse one without a gradient to train on.

    Returns:
      The ``Objective``.

    Raises:
      UserError: it is neither, the text can't be read, or its gradient is zero almost everywhere.

    Example:
      >>> as_objective("js(beta=0.3)")
      Objective(js(beta=0.3))
      >>> as_objective(OBJECTIVES["kl"]) is OBJECTIVES["kl"]
      True
    """
    if isinstance(objective, str):
        objective = parse(objective)
    if not isinstance(objective, Objective):
        raise UserError(
            f"The objective must be a text such as 'kl' or a jaxsp.losses.Objective, not"
            f" {objective!r}; a function of your own becomes one by Objective(function)."
        )
    if by_gradient:
        objective.check_differentiable()
    return objective


def named(name: str) -> Objective:
    """The entry of ``OBJECTIVES``; raises ``UserError`` with the choices if there is none."""
    name = _FORMER.get(name, name)
    if name not in OBJECTIVES:
        raise UserError(f"Unknown objective {name!r}; choose one of {choices(name, OBJECTIVES)}")
    return OBJECTIVES[name]


_OPTION = r"\s*\w+\s*=[^,=()]+"
_TERM = re.compile(rf"\s*(\w+)\s*(?:\(({_OPTION}(?:,{_OPTION})*)\)\s*)?(?:=([^,=()]+))?")


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _mixed(terms: Sequence[tuple[str, dict, float | None]], temperature: float = 1.0) -> Objective:
    """The sum of (name, options, weight); of a single one without a weight, the entry itself."""
    if not terms:
        raise UserError("A mixture needs at least one objective, such as kl=0.7.")
    heated = [name for name, *_ in terms if "temperature" in named(name).known_options]
    if temperature != 1 and not heated:
        raise UserError(f"None of {', '.join(name for name, *_ in terms)} has a temperature.")
    parts: list[tuple[float, Objective]] = []
    for name, options, weight in terms:
        shared = {"temperature": temperature} if temperature != 1 and name in heated else {}
        entry = _checked(named(name), {**shared, **options})
        if weight is None and len(terms) == 1:
            return entry
        entry.check_differentiable()
        weight = 1.0 if weight is None else float(weight)
        if shared and "temperature" not in options and len(terms) > 1:
            weight *= temperature * temperature
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"The weight of {entry} must be positive, not {weight}.")
        if entry in (other for _, other in parts):
            raise UserError(f"The mixture has {entry} twice; add up its weights.")
        parts.append((weight, entry))
    # One that names no k compares as many as alone, however many another one asks for.
    if max((entry.entries for _, entry in parts if entry.compares_best), default=0) > TOPK:
        parts = [(weight, _with_own_k(entry)) for weight, entry in parts]
    if len(parts) == 1 and parts[0][0] == 1 and parts[0][1].sense == "minimise":
        return parts[0][1]  # which compiles to less
    inputs = dict.fromkeys(name for _, entry in parts for name in entry.inputs)
    return _Mixture(_weighted_sum, tuple(inputs), terms=tuple(parts))


def _with_own_k(entry: Objective) -> Objective:
    options = {"k": entry.entries, **dict(entry.options)}
    return dataclasses.replace(entry, options=options) if entry.compares_best else entry


def _checked(entry: Objective, options: dict[str, Any]) -> Objective:
    """The entry with these options, if its function takes their values; nothing is computed."""
    inputs = ("teacher_logits", "student_logits", *_HIDDEN)
    shapes = {name: jax.ShapeDtypeStruct((1, 2), jnp.float32) for name in inputs}
    shapes["targets"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    try:
        changed = dataclasses.replace(entry, options=options)
        if changed == entry:
            return entry
        jax.eval_shape(lambda arrays: changed(**arrays), shapes)
    except (ValueError, OverflowError) as error:
        raise UserError(f"Objective {entry}{listed(options)}: {error}") from None
    return changed
