"""An objective: a function of each position, what it compares, and its options."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.losses.checks import Losses, Mask, check_count, check_mask, number
from jaxsp.losses.topk import TOPK, topk_and_tail
from jaxsp.losses.vocabulary import on_auto_axes
from jaxsp.typing import AnyArray, Array, UserError

TEACHER_TOPK = ("teacher_log_probs", "teacher_ids")
"""Inputs that can be taken from the teacher's logits."""

# What the teacher must give for an input; those that are not here ask nothing of it.
_NEEDS = {
    "hidden": {"teacher_logits", "teacher_hidden"},  # the frozen head makes the one from the other
    "top_k": {"teacher_log_probs", "teacher_ids"},
    "tokens": {"targets"},
}
_SENSES = ("minimise", "maximise", "zero")
_VECTORS = ("logits", "hidden", "log_probs", "ids")  # ends of the names of inputs that have one axis more


class Table(dict[str, "Objective"]):
    """Objectives by name; ``print`` shows them with what they need, their options and a reference."""

    def __str__(self) -> str:
        rows = [("name", "better", "needs of the teacher", "options", "reference")]
        for name, entry in self.items():
            better = {"minimise": "less", "maximise": "more", "zero": "near 0"}[entry.sense]
            options = ", ".join(f"{option}={_plain(value)}" for option, value in entry.known_options.items())
            train = better + (" (no gradient)" if not entry.differentiable else "")
            rows.append((name, train, ", ".join(entry.needs) or "nothing", options, entry.reference))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    __repr__ = __str__


OBJECTIVES = Table()
"""All objectives, by name: filled by ``objectives.py``."""


