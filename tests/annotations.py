"""Checks the shapes and types of arrays at run time: jaxtyping asks ``check`` for every function of jaxsp."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, checked where its annotations name arrays; the others are pyright's work.

    A dataclass's ``__init__`` stays as it is: while jax transforms a tree, its leaves may be anything.
    """
    if function.__name__ == "__init__":
        return function
    function.__annotations__ = {
        name: hint if _names_an_array(hint) else Any for name, hint in function.__annotations__.items()
    }
    return beartype(function)


def _names_an_array(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_names_an_array(part) for part in typing.get_args(hint))
