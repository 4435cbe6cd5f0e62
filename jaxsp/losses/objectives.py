"""The table of objectives: everything a prompt can be trained on or measured by, position by position."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.losses.checks import Losses, Mask, number
from jaxsp.losses.divergence import js_divergence, kl_divergence, reverse_kl_divergence, total_variation
from jaxsp.losses.likelihood import negative_log_likelihood
from jaxsp.losses.mismatch import rank_agreement, top_k_mismatch, zero_one
from jaxsp.losses.similarity import cosine_similarity, distribution_cosine_similarity, hidden_mse
from jaxsp.losses.topk import TOP_K, top_k, topk_kl_divergence, truncated_kl_divergence
from jaxsp.losses.uncertainty import confidence_shift, entropy
from jaxsp.typing import AnyArray, Array, UserError

# What the teacher must give for an input; those that are not here ask nothing of it.
_NEEDS = {
    "hidden": {"teacher_logits", "teacher_hidden"},  # the frozen head makes the one from the other
    "top_k": {"teacher_log_probs", "teacher_ids"},
    "tokens": {"targets"},
}


@dataclasses.dataclass(frozen=True, repr=False)
class Objective:
    """One entry of ``OBJECTIVES``, or a function of your own; call it with everything there is.

    ``str`` gives the text that ``parse`` reads back; for a function of your own its module and name.

    Attributes:
      function: called ``function(*inputs, mask, **options)``; gives float32 ``[*b, t]``, 0 where the mask
        is False. The mask is boolean ``[*b, t]``, or ``None`` where all positions count.
      inputs: names of what it compares, in its order: ``teacher_logits``, ``student_logits``,
        ``teacher_hidden``, ``student_hidden``, ``teacher_log_probs``, ``teacher_ids``, ``targets``.
      sense: whether a good prompt makes it small, large, or brings it to zero from either side.
      differentiable: whether its gradient says anything.
      reference: where it comes from; no part of what it is.
      options: keyword arguments of the function, by name. Sorted pairs once stored, without those that
        equal the function's defaults: equal objectives compile once.
      optional: names of more arrays, which the function takes by keyword where they are there.

    Raises:
      UserError: the function has no such option.

    Example:
      A divergence that the package does not have, Amari's α-divergence, between KL(q ‖ p) (α → 0) and
      KL(p ‖ q) (α → 1):

      >>> import jax, jax.numpy as jnp
      >>> def alpha_divergence(teacher_logits, student_logits, mask, *, alpha=0.5):
      ...     log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits))
      ...     log_q = jax.nn.log_softmax(student_logits)
      ...     overlap = jnp.sum(jnp.exp(alpha * log_p + (1 - alpha) * log_q), axis=-1)
      ...     return jnp.where(mask, (1 - overlap) / (alpha * (1 - alpha)), 0.0)
      >>> objective = Objective(alpha_divergence, options={"alpha": 0.3})

      Evaluated and differentiated a chunk of positions at a time, as every entry of the table:

      >>> from jaxsp.losses import fused_objective
      >>> teacher, student, head = (jax.random.normal(jax.random.key(i), (3, 4)) for i in range(3))
      >>> def loss(student):
      ...     return jnp.sum(fused_objective(objective, student, head, teacher_hidden=teacher)[0])
      >>> value, gradient = jax.value_and_grad(loss)(student)
      >>> bool(value > 0), gradient.shape, float(loss(teacher)) < 1e-5
      (True, (3, 4), True)

    Reference:
      Amari 2009, α-Divergence Is Unique, Belonging to Both f-Divergence and Bregman Divergence Classes
      (doi:10.1109/TIT.2009.2030485); in this form: Minka 2005, Divergence Measures and Message Passing.
    """

    function: Callable[..., Array]
    inputs: tuple[str, ...] = ("teacher_logits", "student_logits")
    sense: Literal["minimise", "maximise", "zero"] = "minimise"
    differentiable: bool = True
    reference: str = dataclasses.field(default="", compare=False)
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    optional: tuple[str, ...] = ()

    def __post_init__(self):
        given: dict[str, Any] = dict(self.options)
        known, others = _options_of(self) if given else ({}, False)
        for name, value in given.items():
            if name not in known and not others:
                has = f"it has {_choices(name, known)}" if known else "it has none."
                raise UserError(f"{_qualified(self.function)} has no option {name!r}; {has}")
            if isinstance(known.get(name), float):
                given[name] = number(name, value)
            elif isinstance(value, np.generic):
                given[name] = value.item()
        kept = sorted(pair for pair in given.items() if pair not in known.items())
        object.__setattr__(self, "options", tuple(kept))

    def __str__(self) -> str:
        plain = dataclasses.replace(self, options=())
        for name, entry in OBJECTIVES.items():
            if entry == plain:
                return name + _listed(self.options)
        fields = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)[1:4])
        unusual = ",".join(f"{name}={value}" for name, value, usual in fields if value != usual)
        name = _qualified(self.function) + (unusual and f"[{unusual}]")
        return name + _listed(self.options)

    def __repr__(self) -> str:
        return f"Objective({self})"

    @property
    def needs(self) -> tuple[str, ...]:
        """Things that the teacher must give, out of ``hidden``, ``top_k`` and ``tokens``, in this order."""
        return tuple(name for name, makes in _NEEDS.items() if makes.intersection(self.inputs))

    @property
    def entries(self) -> int:
        """Best tokens of the teacher at a position that it compares, where it compares the best alone."""
        return dict(self.options).get("k", TOP_K)

    @property
    def compares_hidden(self) -> bool:
        """Whether it compares hidden states: those of teacher and student must then be of one width."""
        return set(_HIDDEN) <= set(self.inputs)

    def __call__(self, *, mask: Mask = None, **available: AnyArray | None) -> Losses:
        """The unreduced values ``[*b, t]`` of this objective, as they are reported.

        Args:
          mask: True where a position counts; all if ``None``.
          **available: arrays by the names of ``inputs``; more than it needs will do. Where the
            teacher's top-k entries are not given, they are taken from ``teacher_logits``: as many as
            the option k says, else 64.

        Raises:
          ValueError: an input is missing or does not fit.
        """
        options, logits = dict(self.options), available.get("teacher_logits")
        absent = all(available.get(name) is None for name in TEACHER_TOP_K)
        if _compares_best(self) and absent and logits is not None:
            best = dict(zip(TEACHER_TOP_K, top_k(logits, self.entries), strict=True))
            available |= {**best, "teacher_tail": None}
        for name in self.inputs:
            if available.get(name) is None:
                raise ValueError(f"This objective needs {name}; it was not given.")
        more = {name: available[name] for name in self.optional if available.get(name) is not None}
        return self.function(*(available[name] for name in self.inputs), mask, **options, **more)

    def check_differentiable(self) -> None:
        """Raises ``UserError`` if there is no gradient to train on."""
        if not self.differentiable:
            choices = ", ".join(name for name, entry in OBJECTIVES.items() if entry.differentiable)
            raise UserError(
                f"One can't train on {self}: it is piecewise constant, so its gradient is zero almost"
                f" everywhere. Train on one of {choices}; {self} can be measured all the same."
            )

    def cost(self, values: Losses) -> Losses:
        """The values turned so that less is better: what a trainer minimises."""
        turn = {"minimise": lambda v: v, "maximise": lambda v: -v, "zero": jnp.abs}
        return turn[self.sense](values)


TEACHER_TOP_K = ("teacher_log_probs", "teacher_ids")
"""Inputs that can be taken from the teacher's logits."""
_TOP_K = (*TEACHER_TOP_K, "student_logits")
_HIDDEN = ("teacher_hidden", "student_hidden")

