"""The command `jaxsp compare`: several runs in one table and on one page."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import tyro

from jaxsp.errors import UserError
from jaxsp.options import File


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare several runs, or the prompts of one compress-many run; loads no model."""

    examples: ClassVar[str] = """
      jaxsp compare short/ long/ longer/
      jaxsp compare many/ --out many.html
    """
    directories: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="DIR")]] = ()
    """Folders that compress wrote, or one that compress-many wrote."""
    out: File = "compare.html"
    """Page to write; an earlier one is replaced."""

    def run(self) -> None:
        from jaxsp import console
        from jaxsp.files import as_path, atomic_write
        from jaxsp.runs.compared import check_out, compare_folders

        if not self.directories:
            raise UserError("There is nothing to compare; give two folders of runs, or one of many.")
        file = as_path(self.out, "--out")
        check_out(file)
        found, left_out, page = compare_folders(self.directories, file)
        atomic_write(file, page)
        console.print_comparison(found, left_out, file)
