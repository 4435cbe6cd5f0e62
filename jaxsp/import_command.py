"""The command `jaxsp import-peft`: an adapter of PEFT becomes a saved prompt."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import tyro

from jaxsp.errors import UserError
from jaxsp.files import as_path
from jaxsp.options import File, Folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportPeft:
    """Make a saved prompt of an adapter of PEFT: PROMPT_TUNING, CARTRIDGE or PREFIX_TUNING."""

    examples: ClassVar[str] = """
      jaxsp import-peft adapter/ --out prompt/
      jaxsp import-peft adapter/ --document manual.md --out prompt/
      jaxsp import-peft adapter/ --model HuggingFaceTB/SmolLM2-360M-Instruct --plain
    """
    directory: tyro.conf.Positional[Folder]
    """The folder that PEFT or `jaxsp export --to peft` wrote."""
    out: Folder | None = None
    """Folder to write; by default jaxsp in the adapter's."""
    model: str | None = None
    """The model's folder, file or id, if it is not the one that the adapter names."""
    document: File | None = None
    """The document that it stands for, which evaluate needs."""
    plain: bool = False
    """Put questions behind it as they are; by default with the texts of the model's chat template."""
    overwrite: bool = False
    """Replace an earlier prompt in --out."""

    def run(self) -> None:
        from jaxsp import api, console
        from jaxsp.artifact import CONTEXT
        from jaxsp.data.documents import read_context
        from jaxsp.exports import readme

        folder = as_path(self.directory, "The adapter")
        folder = folder.parent if folder.is_file() else folder
        out = folder / "jaxsp" if self.out is None else as_path(self.out, "The folder (--out)")
        _check(out, self.overwrite)
        context = None if self.document is None else read_context(self.document)
        prompt = api.import_peft(folder, model=self.model, context=context, plain=self.plain)
        if prompt.context is None:  # an earlier prompt's would be taken for this one's
            (out / CONTEXT).unlink(missing_ok=True)
        prompt.save(out)
        readme.write(out, prompt)
        console.print_import(prompt, out)


def _check(out: Path, overwrite: bool) -> None:
    """Raises ``UserError`` if no prompt may be written there, before a model is loaded."""
    from jaxsp.artifact import CARD, FILES, MANIFEST

    if out.is_file():
        raise UserError(f"{out} is a file; choose another folder with --out.")
    there = {file.name for file in out.iterdir()} if out.is_dir() else set()
    if not there:
        return
    if MANIFEST not in there or not there <= {*FILES, CARD}:
        raise UserError(f"{out} holds other files than a prompt's; choose another folder with --out.")
    if not overwrite:
        raise UserError(f"{out} is there already; replace it with --overwrite, or choose another --out.")