OBJECTIVES: dict[str, Objective] = {
    "kl": Objective(kl_divergence, reference="arXiv:1503.02531"),
    "reverse_kl": Objective(reverse_kl_divergence, reference="arXiv:2306.08543"),
    "js": Objective(js_divergence, reference="arXiv:2306.13649"),
    "total_variation": Objective(total_variation, reference="arXiv:2307.15190"),
    "topk_kl": Objective(
        topk_kl_divergence, _TOP_K, reference="Cover & Thomas 2006, ch. 2", optional=("teacher_tail",)
    ),
    "truncated_kl": Objective(truncated_kl_divergence, _TOP_K, reference="arXiv:2506.06266"),
    "nll": Objective(negative_log_likelihood, ("student_logits", "targets"), reference="arXiv:2501.09223"),
    "zero_one": Objective(zero_one, differentiable=False, reference="arXiv:2501.09223"),
    "top_k_mismatch": Objective(top_k_mismatch, differentiable=False, reference="arXiv:1409.0575"),
    "rank_agreement": Objective(
        rank_agreement, sense="maximise", differentiable=False, reference="doi:10.1093/biomet/30.1-2.81"
    ),
    "entropy": Objective(entropy, ("student_logits",), reference="Grandvalet & Bengio 2004"),
    "confidence_shift": Objective(confidence_shift, sense="zero", reference="arXiv:1706.04599"),
    "cosine_similarity": Objective(cosine_similarity, _HIDDEN, "maximise", reference="arXiv:1910.01108"),
    "distribution_cosine_similarity": Objective(
        distribution_cosine_similarity, sense="maximise", reference="Salton, Wong & Yang 1975"
    ),
    "hidden_mse": Objective(hidden_mse, _HIDDEN, reference="arXiv:1412.6550"),
}


