"""Options that several commands share, in the groups that --help shows (tyro)."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxsp.errors import UserError
from jaxsp.files import parse_json
from jaxsp.settings import PromptSettings, Settings

# What computes is imported where a command runs: --help and a misspelt option need not wait for it.
if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxsp.artifact import SoftPrompt
    from jaxsp.models.chat import ChatOptions
    from jaxsp.models.language_model import LanguageModel

EMBEDDED = "smollm2-135m-instruct"

_LIGHTER = {
    "batch_size": "lower --batch-size",
    "at_once": "lower --at-once",
    "slots": "lower --slots",
    "max_query_tokens": "lower --max-query-tokens",
    "grad_accumulation": "raise --grad-accumulation",
    "dtype": "take --dtype bfloat16",
    "quantization": "take --quantization int8",
    "parallel": "use more devices with --parallel mesh",
}
"""The way each option makes a run need less memory."""

File = Annotated[str, tyro.conf.arg(metavar="FILE")]
Folder = Annotated[str, tyro.conf.arg(metavar="DIR")]
Document = tyro.conf.Positional[
    Annotated[
        str,
        tyro.conf.arg(
            metavar="DOCUMENT",
            help="The document: text, Markdown, HTML, a notebook or, with jaxsp[pdf], a PDF; - for standard"
            " input.",
        ),
    ]
]
QueryColumn = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="NAME",
        help="Column of a table that holds the queries, where it is not called query, question, prompt,"
        " input, instruction or messages.",
    ),
]


@dataclasses.dataclass(frozen=True)
class PromptOptions(PromptSettings):
    """The prompt σ, and where it starts."""

    prompt_length: Annotated[int, tyro.conf.arg(aliases=["--length"])] = PromptSettings.prompt_length
    """K, the number of slots that stand in for the context."""


@dataclasses.dataclass(frozen=True)
class AllOptions(Settings):
    """All settings of a compression."""

    prompt: PromptOptions = PromptOptions()


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The frozen language model."""

    model: str = EMBEDDED
    """A directory, a .gguf file, a hub id, or the name of the embedded model."""
    dtype: str | None = None
    """Dtype of weights and activations: bfloat16, float32 or float16; by default bfloat16 where the hardware
    computes it, else float32."""
    quantization: Literal["none", "int8"] = "none"
    """Quantization of the layers' matrices; int8 halves bfloat16's memory and rounds them."""

    def load(self, mesh: Mesh | None = None) -> LanguageModel:
        from jaxsp.models.load import load_model

        return load_model(self.model, dtype=self.dtype, quantization=self.quantization, mesh=mesh)


@dataclasses.dataclass(frozen=True)
class WithChat(ModelOptions):
    """The frozen language model, and the layout of a chat with it."""

    system: str | None = None
    """Text of the chat's system turn; by default the template's own."""
    slot: Literal["user", "system"] = "user"
    """Turn of the chat that the document stands in."""
    template_option: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Further variables of the chat template, as enable_thinking=true (which is false by default)."""

    @property
    def chat(self) -> ChatOptions:
        """The layout of a chat.

        Raises:
          UserError: a variable is not given as NAME=VALUE.
        """
        from jaxsp.models.chat import ChatOptions

        return ChatOptions(self.system, self.slot, dict(map(_variable, self.template_option)))

    def load(self, mesh: Mesh | None = None) -> LanguageModel:
        from jaxsp.models.load import load_model

        return load_model(
            self.model, dtype=self.dtype, quantization=self.quantization, mesh=mesh, chat=self.chat
        )


def _variable(option: str) -> tuple[str, Any]:
    """The name and the value of ``NAME=VALUE``; a value that is JSON is meant as such."""
    name, sign, value = option.partition("=")
    if not (sign and name.isidentifier()):
        raise UserError(f"--template-option takes NAME=VALUE, as enable_thinking=true, not {option!r}.")
    try:
        return name, parse_json(value, name, object)
    except UserError:
        return name, value


@dataclasses.dataclass(frozen=True)
class WithTeacher(WithChat):
    """The frozen language model, and the one that teaches it."""

    teacher: str | None = None
    """Another model as the teacher, named as --model is: it reads the whole document, and the prompt learns
    what it says. It is in --dtype, never quantized. With another vocabulary it needs --objective nll. By
    default the model itself."""

    def load_teacher(self, model: LanguageModel, mesh: Mesh | None = None) -> LanguageModel | None:
        """The teacher: the model itself, where it has the same name and is not quantized."""
        if self.teacher is None or (self.teacher == self.model and self.quantization == "none"):
            return None if self.teacher is None else model
        return dataclasses.replace(self, model=self.teacher, quantization="none").load(mesh)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Addresses by which the processes of a run find each other; those of a TPU pod need none."""

    coordinator: str | None = None
    """host:port at which process 0 listens."""
    process_id: int | None = None
    """Number of this process, from 0."""
    num_processes: int | None = None
    """Number of processes."""

    def join(self) -> bool:
        """Joins the others, before jax is used; says whether there are any."""
        given = self.coordinator, self.process_id, self.num_processes
        if given == (None, None, None) and "," not in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
            return False
        from jaxsp import processes

        return processes.join(*given)


@dataclasses.dataclass(frozen=True)
class Output:
    """The folder of the run."""

    out: Folder
    """Folder for all that is written."""
    resume: bool = False
    """Go on with the interrupted run in --out."""
    overwrite: bool = False
    """Replace an earlier run in --out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """A saved prompt, and its model."""

    directory: tyro.conf.Positional[Folder]
    """The folder that compress wrote; or hf://OWNER/NAME, a repository of the model hub."""
    model: str | None = None
    """The model's folder, file or id, if it is not where it was."""
    dtype: str | None = None
    """Dtype of weights and activations."""
    length: int | None = None
    """Slots to read, of a nested prompt; by default all."""

    def prompt(self) -> SoftPrompt:
        from jaxsp.artifact import SoftPrompt

        prompt = SoftPrompt.load(self.directory)
        return prompt if self.length is None else prompt.cut(self.length)

    def load(self, prompt: SoftPrompt) -> LanguageModel:
        from jaxsp.artifact import named_model

        name = named_model(prompt.manifest["model"]) if self.model is None else self.model
        return ModelOptions(name, self.dtype, prompt.quantization).load().stopping_at(prompt.stop_ids)


def check_share(context_fallback: float | None) -> None:
    """Raises ``UserError`` if this is no fraction of questions that the whole document can answer."""
    if context_fallback is not None and not 0 < context_fallback < 1:
        raise UserError(f"--context-fallback must be above 0 and below 1, not {context_fallback:g}.")


def ways_to_need_less(command: Any) -> str:
    """The ways to need less memory, by the options that a command has."""
    parts = [command, *filter(dataclasses.is_dataclass, vars(command).values())]
    ways = [way for name, way in _LIGHTER.items() if any(hasattr(part, name) for part in parts)]
    return " or ".join(filter(None, (", ".join(ways[:-1]), *ways[-1:])))
