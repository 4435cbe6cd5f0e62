"""The settings of a compression: plain data in five parts; ``runs/job.py`` knows the tables behind them."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import re
from collections.abc import Mapping
from typing import Any, TypedDict

from jaxsp.errors import UserError, suggestion


def _setting(default: Any, *, type: Any = None, per_prompt: bool = False, **limits: float) -> Any:
    """A field with its limits: ``at_least``, ``at_most``, ``above``, ``below``.

    ``type``: of one that is ``None`` where the prompt's kind decides.
    ``per_prompt``: prompts that train side by side in one step may differ in it.
    """
    metadata = {"type": type, "per_prompt": per_prompt, "limits": limits}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """The prompt σ, and where it starts."""

    prompt_length: int = _setting(16, at_least=1)
    """K, the number of slots that stand in for the context."""
    kind: str = "per_head"
    """Kind of prompt: per_head (keys, values and biases in every layer, K slots a head on average, each head
    as many as it needs), key_value (K of every head), nested (the same, whose first 1, 2, 4 ... slots are
    prompts, too), low_rank (the same in a smaller file) or embedding (input vectors)."""
    initial: str | None = _setting(None, type=str, per_prompt=True)
    """Start of the prompt: match (fitted in closed form to the attention of the training queries), first,
    spread (tokens of the context), random_text (the model's own), vocabulary (random tokens) or noise; by
    default match, for embedding first."""
    rank: int | None = _setting(None, type=int, at_least=1)
    """Rank of the keys and of the values of a layer, for low_rank; by default they take half of the room."""
    artifact_dtype: str = _setting("float32", per_prompt=True)
    """Dtype of the saved prompt: float32, bfloat16 or int8; the report says what each costs."""


@dataclasses.dataclass(frozen=True)
class StudySettings:
    """The queries that the document itself gives."""

    study: str = "auto"
    """Queries from the document: auto (all of them, where none are given; beside those given a quote of each
    sentence that none asks for, at most 64 or as many as are given), on (also beside those given queries of
    all forms, until each sentence is asked for) or off."""
    study_queries: int | None = _setting(None, type=int, at_least=1)
    """Number of queries from the document; by default four a sentence, where none are given. Beside those
    given it is the most."""


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
    """The model that reads the whole context, or a part of it."""

    max_answer_tokens: int = _setting(48, at_least=1)
    """Longest answer, in tokens."""
    answers: str = "greedy"
    """Answers of the teacher to a training query: greedy (of the most probable tokens) or sampled:N (that
    one, and N - 1 drawn at temperature 1). Queries held out keep the greedy one alone."""
    teacher_context: int | None = _setting(None, type=int, at_least=16)
    """Tokens of the document that the teacher reads at once. A longer document is cut into parts that
    overlap, and each query is taught by one of them. By default what the model's window has room for."""


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """The objective, the optimizer and how long."""

    objective: str = "kl"
    """Training objective: kl, reverse_kl, js, skewed_kl, alpha, renyi, total_variation, topk_kl,
    topk_reverse_kl, topk_js, truncated_kl, renormalised_topk_kl, nll, entropy, confidence_shift,
    cosine_similarity, distribution_cosine_similarity or hidden_mse; with options as in js(beta=0.3), or a
    mixture such as kl=0.7,nll=0.3. For those with topk in their name and truncated_kl the teacher's 64 best
    tokens are kept, or 20 with topk_kl(k=20): they take less memory and disk than all that kl needs. In
    Python also an Objective of your own."""
    steps: int | None = _setting(None, type=int, per_prompt=True, at_least=0, below=2**31)
    """Updates of the prompt; 0 keeps it as it starts. By default 100, for nested 150, for embedding 500."""
    on_policy: float = _setting(0.0, per_prompt=True, at_least=0, at_most=1)
    """Fraction of the training queries whose answer is the prompt's own at a time, in place of the teacher's:
    the objective compares the two models' distributions on it. Queries with an answer given keep that."""
    on_policy_every: int = _setting(25, per_prompt=True, at_least=1)
    """Steps after which queries are drawn anew for --on-policy, and answered with the prompt as it is."""
    batch_size: int = _setting(8, at_least=1)
    """Queries an update, about: as many as fit in the tokens of so many of mean length."""
    optimizer: str | None = _setting(None, type=str)
    """Optimizer: muon, adam, adamw or evolution (without a gradient, by 32 prompts around the prompt at each
    step: for objectives that have none, too, as zero_one); by default adam, for embedding muon. In Python
    also an optax.GradientTransformation, used as it is: it has its own learning rate."""
    learning_rate: float | None = _setting(None, type=float, per_prompt=True, above=0)
    """Peak learning rate, times the root mean square of the prompt's entries at its start (families'
    embeddings differ a hundredfold; of keys and values, layer by layer); with muon that is the root mean
    square of one update. By default 0.02, for embedding 0.5."""
    rates: str = _setting("", per_prompt=True)
    """Factors of the learning rate of parts of the prompt, as keys=0.1,first=0: keys, values, bias, or first
    (its first slot); 0 leaves a part as it starts."""
    warmup_fraction: float = _setting(0.05, per_prompt=True, at_least=0, below=1)
    """Fraction of the steps in which the learning rate rises from 0."""
    weight_decay: float = _setting(0.01, at_least=0)
    """Weight decay of adamw."""
    max_grad_norm: float = _setting(1.0, at_least=0)
    """Largest global norm of the gradient; 0 leaves it alone."""
    seed: int = _setting(0, per_prompt=True, at_least=0, below=2**32)
    """Seed of the held-out draw, the order of the queries and the initial prompt."""
    evaluate_every: int = _setting(10, at_least=1)
    """Steps between held-out evaluations."""
    patience: int = _setting(0, per_prompt=True, at_least=0)
    """Stop after so many evaluations without a better one; 0: never."""
    keep: str | None = _setting(None, type=str, per_prompt=True)
    """Prompt to keep: best (of the lowest held-out KL evaluated, the start included) or last; by default
    best, for nested last."""

    @property
    def updates(self) -> int:
        """``steps``, which the prompt's kind has filled in by now."""
        assert self.steps is not None, "settings without with_defaults"
        return self.steps


@dataclasses.dataclass(frozen=True)
class DeviceSettings:
    """Where and in what parts it is computed; nothing here changes the result but for rounding."""

    parallel: str = "jit"
    """jit (one device), pmap (all local devices) or mesh."""
    mesh: str = ""
    """Layout of --parallel mesh, as data=2,model=4: rows over the first axis, weights over the second; by
    default all devices over data. fsdp=4 in place of data: rows, too, and the weights are stored in parts."""
    grad_accumulation: int = _setting(1, at_least=1)
    """Parts that a batch is computed in, one after the other, to save memory."""
    checkpoint_every: int = _setting(10, at_least=1)
    """Steps between checkpoints."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a compression.

    Example:
      >>> settings = make_settings({"prompt_length": 4, "objective": "nll"})
      >>> settings.prompt.prompt_length, settings.training.objective, settings.prompt.kind
      (4, 'nll', 'per_head')
      >>> settings
      Settings(prompt_length=4, objective='nll')
    """

    prompt: PromptSettings = PromptSettings()
    study: StudySettings = StudySettings()
    teacher: TeacherSettings = TeacherSettings()
    training: TrainingSettings = TrainingSettings()
    devices: DeviceSettings = DeviceSettings()

    def __repr__(self) -> str:
        defaults = plain(Settings())
        changed = (f"{name}={value!r}" for name, value in plain(self).items() if value != defaults[name])
        return f"Settings({', '.join(changed)})"


class Options(TypedDict, total=False):
    """The settings as keyword arguments (of ``compress``): every field of every part, by its name."""

    prompt_length: int
    kind: str
    initial: str | None
    rank: int | None
    artifact_dtype: str
    study: str
    study_queries: int | None
    max_answer_tokens: int
    answers: str
    teacher_context: int | None
    objective: Any
    steps: int | None
    on_policy: float
    on_policy_every: int
    batch_size: int
    optimizer: Any
    learning_rate: float | None
    rates: str
    warmup_fraction: float
    weight_decay: float
    max_grad_norm: float
    seed: int
    evaluate_every: int
    patience: int
    keep: str | None
    parallel: str
    mesh: str
    grad_accumulation: int
    checkpoint_every: int


def make_settings(values: Mapping[str, Any], base: Settings | None = None) -> Settings:
    """``Settings`` from keywords.

    Args:
      values: by name of the field, whichever part it is in.
      base: what the others are.

    Raises:
      UserError: there is no such setting, it is of another type, or beyond its limits.
    """
    parts = dict(vars(base or Settings()))
    home = {field.name: (name, field) for name, part in parts.items() for field in dataclasses.fields(part)}
    for name, value in values.items():
        if name not in home:
            meant = suggestion(name, home) or f"; the settings are {', '.join(home)}"
            raise UserError(f"Unknown setting {name!r}{meant}{'' if meant.endswith('?') else '.'}")
        part, field = home[name]
        parts[part] = dataclasses.replace(parts[part], **{name: _checked(field, value)})
    return Settings(**parts)


MOST = 2**20
"""Greatest size of what is held in memory: beyond any machine's, and within what arrays can count."""

LARGEST = 2**32 - 1
"""No number that counts something is larger."""

_SIZES = ("prompt_length", "rank", "batch_size", "grad_accumulation")
_NAMES = {int: "a whole number", float: "a number", str: "a text"}
_OBJECTS = ("objective", "optimizer")  # a text, or an object that the tables of their room know
_LIMITS = {"at_least": operator.ge, "at_most": operator.le, "above": operator.gt, "below": operator.lt}


def _checked(field: dataclasses.Field, value: Any) -> Any:
    chosen_by_kind = field.metadata.get("type")
    if value is None and chosen_by_kind:
        return None
    option, expected = _option(field.name), chosen_by_kind or type(field.default)
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected and not (field.name in _OBJECTS and not isinstance(value, int)):
        raise UserError(f"{option} must be {_NAMES[expected]}, not {value!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{option} must be a finite number, not {value}.")
    if field.name in _SIZES:
        check_limits(field.name, value, at_most=MOST)
    check_limits(field.name, value, **field.metadata.get("limits", {}))
    if expected is int:
        check_limits(field.name, value, at_most=LARGEST)
    return value


def check_limits(name: str, value: Any, **limits: float) -> None:
    """Raises ``UserError`` if an option's value is beyond its limits.

    Args:
      name: name of the option, with underscores.
      value: given for it.
      **limits: any of ``at_least``, ``at_most``, ``above`` and ``below``.

    Example:
      >>> check_limits("at_once", 0, at_least=1)
      Traceback (most recent call last):
      jaxsp.errors.UserError: --at-once must be at least 1, not 0.
    """
    if limits and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise UserError(f"{_option(name)} must be a number, not {value!r:.60}.")
    if not all(_LIMITS[kind](value, limit) for kind, limit in limits.items()):
        wanted = " and ".join(f"{kind.replace('_', ' ')} {limit}" for kind, limit in limits.items())
        raise UserError(f"{_option(name)} must be {wanted}, not {value}.")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def plain(part: Any) -> dict[str, Any]:
    """The fields of one part, or of all, by name, as JSON carries them.

    An objective or an optimizer of the user's own is there as its text, without memory addresses.
    """
    found: dict[str, Any] = {}
    for name, value in vars(part).items():
        if dataclasses.is_dataclass(value) and name not in _OBJECTS:
            found |= plain(value)
        else:
            number_or_text = isinstance(value, str | int | float | None)
            found[name] = value if number_or_text else re.sub(r" at 0x\w+", "", str(value))
    return found


def decides_result(settings: Settings) -> dict[str, Any]:
    """Everything that decides what a run gives: all parts but ``devices``."""
    return {name: value for name, value in plain(settings).items() if name not in plain(settings.devices)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Entries that are not the same, in words; those of a mapping within by their path.

    Example:
      >>> differences({"steps": 4, "chat": {"after": "?"}}, {"steps": 4, "chat": {"after": "!"}})
      ["chat.after was '?' and is now '!'"]
    """
    found = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{name}.{difference}" for difference in differences(old, new)]
        elif old != new:
            found.append(f"{name} was {old!r} and is now {new!r}")
    return found


def side_by_side(settings: Settings) -> tuple[Any, ...]:
    """Equal for prompts that can train side by side, in one compiled step.

    All of the parts that training reads, but for the fields in which its prompts may differ.
    """
    parts = settings.prompt, settings.training, settings.devices
    return tuple(
        getattr(part, field.name)
        for part in parts
        for field in dataclasses.fields(part)
        if not field.metadata.get("per_prompt")
    )