@dataclasses.dataclass(frozen=True, repr=False)
class _Mixture(Objective):
    """A weighted sum of objectives, each given all there is; equal ones are equal, and compile once."""

    terms: tuple[tuple[float, Objective], ...] = ()

    def __call__(self, *, mask: Mask = None, **available: AnyArray | None) -> Losses:
        costs = (w * entry.cost(entry(mask=mask, **available)) for w, entry in self.terms)
        return sum(costs, start=jnp.float32(0))

    def __str__(self) -> str:
        return ",".join(f"{entry}={_plain(weight)}" for weight, entry in self.terms)

    @property
    def entries(self) -> int:
        return max((entry.entries for _, entry in self.terms if _compares_best(entry)), default=TOP_K)


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
      ('hidden', 'tokens')
      >>> both(teacher_logits=p, student_logits=q, targets=jnp.array([0])).round(4)
      Array([0.1768], dtype=float32)

    Reference:
      Hinton et al. 2015 (arXiv:1503.02531) mix the teacher's distribution and the gold label.
    """
    terms = [(name, {}, number(name, weight)) for name, weight in weights.items()]
    return _mixed(terms, number("temperature", temperature))


def parse(text: str) -> Objective:
    """The objective that a text names.

    Args:
      text: keys of ``OBJECTIVES``, each with options and a weight if wanted:
        ``NAME(option=value,...)=WEIGHT``, joined by commas. One without a weight is the entry itself;
        of several, a weight that is not written is 1. ``temperature=2`` among them sets the temperature
        of all that have one.

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
        known = {} if name == "temperature" else _options_of(named(name))[0]
        try:
            _, listed, weight = _TERM.fullmatch(part).groups()  # type: ignore[union-attr]
            pairs = [pair.split("=") for pair in listed.split(",")] if listed else []
            options = {option.strip(): _number(value) for option, value in pairs}
            weight = None if weight is None else _number(weight)
            if len(options) < len(pairs) or (name == "temperature" and (options or weight is None)):
                raise ValueError
        except (AttributeError, ValueError):
            form = f" or {name}(OPTION=NUMBER,...), with {_choices('', known)}" if known else "."
            raise UserError(
                f"Objective {part.strip()!r} can't be read; it should read like {name}=0.7{form}"
            ) from None
        terms.append((name, options, weight))
    temperatures = [weight for name, _, weight in terms if name == "temperature"]
    if len(temperatures) > 1:
        raise UserError(f"Objective {text!r} has temperature twice.")
    return _mixed([term for term in terms if term[0] != "temperature"], *temperatures)


