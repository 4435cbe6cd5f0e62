"""Facts about compiled programs that jax's types call optional, or don't have."""

from __future__ import annotations

from typing import Any

from jax.stages import Compiled


def memory(program: Compiled) -> Any:
    """The program's memory in bytes, as ``temp_size_in_bytes``."""
    found = program.memory_analysis()
    assert found is not None
    return found


def count(function: Any) -> int:
    """The number of programs that a jitted function has compiled by now."""
    return function._cache_size()


def text(program: Compiled) -> str:
    """The program's instructions."""
    found = program.as_text()
    assert found is not None
    return found
