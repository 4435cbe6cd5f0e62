"""The settings of a compression, shared by the Python interface and the command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxsp.losses import trainable
from jaxsp.prompts.initializers import INITIALIZERS
from jaxsp.training.optimizers import OptimizerSettings, make_optimizer, make_pace
from jaxsp.training.drivers import DRIVERS
from jaxsp.typing import UserError


@dataclasses.dataclass(frozen=True)
class Settings(OptimizerSettings):
    """How a context is compressed; the command line's options are these fields."""

    length: int = 16
    """K, the number of vectors that stand in for the context."""
    objective: str = "kl"
    """What is trained on: kl, nll or any other differentiable entry of jaxsp.losses.OBJECTIVES, or a
    mixture such as kl=0.7,nll=0.3 or kl=1,temperature=2."""
    steps: int = 500
    """Updates of the prompt."""
    batch_size: int = 8
    """Queries an update, about: as many as fit in the tokens of so many of mean length."""
    batch_shape: tuple[int, int] | None = None
    """Rows of a batch and tokens of a row; by default those that suit batch_size."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory."""
    initial: str = "first"
    """Where the prompt starts: first, spread (tokens of the context), vocabulary or noise."""
    seed: int = 0
    """Of the held-out draw, the order of the queries and the initial prompt."""
    max_answer_tokens: int = 48
    """Longest answer, in tokens."""
    parallel: str = "jit"
    """jit (one device), pmap (all local devices) or mesh."""
    mesh: str = ""
    """Of --parallel mesh, as data=2,model=4: rows over the first axis, weights over the second; by default
    all devices over data."""
    evaluate_every: int = 10
    """Steps between held-out evaluations."""
    checkpoint_every: int = 10
    """Steps between checkpoints."""
    patience: int = 0
    """Stop after so many evaluations without a better one; 0: never."""
    keep: str = "best"
    """Which prompt: best (of the lowest held-out KL evaluated, the start included) or last."""

    def check(self) -> None:
        """Raises ``UserError`` on a value that can't be meant."""
        for name, most in (("seed", 2**32), ("steps", 2**31)):
            if not 0 <= getattr(self, name) < most:
                raise UserError(
                    f"--{name} must not be negative and lie below {most}; got {getattr(self, name)}."
                )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                option = f"--{field.name.replace('_', '-')}"
                raise UserError(f"{option} must be a finite number, not {value}.")
        trainable(self.objective)
        make_optimizer(self)
        make_pace(self, self.steps)
        tables = (("initial", INITIALIZERS), ("parallel", DRIVERS), ("keep", ("best", "last")))
        for name, table in tables:
            if getattr(self, name) not in table:
                choices = ", ".join(table)
                raise UserError(f"Unknown {name} {getattr(self, name)!r}; choose one of {choices}.")
        for name in (
            "length",
            "batch_size",
            "accumulate",
            "max_answer_tokens",
            "evaluate_every",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} must be at least 1, not {getattr(self, name)}.")
        if self.mesh and self.parallel != "mesh":
            raise UserError(f"--mesh {self.mesh} needs --parallel mesh, not {self.parallel}.")
        if self.patience < 0:
            raise UserError(f"--patience must not be negative; got {self.patience}.")
        if self.batch_shape is not None and min(self.batch_shape) < 1:
            raise UserError(f"--batch-shape must be two numbers from 1; got {self.batch_shape}.")


def make_settings(values: Mapping[str, Any]) -> Settings:
    """``Settings`` from keywords; raises ``UserError`` on one that there is not, or of another type."""
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    values = dict(values)
    if unknown := sorted(set(values) - set(fields), key=str):
        raise UserError(f"Unknown setting {unknown[0]!r}; the settings are {', '.join(fields)}.")
    shape = values.get("batch_shape")
    if shape is not None:
        if not (isinstance(shape, list | tuple) and [type(n) for n in shape] == [int, int]):
            raise UserError(f"--batch-shape must be two whole numbers, not {shape!r}.")
        values["batch_shape"] = tuple(shape)  # of JSON: a list
    for name, value in values.items():
        expected = type(fields[name].default)
        if expected is float and type(value) is int:
            values[name] = float(value)
        elif name != "batch_shape" and not isinstance(value, expected):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} must be {_NAMES[expected]}, not {value!r}.")
    return Settings(**values)


_NAMES = {int: "a whole number", float: "a number", str: "a text"}
