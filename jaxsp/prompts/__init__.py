"""The kinds of soft prompt: one file each, one line each in ``PROMPT_KINDS``.

A kind is a module with what ``PromptKind`` lists. It reads dimensions, never weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from jaxsp.prompts import embedding, key_value, low_rank, nested
from jaxsp.prompts.initializers import Start
from jaxsp.settings import PromptSettings, Settings, make_settings, plain
from jaxsp.typing import AnyArray, Array, Float, KeyValues, PyTree

Prefill = Callable[[Float[AnyArray, "1 k d"], KeyValues], KeyValues]


class PromptKind(Protocol):
    """Contents of a module in this folder. σ is a pytree of float32 arrays of any rank, in nested dicts.

    A kind whose first slots are prompts, too, also has ``lengths(sigma)``, ``cut(sigma, length)`` and
    ``drawn(sigma, key)``: what the functions of these names below give.
    """

    @property
    def DEFAULTS(self) -> Mapping[str, Any]:
        """``initial``, ``optimizer``, ``learning_rate`` and ``steps`` where the settings don't say."""
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


PROMPT_KINDS: dict[str, PromptKind] = {
    "key_value": key_value,
    "nested": nested,
    "low_rank": low_rank,
    "embedding": embedding,
}
DEFAULT_KIND = PromptSettings.kind


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
    own = getattr(PROMPT_KINDS[kind], "lengths", None)
    return own(sigma) if own else [PROMPT_KINDS[kind].prompt_length(sigma)]


def cut(kind: str, sigma: PyTree, length: int) -> tuple[str, PyTree]:
    """The kind and the parameters of the prompt of one of these lengths."""
    own = getattr(PROMPT_KINDS[kind], "cut", None)
    return own(sigma, length) if own else (kind, sigma)


def drawn(kind: str, sigma: PyTree, key: Array) -> PyTree:
    """σ as one step of training reads it, drawn by its key where the kind leaves something to chance."""
    own = getattr(PROMPT_KINDS[kind], "drawn", None)
    return own(sigma, key) if own else sigma
