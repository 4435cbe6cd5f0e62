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
    from jaxsp import distributions, losses, training
    from jaxsp.api import ask, compress, compress_many, evaluate
    from jaxsp.artifact import SoftPrompt
    from jaxsp.data.documents import Query
    from jaxsp.data.examples import make_rows
    from jaxsp.errors import Interrupted, NonFiniteLoss, UserError
    from jaxsp.losses import Objective
    from jaxsp.models.language_model import LanguageModel
    from jaxsp.models.load import load_model
    from jaxsp.runs.folder import Result
    from jaxsp.settings import Settings
    from jaxsp.training.slots import Step

__version__ = "0.1.0"

__all__ = [
    "Interrupted",
    "LanguageModel",
    "NonFiniteLoss",
    "Objective",
    "Query",
    "Result",
    "Settings",
    "SoftPrompt",
    "Step",
    "UserError",
    "ask",
    "compress",
    "compress_many",
    "distributions",
    "evaluate",
    "load_model",
    "losses",
    "make_rows",
    "training",
]

_HOME = {
    "Interrupted": "jaxsp.errors",
    "LanguageModel": "jaxsp.models.language_model",
    "NonFiniteLoss": "jaxsp.errors",
    "Objective": "jaxsp.losses",
    "Query": "jaxsp.data.documents",
    "Result": "jaxsp.runs.folder",
    "Settings": "jaxsp.settings",
    "SoftPrompt": "jaxsp.artifact",
    "Step": "jaxsp.training.slots",
    "UserError": "jaxsp.errors",
    "ask": "jaxsp.api",
    "compress": "jaxsp.api",
    "compress_many": "jaxsp.api",
    "evaluate": "jaxsp.api",
    "load_model": "jaxsp.models.load",
    "make_rows": "jaxsp.data.examples",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in ("distributions", "losses", "training"):
        return importlib.import_module(f"jaxsp.{name}")
    raise AttributeError(f"module 'jaxsp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
