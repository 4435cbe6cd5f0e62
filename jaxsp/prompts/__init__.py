"""The kinds of soft prompt: one file each, one line each in ``PROMPT_KINDS``.

A kind is a module with what ``PromptKind`` lists. It reads dimensions, never weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

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
        """σ with what was drawn by the key, as ``prefix`` takes it: it may have leaves of its own."""
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
