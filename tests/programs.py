"""What XLA says of a compiled program: to jax's types it may say nothing."""

from __future__ import annotations

from typing import Any

from jax.stages import Compiled


def memory(program: Compiled) -> Any:
    """Its bytes, as ``temp_size_in_bytes``."""
    found = program.memory_analysis()
    assert found is not None
    return found


def count(function: Any) -> int:
    """How many programs a jitted function has by now; to jax's types it has no such counter."""
    return function._cache_size()


def text(program: Compiled) -> str:
    """Its instructions."""
    found = program.as_text()
    assert found is not None
    return found
