"""The command `jaxsp export`: a saved prompt for another program, measured there."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import tyro

from jaxsp.errors import UserError
from jaxsp.files import as_path
from jaxsp.options import Folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write a soft prompt for another program, and measure there that it is the same."""

    examples: ClassVar[str] = """
      jaxsp export prompt/ --to transformers
      jaxsp export prompt/ --to peft --out adapter/ --with-model
      jaxsp export prompt/ --to vllm --overwrite
    """
    directory: tyro.conf.Positional[Folder]
    """The folder that compress wrote, or hf://OWNER/NAME."""
    to: Annotated[str, tyro.conf.arg(metavar="FORMAT")]
    """transformers: keys and values of any prompt, with a loader. peft: an adapter of PEFT, of input vectors,
    or of keys and values without biases. vllm: input vectors for a server, with a client. llama.cpp: input
    vectors for a GGUF file, with a loader."""
    out: Folder | None = None
    """Folder to write; by default one of the format's name in the prompt's."""
    model: str | None = None
    """The model's folder, file or id, if it is not where it was."""
    length: int | None = None
    """Slots to export, of a nested prompt; by default all."""
    with_model: bool = False
    """Copy the model, too: weights as safetensors and the tokenizer, or the GGUF file for llama.cpp."""
    overwrite: bool = False
    """Replace an earlier export."""

    def run(self) -> None:
        from jaxsp import api, console, hub

        out = self.out
        if out is None:
            if hub.is_remote(self.directory):
                raise UserError(f"Say with --out where the export of {self.directory} is to lie.")
            folder = as_path(self.directory, "The prompt")
            out = (folder.parent if folder.is_file() else folder) / self.to
        options = {"model": self.model, "overwrite": self.overwrite, "with_model": self.with_model}
        found = api.export(self.directory, self.to, out=out, length=self.length, **options)
        console.print_export(found)
