"""The command line in a process of its own: ``python -m jaxsp``, and the console script ``jaxsp``."""

from __future__ import annotations

import sys
from typing import Any

from jaxsp import cli


def main() -> None:
    """Entry point of the console script."""
    cli.main(before_running=_without_torch)


def _without_torch() -> None:
    # transformers loads torch where it is installed, for seconds and 200 MB; no command of ours uses it.
    nothing: Any = None  # the import system's sign for what is not to be had
    sys.modules.setdefault("torch", nothing)


if __name__ == "__main__":
    main()