@dataclasses.dataclass(frozen=True, repr=False)
class Objective:
    """One entry of ``OBJECTIVES``, or a function of your own; call it with everything there is.

    ``str`` gives the text that ``parse`` reads back; for a function of your own its module and name.

    A function of your own sees positions side by side: in ``fused_objective`` a chunk of any of them,
    ``[n, v]``. What depends on the place in a sequence is a matter of its ``weights``.
    What is under the mask is 0 in its floating-point inputs, and its values there are put to 0.

    Attributes:
      function: called ``function(*inputs, mask, **options)``; gives float32 ``[*b, t]``. The mask is boolean
        ``[*b, t]``, or ``None`` where all positions count.
      inputs: names of what it compares, in its order: ``teacher_logits``, ``student_logits``,
        ``teacher_hidden``, ``student_hidden``, ``teacher_log_probs``, ``teacher_ids``, ``targets``.
      sense: whether a good prompt makes it small (``minimise``), large (``maximise``), or brings it to zero
        from either side (``zero``).
      differentiable: whether its gradient says anything.
      reference: where it comes from; no part of what it is.
      options: keyword arguments of the function, by name. Sorted pairs once stored, without those that
        equal the function's defaults: equal objectives compile once.
      optional: names of more arrays, which the function takes by keyword where they are there.
      derive: called with all that there is, by name, and ``entries``; gives it with what can be made of it.

    Raises:
      UserError: the function can't be called so, has no such option, or the sense is unknown. Of a call:
        it gives anything but one float32 value for each position.

    Example:
      A divergence that the package does not have, the squared Hellinger distance, with a power of its own:

      >>> import jax, jax.numpy as jnp
      >>> def hellinger(teacher_logits, student_logits, mask, *, power=1.0):
      ...     logits = jax.lax.stop_gradient(teacher_logits), student_logits
      ...     p_root, q_root = (jnp.exp(jax.nn.log_softmax(x) / 2) for x in logits)
      ...     return jnp.sum((p_root - q_root) ** 2, axis=-1) ** power / 2
      >>> objective = Objective(hellinger).with_options(power=2.0)

      Evaluated and differentiated a chunk of positions at a time, as every entry of the table:

      >>> from jaxsp.losses import fused_objective
      >>> teacher, student, head = (jax.random.normal(jax.random.key(i), (3, 4)) for i in range(3))
      >>> def loss(student):
      ...     return jnp.sum(fused_objective(objective, student, head, teacher_hidden=teacher)[0])
      >>> value, gradient = jax.value_and_grad(loss)(student)
      >>> bool(value > 0), gradient.shape, float(loss(teacher)) < 1e-5
      (True, (3, 4), True)
    """

    function: Callable[..., Array]
    inputs: tuple[str, ...] = ("teacher_logits", "student_logits")
    sense: Literal["minimise", "maximise", "zero"] = "minimise"
    differentiable: bool = True
    reference: str = dataclasses.field(default="", compare=False)
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    optional: tuple[str, ...] = ()
    derive: Callable[[dict[str, Any], int], dict[str, Any]] | None = None

    def __post_init__(self):
        if self.derive is None and self.compares_best:
            object.__setattr__(self, "derive", _with_best)
        if self.sense not in _SENSES:
            raise UserError(f"The sense of an objective is one of {', '.join(_SENSES)}, not {self.sense!r}.")
        given: dict[str, Any] = dict(self.options)
        known = self.known_options
        for name, value in given.items():
            if name not in known and not self._takes(_REST):
                raise no_option(_qualified(self.function), name, known)
            if isinstance(known.get(name), float):
                given[name] = number(name, value)
            elif isinstance(value, np.generic):
                given[name] = value.item()
        kept = sorted(pair for pair in given.items() if pair not in known.items())
        object.__setattr__(self, "options", tuple(kept))
        try:
            inspect.signature(self.function).bind(*self.inputs, "mask", **given)
        except TypeError as error:
            called = f"{', '.join(self.inputs)}, the mask and its options"
            name = _qualified(self.function)
            raise UserError(f"{name} can't be an objective: it is called with {called} ({error}).") from None

    def __str__(self) -> str:
        plain = dataclasses.replace(self, options=())
        for name, entry in OBJECTIVES.items():
            if entry == plain:
                return name + listed(self.options)
        fields = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)[1:4])
        unusual = ",".join(f"{name}={value}" for name, value, usual in fields if value != usual)
        name = _qualified(self.function) + (unusual and f"[{unusual}]")
        return name + listed(self.options)

    def __repr__(self) -> str:
        return f"Objective({self})"

    @property
    def needs(self) -> tuple[str, ...]:
        """Things that the teacher must give, out of ``hidden``, ``top_k`` and ``tokens``, in this order."""
        return tuple(name for name, makes in _NEEDS.items() if makes.intersection(self.inputs))

    @property
    def entries(self) -> int:
        """Best tokens of the teacher at a position that it compares, where it compares the best alone."""
        return dict(self.options).get("k", TOPK)

    @property
    def compares_best(self) -> bool:
        """Whether it compares the best tokens alone."""
        return "teacher_ids" in self.inputs

    @property
    def compares_hidden(self) -> bool:
        """Whether it compares hidden states: those of teacher and student must then be of one width."""
        return {"teacher_hidden", "student_hidden"} <= set(self.inputs)

    @property
    def sums_over_shards(self) -> bool:
        """Whether it takes the logits of one shard of the vocabulary; its gradient is then written out."""
        return self.is_ours and self._takes("axis_name")

    @property
    def is_ours(self) -> bool:
        """Whether its function is one of the table's."""
        return any(entry.function is self.function for entry in OBJECTIVES.values())

    @property
    def known_options(self) -> dict[str, Any]:
        """The options that the function names, with their defaults."""
        return {
            name: p.default
            for name, p in list(inspect.signature(self.function).parameters.items())[len(self.inputs) + 1 :]
            if p.kind is not p.VAR_KEYWORD and name not in (*self.optional, "axis_name")
        }

    def with_options(self, **options: Any) -> Objective:
        """The objective with these options, its others as they are.

        Raises:
          UserError: the function has no such option.

        Example:
          >>> OBJECTIVES["js"].with_options(beta=0.3)
          Objective(js(beta=0.3))
        """
        return dataclasses.replace(self, options={**dict(self.options), **options})

    def __call__(self, *, mask: Mask = None, axis_name: Any = None, **available: AnyArray | None) -> Losses:
        """The unreduced values ``[*b, t]`` of this objective, as they are reported.

        Args:
          mask: True where a position counts; all if ``None``.
          axis_name: mapped axis over which the vocabulary is sharded, for one that ``sums_over_shards``.
          **available: arrays by the names of ``inputs``; more than it needs will do. Where the
            teacher's top-k entries are not given, they are taken from ``teacher_logits``: as many as
            the option k says, else 64. Also options, by their names, that may be traced.

        Raises:
          ValueError: an input is missing or does not fit.
        """
        given = {name: array for name, array in available.items() if array is not None}
        entries: Any = given.get("k", self.entries)
        given = given if self.derive is None else self.derive(given, entries)
        for name in self.inputs:
            if name not in given:
                raise ValueError(f"This objective needs {name}; it was not given.")
        arrays = [given[name] for name in self.inputs]
        options = dict(self.options)
        if self.sums_over_shards:
            options["axis_name"] = axis_name
        options |= {name: given[name] for name in (*self.optional, *self.known_options) if name in given}
        if self.is_ours:
            return self.function(*arrays, mask, **options)
        shape = self._positions(arrays, mask)
        live = None if mask is None else check_mask(mask, shape)
        arrays = [_masked(array, live) for array in arrays]
        return self._one_each(self.function(*arrays, live, **options), shape, live)

    def check_differentiable(self) -> None:
        """Raises ``UserError`` if there is no gradient to train on."""
        if not self.differentiable:
            able = ", ".join(name for name, entry in OBJECTIVES.items() if entry.differentiable)
            raise UserError(
                f"One can't train on {self}: it is piecewise constant, so its gradient is zero almost"
                f" everywhere. Train on one of {able}; {self} can be measured all the same."
            )

    def cost(self, values: Losses) -> Losses:
        """The values turned so that less is better: what a trainer minimises."""
        turn = {"minimise": lambda v: v, "maximise": lambda v: -v, "zero": jnp.abs}
        return turn[self.sense](values)

    def _takes(self, argument: Any) -> bool:
        parameters = inspect.signature(self.function).parameters
        return argument in parameters or argument in {p.kind for p in parameters.values()}

    def _positions(self, arrays: list[Any], mask: Mask) -> tuple[int, ...]:
        """The shape ``[*b, t]``: of the mask, or of what is compared."""
        for name, array in zip(self.inputs, arrays, strict=True):
            if hasattr(array, "shape") and name.partition("_")[2] in _VECTORS:
                return array.shape[:-1]
        return (arrays[0] if mask is None else mask).shape

    def _one_each(self, values: Any, shape: tuple[int, ...], live: Array | None) -> Array:
        name, dtype = _qualified(self.function), getattr(values, "dtype", type(values).__name__)
        if getattr(values, "shape", None) != shape:
            found = f"one of shape {list(values.shape)}" if hasattr(values, "shape") else f"a {dtype}"
            raise UserError(
                f"{name} must give an array of shape {list(shape)}, a value for each position, not {found}."
            )
        if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
            raise UserError(f"{name} must give float32 values, computed in float32, not {dtype}.")
        values = values.astype(jnp.float32)
        return values if live is None else jnp.where(live, values, 0.0)


