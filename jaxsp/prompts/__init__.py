"""The kinds of soft prompt: one file each, one line each in ``PROMPT_KINDS``.

A kind is a module with what ``PromptKind`` lists. It reads dimensions, never weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxsp.prompts import embedding, key_value, low_rank, nested, per_head
from jaxsp.prompts.initializers import Start
from jaxsp.settings import PromptSettings, Settings, make_settings, plain
from jaxsp.typing import AnyArray, Array, Float, KeyValues, PyTree, UserError

Prefill = Callable[[Float[AnyArray, "1 k d"], KeyValues], KeyValues]


class PromptKind(Protocol):
    """Contents of a module in this folder; it may also be one that ``HoldsShorter`` or ``Draws``.

    σ is a pytree of float32 arrays, in nested dicts. A leaf without axes is no parameter.
    """

    @property
    def DEFAULTS(self) -> Mapping[str, Any]:
        """``initial``, ``optimizer``, ``learning_rate``, ``steps`` and ``keep``, where they are ``None``."""
        ...

    @property
    def IS_READ(self) -> bool:
        """Whether the model reads σ at every step."""
        ...

    @property
    def FORM(self) -> Mapping[str, str]:
        """Axes of each array of σ, by its name (of one within another ``outer.inner``): l layers, k slots, g
        key/value heads, f their width, d the model's width; others are the kind's own.
        One without it is not checked."""
        ...

    def initial(self, start: Start) -> PyTree:
        """σ that starts as K input vectors, or as K slots of keys and values in every layer."""
        ...

    def prefix(self, sigma: PyTree, preamble: KeyValues, prefill: Prefill) -> KeyValues:
        """``preamble`` followed by σ's K slots; differentiable in σ.

        ``prefill(inputs [1, K, D], preamble)`` reads input vectors.
        """
        ...

    def prompt_length(self, sigma: PyTree) -> int:
        """K, in slots."""
        ...

    def rates(self, sigma: PyTree, factors: Mapping[str, float]) -> PyTree:
        """Sizes of a step of each entry at a learning rate of 1: arrays that broadcast to σ's.

        Relative to the size of σ's entries at its start, which differs from family to family; 0 for what
        stays as it is. ``factors`` are the user's own, by the name of a part of σ, or ``first``: its first
        slot.
        """
        ...


@runtime_checkable
class HoldsShorter(Protocol):
    """A kind whose first slots are prompts, too."""

    def lengths(self, sigma: PyTree) -> Sequence[int]:
        """Slots of the prompts that σ holds, ascending; the last is K."""
        ...

    def cut(self, sigma: PyTree, length: int) -> tuple[str, PyTree]:
        """The kind and the parameters of the prompt of one of these lengths."""
        ...


@runtime_checkable
class Draws(Protocol):
    """A kind of which a step of training reads a part that is drawn."""

    def drawn(self, sigma: PyTree, key: Array) -> PyTree:
        """σ with what was drawn by the key as one leaf more, ``drawn``, as ``prefix`` takes it."""
        ...


PROMPT_KINDS: dict[str, PromptKind] = {
    "per_head": per_head,
    "key_value": key_value,
    "nested": nested,
    "low_rank": low_rank,
    "embedding": embedding,
}
DEFAULT_KIND = PromptSettings.kind
"""The kind where none is given."""


def named_kind(kind: str) -> PromptKind:
    """The kind of this name; raises ``UserError`` with the choices if there is none."""
    if kind not in PROMPT_KINDS:
        raise UserError(f"Unknown kind of prompt {kind!r}; choose one of {', '.join(PROMPT_KINDS)}.")
    return PROMPT_KINDS[kind]


def checked_kind(kind: str, sigma: PyTree, sizes: Mapping[str, int]) -> PromptKind:
    """The kind of this name, for which σ has the right form.

    Args:
      kind: a key of ``PROMPT_KINDS``.
      sigma: the prompt's parameters.
      sizes: the model's, by the letters of ``PromptKind.FORM``.

    Raises:
      UserError: there is no such kind, or σ has other arrays or other shapes than it asks for.

    Example:
      >>> import numpy as np
      >>> checked_kind("embedding", {"embeddings": np.zeros((4, 8))}, {"d": 16})
      Traceback (most recent call last):
      jaxsp.errors.UserError: A prompt of kind embedding has embeddings [k, d] with d = 16, not [4, 8].
    """
    chosen = named_kind(kind)
    if not hasattr(chosen, "FORM"):
        return chosen  # of one's own
    found = _arrays(sigma) if isinstance(sigma, Mapping) else {}
    drawn = {"drawn"} if isinstance(chosen, Draws) else set()
    if found.keys() - drawn != chosen.FORM.keys():
        wanted = ", ".join(f"{name} [{', '.join(axes.split())}]" for name, axes in chosen.FORM.items())
        has = ", ".join(map(str, found)) or f"a {type(sigma).__name__}"
        raise UserError(f"A prompt of kind {kind} is a mapping to {wanted}; this one has {has}.")
    known: dict[str, int] = dict(sizes)
    for name, text in chosen.FORM.items():
        axes, shape = text.split(), np.shape(found[name])
        before = dict(known)
        sizes_fit = (known.setdefault(a, n) == n for a, n in zip(axes, shape, strict=False))
        if len(axes) != len(shape) or not all(sizes_fit):
            fixed = ", ".join(f"{axis} = {before[axis]}" for axis in axes if axis in before)
            form = f"[{', '.join(axes)}]" + (f" with {fixed}" if fixed else "")
            raise UserError(f"A prompt of kind {kind} has {name} {form}, not {list(shape)}.")
    return chosen


def _arrays(sigma: Mapping[str, Any], outer: str = "") -> dict[str, Any]:
    """The arrays by their names."""
    found: dict[str, Any] = {}
    for name, leaf in sigma.items():
        found |= _arrays(leaf, f"{outer}{name}.") if isinstance(leaf, Mapping) else {f"{outer}{name}": leaf}
    return found


def with_defaults(settings: Settings) -> Settings:
    """The settings with what suits the prompt's kind where they are ``None``.

    Example:
      >>> from jaxsp.settings import Settings
      >>> with_defaults(Settings()).training.optimizer
      'adam'
    """
    given = plain(settings)
    defaults = PROMPT_KINDS[settings.prompt.kind].DEFAULTS
    return make_settings({n: v for n, v in defaults.items() if given[n] is None}, base=settings)


def lengths(kind: str, sigma: PyTree) -> Sequence[int]:
    """Slots of the prompts that σ holds, ascending: K alone, but for kinds that hold shorter ones."""
    chosen = PROMPT_KINDS[kind]
    return chosen.lengths(sigma) if isinstance(chosen, HoldsShorter) else [chosen.prompt_length(sigma)]


def cut(kind: str, sigma: PyTree, length: int) -> tuple[str, PyTree]:
    """The kind and the parameters of the prompt of one of these lengths.

    Raises:
      UserError: σ holds no prompt of this length.
    """
    held, chosen = lengths(kind, sigma), PROMPT_KINDS[kind]
    if length not in held:
        able = "only prompts of --kind nested can be shortened"
        if len(held) > 1:
            able = f"it can be read at {', '.join(map(str, held))} slots"
        raise UserError(f"This prompt of kind {kind} has {held[-1]} slots and none of {length}; {able}.")
    return chosen.cut(sigma, length) if isinstance(chosen, HoldsShorter) else (kind, sigma)


def drawn(kind: str, sigma: PyTree, key: Array) -> PyTree:
    """σ as one step of training reads it: all of it, but for kinds of which a part is drawn."""
    chosen = PROMPT_KINDS[kind]
    return chosen.drawn(sigma, key) if isinstance(chosen, Draws) else sigma
