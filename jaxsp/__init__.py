"""jaxsp: soft prompts that stand in for long contexts, in JAX.

    import jaxsp
    model = jaxsp.load_model("smollm2-135m-instruct")
    result = jaxsp.compress(model, context, queries, length=16)
    jaxsp.ask(model, result.prompt, "How long is the cable?")

The parts load when they are first used, so ``import jaxsp`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxsp import distributions, losses
    from jaxsp.api import Result, ask, compress, evaluate
    from jaxsp.artifact import SoftPrompt
    from jaxsp.many import compress_many
    from jaxsp.models.language_model import LanguageModel, load_model
    from jaxsp.typing import UserError

__version__ = "0.1.0"

__all__ = [
    "LanguageModel",
    "Result",
    "SoftPrompt",
    "UserError",
    "ask",
    "compress",
    "compress_many",
    "distributions",
    "evaluate",
    "load_model",
    "losses",
]

_HOME = {
    "LanguageModel": "jaxsp.models.language_model",
    "Result": "jaxsp.api",
    "SoftPrompt": "jaxsp.artifact",
    "UserError": "jaxsp.typing",
    "ask": "jaxsp.api",
    "compress": "jaxsp.api",
    "compress_many": "jaxsp.many",
    "evaluate": "jaxsp.api",
    "load_model": "jaxsp.models.language_model",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in ("distributions", "losses"):
        return importlib.import_module(f"jaxsp.{name}")
    raise AttributeError(f"module 'jaxsp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