def as_objective(objective: str | Objective) -> Objective:
    """The objective to train on, from a text or as it is.

    Args:
      objective: a text that ``parse`` reads, or an ``Objective``.

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
    objective.check_differentiable()
    return objective


def named(name: str) -> Objective:
    """The entry of ``OBJECTIVES``; raises ``UserError`` with the choices if there is none."""
    if name not in OBJECTIVES:
        raise UserError(f"Unknown objective {name!r}; choose one of {_choices(name, OBJECTIVES)}")
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
    heated = [name for name, *_ in terms if "temperature" in _options_of(named(name))[0]]
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
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"The weight of {entry} must be positive, not {weight}.")
        if entry in (other for _, other in parts):
            raise UserError(f"The mixture has {entry} twice; add up its weights.")
        parts.append((weight, entry))
    # One that names no k compares as many as alone, however many another one asks for.
    if max((entry.entries for _, entry in parts if _compares_best(entry)), default=0) > TOP_K:
        parts = [(weight, _with_own_k(entry)) for weight, entry in parts]
    if len(parts) == 1 and parts[0][0] == 1 and parts[0][1].sense == "minimise":
        return parts[0][1]  # which compiles to less
    inputs = dict.fromkeys(name for _, entry in parts for name in entry.inputs)
    return _Mixture(sum, tuple(inputs), terms=tuple(parts))


def _compares_best(entry: Objective) -> bool:
    return "teacher_ids" in entry.inputs


def _with_own_k(entry: Objective) -> Objective:
    options = {"k": entry.entries, **dict(entry.options)}
    return dataclasses.replace(entry, options=options) if _compares_best(entry) else entry


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
        raise UserError(f"Objective {entry}{_listed(options)}: {error}") from None
    return changed


def _options_of(objective: Objective) -> tuple[dict[str, Any], bool]:
    """The function's options with their defaults (all after the inputs and the mask); whether it
    takes any others."""
    parameters = list(inspect.signature(objective.function).parameters.values())
    rest = parameters[len(objective.inputs) + 1 :]
    rest = [p for p in rest if p.name not in objective.optional]
    known = {p.name: p.default for p in rest if p.kind is not p.VAR_KEYWORD}
    return known, len(known) < len(rest)


def _choices(wrong: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, known, n=1)
    return ", ".join(known) + (f"; did you mean {close[0]}?" if close else ".")


def _qualified(function: Callable[..., Any]) -> str:
    """Module and name of a function, so that two of them are not written alike."""
    if isinstance(function, functools.partial):
        return _qualified(function.func) + _listed(function.keywords)
    name = getattr(function, "__qualname__", None)
    if name is None:  # an object that can be called: a dataclass says all that it holds
        return f"{type(function).__module__}.{function!r}"
    if "<" in name:  # a lambda or an inner function: its code, and what it closes over
        inner = inspect.unwrap(function)
        code = inner.__code__
        constants = [value for value in code.co_consts if not hasattr(value, "co_code")]
        digest = zlib.crc32(repr((code.co_code, code.co_names, constants)).encode())
        name += f"@{digest:08x}" + _listed(inspect.getclosurevars(inner).nonlocals)
    return f"{function.__module__}.{name}"


def _listed(options: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> str:
    text = ",".join(f"{name}={_plain(value)}" for name, value in dict(options).items())
    return text and f"({text})"


def _plain(value: Any) -> str:
    return repr(value).removesuffix(".0")
