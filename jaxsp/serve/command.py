"""The command `jaxsp serve`: saved prompts behind OpenAI's HTTP interface."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from jaxsp.errors import UserError
from jaxsp.options import ModelOptions, check_share
from jaxsp.serve.address import base_url, bind, is_loopback
from jaxsp.settings import check_limits

if TYPE_CHECKING:
    from jaxsp.artifact import SoftPrompt

KEY = "JAXSP_API_KEY"
"""Environment variable for a key that is not to be seen in a list of processes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """Answer requests of OpenAI's clients with saved prompts; each is a model of its folder's name."""

    examples: ClassVar[str] = """
      jaxsp serve prompt/
      jaxsp serve many/ --port 9000 --slots 16
      jaxsp serve prompt/ --host 0.0.0.0 --api-key "$KEY"
      jaxsp serve prompt/ --context-fallback 0.1
    """
    directories: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="DIR [DIR ...]")]]
    """Folders that compress or compress-many wrote, or hf://OWNER/NAME, for one model; a nested prompt is
    also name@LENGTH. They are read once: start the server again for what has changed in them."""
    model: str | None = None
    """The model's folder, file or id, if it is not where it was."""
    dtype: str | None = None
    """Dtype of weights and activations."""
    host: Annotated[str, tyro.conf.arg(metavar="ADDRESS")] = "127.0.0.1"
    """Address to listen at; one that other machines reach needs a key."""
    port: int = 8000
    """Port to listen at; 0 for any that is free."""
    api_key: Annotated[str | None, tyro.conf.arg(metavar="KEY")] = None
    """Key that requests must carry; by default $JAXSP_API_KEY."""
    slots: int | None = None
    """Requests that are answered at once; by default 8 on a CPU, else 32."""
    queue: int = 256
    """Requests that may wait for a slot; further ones are told to come again (429)."""
    max_query_tokens: int = 1024
    """Tokens that a chat may have behind the document; memory, and time for each token, grow with them."""
    max_answer_tokens: int = 512
    """Tokens that an answer may have; likewise."""
    context_fallback: Annotated[float | None, tyro.conf.arg(metavar="FRACTION")] = None
    """Fraction of the chats that the whole document answers: those on which the soft prompt is least sure."""

    def run(self) -> None:
        key = self._check()
        from jaxsp.artifact import SoftPrompt

        folders = [folder for directory in self.directories for folder in _prompts(directory)]
        found = [(folder, SoftPrompt.load(folder)) for folder in folders]
        with contextlib.closing(bind(self.host, self.port)) as listener:  # before all that takes long
            self._serve(found, listener, key)
        print("All requests are answered; the server has ended.", file=sys.stderr)

    def _serve(self, found: list[tuple[Path, SoftPrompt]], listener: socket.socket, key: str | None) -> None:
        from jaxsp.artifact import named_model
        from jaxsp.serve import server
        from jaxsp.serve.brackets import Brackets
        from jaxsp.serve.exchange import Limits
        from jaxsp.serve.fallback import Fallback
        from jaxsp.terminal import visible

        first = found[0][1]
        name = named_model(first.manifest["model"]) if self.model is None else self.model
        model = ModelOptions(name, self.dtype, first.quantization).load()
        limits = Limits(query_tokens=self.max_query_tokens, answer_tokens=self.max_answer_tokens)
        slots = server.default_slots() if self.slots is None else self.slots
        shelf, share = server.open_shelf(model, found), self.context_fallback
        fallback = None if share is None else Fallback(shelf, share)
        print("Preparing; the first start compiles, which may take a minute.", file=sys.stderr)
        brackets = Brackets(shelf, limits, slots=slots, queue=self.queue)
        if (memory := brackets.in_words) is not None:
            print(memory, file=sys.stderr)
        scheduler = server.open_scheduler(shelf, limits, slots=slots, queue=self.queue)
        access = {"api_key": key, "host": self.host}
        made = server.make_server(shelf, scheduler, brackets, limits, **access, fallback=fallback)

        def ready() -> None:
            url = base_url(listener)
            chat = f"a page to chat: {url.removesuffix('/v1')}/; Ctrl-C ends"
            print(visible(f"Serving {', '.join(shelf)} at {url} ({chat})."), flush=True)

        with contextlib.closing(scheduler), contextlib.closing(brackets):
            server.run(made, listener, ready)

    def _check(self) -> str | None:
        """Checks the options before anything is loaded, and gives the key."""
        if not self.directories:
            raise UserError("Missing: DIR; see jaxsp serve --help.")
        lacking = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
        if lacking:
            raise UserError(f"Serving needs {' and '.join(lacking)}: pip install 'jaxsp[serve]'.")
        if not 0 <= self.port < 2**16:
            raise UserError(f"--port must be from 0 to 65535, not {self.port}.")
        for option in ("slots", "queue", "max_query_tokens", "max_answer_tokens"):
            if (value := getattr(self, option)) is not None:
                check_limits(option, value, at_least=0 if option == "queue" else 1)
        check_share(self.context_fallback)
        key = self.api_key if self.api_key is not None else os.environ.get(KEY)
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
            raise UserError("--api-key must be plain letters, digits and signs, without blanks around.")
        if key is None and not is_loopback(self.host):
            raise UserError(
                f"Other machines may reach the server at {self.host!r}: give it an --api-key (or ${KEY})."
            )
        return key


def _prompts(directory: str) -> list[Path]:
    """The folder of a prompt; or those in a folder of many whose runs are finished.

    Raises:
      UserError: the many have finished none.
    """
    from jaxsp import hub
    from jaxsp.artifact import FILES, MANIFEST
    from jaxsp.runs.folder import RunFolder, finished_runs

    folder = hub.local(directory, FILES)
    is_run = RunFolder(folder).settings.is_file() and not (folder / MANIFEST).is_file()
    return finished_runs(folder) if is_run else [folder]
