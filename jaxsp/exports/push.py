"""The files of a saved prompt that go to a repository of the model hub, and their README."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsp.artifact import ARRAYS, CARD, CONTEXT, MANIFEST, SoftPrompt
from jaxsp.errors import UserError
from jaxsp.exports import readme
from jaxsp.exports.question import without_paths
from jaxsp.files import read_whole, sealed
from jaxsp.hub import SCHEME, check_name

FILES = (ARRAYS, MANIFEST, CARD, CONTEXT)
"""Everything that may be uploaded."""


def files_of(
    folder: Path,
    prompt: SoftPrompt,
    repository: str,
    report: Mapping[str, Any] | None = None,
    *,
    with_document: bool = False,
) -> dict[str, bytes]:
    """The contents of the files to upload, by their names; nothing else of the folder leaves it.

    Folders of this machine are not named in them: of the path of a model its last part is left.

    Args:
      folder: of the prompt.
      prompt: that was read from it.
      repository: where the files go, ``OWNER/NAME``.
      report: the run's ``report.json``, if it is known.
      with_document: whether the document goes, too.

    Raises:
      UserError: no repository has such a name; or the document is to go, and is not there.
    """
    check_name(repository)
    if with_document and prompt.context is None:
        raise UserError(f"There is no {CONTEXT} in {folder}; leave --with-document away.")
    manifest = without_paths(prompt.manifest)
    report = None if report is None else without_paths(report)
    if not with_document:
        manifest.pop("context_sha256", None)  # whoever has the text could be told by it
    shown = SoftPrompt(prompt.sigma, manifest, prompt.context if with_document else None)
    text = json.dumps(sealed(manifest), indent=2, ensure_ascii=False)
    found = {
        CARD: readme.text(shown, report, f"{SCHEME}{repository}").encode(),
        MANIFEST: f"{text}\n".encode(),
        ARRAYS: read_whole(folder / ARRAYS, manifest["sha256"]),
    }
    return found if shown.context is None else {**found, CONTEXT: shown.context.encode()}
