"""jaxsp: soft prompts that stand in for long contexts, in JAX.

    import jaxsp
    result = jaxsp.compress("smollm2-135m-instruct", context, prompt_length=16)
    result.ask("How long is the cable?")

The parts load when they are first used, so ``import jaxsp`` costs nothing.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxsp import (
        callbacks as callbacks,
        distributions as distributions,
        losses as losses,
        training as training,
    )
    from jaxsp.api import (
        ask as ask,
        compress as compress,
        compress_many as compress_many,
        evaluate as evaluate,
        export as export,
        import_peft as import_peft,
        push as push,
        questions as questions,
    )
    from jaxsp.artifact import SoftPrompt as SoftPrompt
    from jaxsp.data.documents import Query as Query
    from jaxsp.data.examples import make_rows as make_rows
    from jaxsp.errors import (
        Interrupted as Interrupted,
        NonFiniteLoss as NonFiniteLoss,
        UserError as UserError,
    )
    from jaxsp.losses import Objective as Objective
    from jaxsp.models.chat import ChatOptions as ChatOptions
    from jaxsp.models.language_model import LanguageModel as LanguageModel
    from jaxsp.models.load import load_model as load_model
    from jaxsp.runs.folder import Result as Result
    from jaxsp.settings import Settings as Settings
    from jaxsp.training.slots import Step as Step

__version__ = "0.2.0"

_ROOMS = ("callbacks", "distributions", "losses", "training")
_NAMES = {
    "api": ("ask", "compress", "compress_many", "evaluate", "export", "import_peft", "push", "questions"),
    "artifact": ("SoftPrompt",),
    "data.documents": ("Query",),
    "data.examples": ("make_rows",),
    "errors": ("Interrupted", "NonFiniteLoss", "UserError"),
    "losses": ("Objective",),
    "models.chat": ("ChatOptions",),
    "models.language_model": ("LanguageModel",),
    "models.load": ("load_model",),
    "runs.folder": ("Result",),
    "settings": ("Settings",),
    "training.slots": ("Step",),
}
_HOME = {name: f"jaxsp.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"jaxsp.{name}")
    close = difflib.get_close_matches(name, __dir__(), n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    raise AttributeError(f"module 'jaxsp' has no attribute {name!r}{meant}")


def __dir__() -> list[str]:
    return sorted([*_HOME, *_ROOMS])
