"""Files in a repository of the model hub, by ``huggingface_hub``: a saved prompt is read and written there.

The token is the hub's own affair: it is taken from ``HF_TOKEN`` or from ``hf auth login``. It is not printed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsp.errors import UserError, in_a_line
from jaxsp.files import as_path

SCHEME = "hf://"

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"


def is_remote(directory: Any) -> bool:
    """Whether a folder is a repository of the hub.

    Args:
      directory: as a user gives it.

    Example:
      >>> is_remote("hf://somebody/their-prompt"), is_remote("somebody/their-prompt")
      (True, False)
    """
    return isinstance(directory, str) and directory.startswith(SCHEME)


def local(directory: Any, patterns: Sequence[str]) -> Path:
    """The folder itself, also of a file in it; of ``hf://OWNER/NAME`` one with some files, downloaded once.

    Args:
      directory: a folder, a file in it, or a repository.
      patterns: names of the files to download.

    Raises:
      UserError: it is no path, there is no such repository, or the hub can't be reached.

    Example:
      >>> local("prompt/", []).name
      'prompt'
    """
    if not is_remote(directory):
        folder = as_path(directory, "The prompt")
        return folder.parent if folder.is_file() else folder
    repository = check_name(directory.removeprefix(SCHEME))
    import huggingface_hub

    with _as_user_errors(repository):
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(patterns)))


def name_of(folder: Path) -> str:
    """The last part of a folder's path; of one that ``local`` has downloaded the repository's name.

    Args:
      folder: the folder.

    Example:
      >>> name_of(Path("hub/models--somebody--their-prompt/snapshots/0123"))
      'their-prompt'
    """
    whole = folder.resolve()
    repository = whole.parents[1].name if whole.parent.name == "snapshots" else ""
    return repository.rpartition("--")[2] if repository.startswith("models--") else whole.name


def check_name(repository: str) -> str:
    """The name of a repository; raises ``UserError`` if it is not ``OWNER/NAME``.

    Example:
      >>> check_name("their-prompt")
      Traceback (most recent call last):
      jaxsp.errors.UserError: A repository of the hub is named OWNER/NAME, not 'their-prompt'.
    """
    if not _NAME.fullmatch(repository) or ".." in repository or "--" in repository or len(repository) > 96:
        raise UserError(f"A repository of the hub is named OWNER/NAME, not {repository!r:.120}.")
    return repository


def upload(
    repository: str, files: Mapping[str, bytes], *, public: bool = False, gone: Sequence[str] = ()
) -> str:
    """Writes files into a repository, in one commit; it is made if there is none.

    Args:
      repository: its name, ``OWNER/NAME``.
      files: their contents by their names.
      public: whether everyone may read them: a new repository is then public; without it, one that is public
        is refused.
      gone: names of files that are to be deleted, if they are there.

    Returns:
      The address of the repository.

    Raises:
      UserError: there is no token, it may not write there, or the hub can't be reached.
    """
    check_name(repository)
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError

    api = huggingface_hub.HfApi()
    with _as_user_errors(repository):
        if not huggingface_hub.get_token():
            raise UserError(f"Uploading needs a token of the hub: {_LOG_IN}.")
        try:
            found = api.model_info(repository)
        except RepositoryNotFoundError:  # or one that the token may not see
            there, address = set(), str(api.create_repo(repository, private=not public))
        else:
            if not (found.private or public):
                raise UserError(
                    f"{repository} is public: everyone could read the prompt. Give --public if they may, or"
                    " choose another repository."
                )
            there = {file.rfilename for file in found.siblings or ()}
            if (others := there - {".gitattributes", "README.md"}) and not others & set(files):
                raise UserError(
                    f"{repository} holds other files ({min(others)!r:.60}) and no soft prompt; choose another"
                    " repository."
                )
            address = f"{api.endpoint}/{repository}"
        operations: list[Any] = [CommitOperationAdd(name, data) for name, data in files.items()]
        operations += [CommitOperationDelete(name) for name in gone if name in there and name not in files]
        api.create_commit(repository, operations, commit_message="Upload a soft prompt")
    return address


@contextlib.contextmanager
def _as_user_errors(repository: str) -> Iterator[None]:
    """Turns what the hub and its client raise into one sentence, without the token."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"The model hub has no repository {repository!r}, or it is private and the token may not see it."
        ) from error
    except errors.HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        if code in (401, 403):
            raise UserError(f"The hub refuses {repository!r} ({code}): {_LOG_IN}.") from error
        said = in_a_line(getattr(error, "server_message", None) or type(error).__name__, 300)
        raise UserError(f"The hub refuses {repository!r} ({code}: {said}).") from error
    except Exception as error:  # the hub's client raises many kinds when it can't be reached
        # Not its words: those on a header that is refused hold the token.
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"The model hub can't be reached for {repository!r} ({reason}).") from error
