"""The command `jaxsp push`: a saved prompt goes to a repository of the model hub."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import tyro

from jaxsp.options import Folder
from jaxsp.terminal import visible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Push:
    """Upload a saved prompt to a repository of the model hub, private unless you say otherwise."""

    examples: ClassVar[str] = """
      jaxsp push prompt/ somebody/manual-prompt --dry-run
      jaxsp push prompt/ somebody/manual-prompt
      jaxsp push prompt/ somebody/manual-prompt --public --with-document
    """
    directory: tyro.conf.Positional[Folder]
    """The folder that compress wrote."""
    repository: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OWNER/NAME")]]
    """The repository; it is made if there is none. The token is that of `hf auth login`, or HF_TOKEN."""
    public: bool = False
    """Let everyone read it: a new repository is then public, and one that is public is written to."""
    with_document: bool = False
    """Upload the document (context.txt), too; those who evaluate the prompt need it."""
    dry_run: bool = False
    """Show what would be uploaded, and upload nothing."""

    def run(self) -> None:
        from jaxsp import api, console, hub
        from jaxsp.exports.push import FILES

        files = api.files_to_push(self.directory, self.repository, with_document=self.with_document)
        console.print_files(files, self.repository, public=self.public)
        if self.dry_run:
            print("Nothing was uploaded (--dry-run).")
            return
        address = hub.upload(self.repository, files, public=self.public, gone=FILES)
        print(visible(f"Uploaded: {address}   Ask it: jaxsp ask hf://{self.repository}"))
