"""A process that has imported what a command needs, and forks a child for each command that it is given.

Importing takes longer than a tiny run. No device is touched before the fork: each child sets up jax, its
threads and its signals itself, by the entry point of the console script.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path


class Zygote:
    """Starts commands of jaxsp in processes of their own, one after the other.

    Args:
      folder: for what they write on standard error.
    """

    def __init__(self, folder: Path) -> None:
        self._errors = folder / "stderr.txt"
        command = [sys.executable, "-m", "tests.runs.zygote", str(self._errors)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        assert self._said() == "ready"

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def begin(self, words: list[str]) -> int:
        """Starts a command; gives its process, which may be sent signals until ``end``."""
        self._say(json.dumps(words))
        return int(self._said())

    def end(self) -> tuple[int, str]:
        """Waits until the command has ended; gives its exit code, and what it wrote on standard error."""
        self._say("end")
        return int(self._said()), self._errors.read_text("utf-8", "replace")

    def close(self) -> None:
        self._process.communicate()


def _serve(errors: str) -> None:
    # All that a command imports, before it is forked.
    for name in (
        "jaxsp.api",
        "jaxsp.console",
        "jaxsp.training.checkpoint",
        "matplotlib.backends.backend_agg",
        "pyarrow.parquet",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama",
    ):
        importlib.import_module(name)
    print("ready", flush=True)
    while line := sys.stdin.readline():
        child = os.fork()
        if not child:
            _be(json.loads(line), errors)
        print(child, flush=True)
        sys.stdin.readline()  # until then its number is not given to another process
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _be(words: list[str], errors: str) -> None:
    """Becomes the command, and ends with it."""
    for number, name in enumerate((os.devnull, os.devnull, errors)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.stdin = io.TextIOWrapper(io.FileIO(0), encoding="utf-8")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["jaxsp", *words]
    code = 1
    try:
        from jaxsp.__main__ import main

        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