def _with_best(given: dict[str, Any], entries: int) -> dict[str, Any]:
    """The teacher's best tokens, and the mass of the rest, from its logits where neither is there."""
    if "teacher_logits" not in given or any(name in given for name in TEACHER_TOPK):
        return given
    check_count("k", entries)
    logits = jax.lax.stop_gradient(jnp.asarray(given["teacher_logits"]))
    found = on_auto_axes(lambda x: topk_and_tail(x, entries), logits, logits)
    return {**given, **dict(zip((*TEACHER_TOPK, "teacher_tail"), found, strict=True))}


_REST = inspect.Parameter.VAR_KEYWORD


def _masked(array: Any, live: Array | None) -> Any:
    if live is None or not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return jnp.where(live.reshape(*live.shape, *[1] * (array.ndim - live.ndim)), array, 0)


def choices(wrong: str, known: Iterable[str]) -> str:
    """The names that there are, and the one that may have been meant."""
    close = difflib.get_close_matches(wrong, known, n=1)
    return ", ".join(known) + (f"; did you mean {close[0]}?" if close else ".")


def no_option(owner: Any, name: str, known: Iterable[str]) -> UserError:
    """The error for an unknown option."""
    return UserError(f"{owner} has no option {name!r}; it has {choices(name, known) if known else 'none.'}")


def listed(options: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> str:
    """Options as text, in parentheses; nothing for none."""
    text = ",".join(f"{name}={_plain(value)}" for name, value in dict(options).items())
    return text and f"({text})"


def _plain(value: Any) -> str:
    return repr(value).removesuffix(".0")


def _qualified(function: Callable[..., Any]) -> str:
    """Module and name of a function, so that two of them are not written alike."""
    if isinstance(function, functools.partial):
        return _qualified(function.func) + listed(function.keywords)
    name = getattr(function, "__qualname__", None)
    if name is None:  # an object that can be called: a dataclass says all that it holds
        return f"{type(function).__module__}.{function!r}"
    if "<" in name:  # a lambda or an inner function: its code, and what it closes over
        inner = inspect.unwrap(function)
        code = inner.__code__
        constants = [value for value in code.co_consts if not hasattr(value, "co_code")]
        digest = zlib.crc32(repr((code.co_code, code.co_names, constants)).encode())
        name += f"@{digest:08x}" + listed(inspect.getclosurevars(inner).nonlocals)
    return f"{function.__module__}.{name}"
