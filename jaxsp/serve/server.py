"""The server in this process (uvicorn): what it answers with, and its end."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from jaxsp import device
from jaxsp.artifact import SoftPrompt
from jaxsp.errors import UserError
from jaxsp.models.generation import Live
from jaxsp.models.language_model import LanguageModel
from jaxsp.serve.app import make_app
from jaxsp.serve.brackets import Brackets
from jaxsp.serve.connection import given_up_after
from jaxsp.serve.exchange import Limits
from jaxsp.serve.fallback import Fallback
from jaxsp.serve.scheduler import Scheduler
from jaxsp.serve.served import Shelf


def default_slots() -> int:
    """Requests that suit the device: a processor has no use for many at once."""
    return 8 if device.platform() == "cpu" else 32


def open_shelf(model: LanguageModel, folders: Sequence[tuple[Path, SoftPrompt]]) -> Shelf:
    """The prompts, ready to answer behind.

    Raises:
      UserError: a prompt belongs to another model, or the window leaves no room behind it.
    """
    shelf = Shelf(model, folders)
    for served in shelf.values():
        if served.room < 2:
            raise UserError(
                f"{served.name}: the model's window of {model.config.window} has no room behind it."
            )
    return shelf


def open_scheduler(shelf: Shelf, limits: Limits, *, slots: int, queue: int) -> Scheduler:
    """The running batch for these prompts; its program is compiled when this returns.

    Args:
      shelf: the prompts.
      limits: of a request.
      slots: requests that are answered at once.
      queue: requests that may wait.
    """
    model, stops = shelf.model, max(len(served.stop_ids) for served in shelf.values())
    room = max(served.room for served in shelf.values()) - 1

    def make_batch() -> Live:
        return Live(
            model.params,
            model.config,
            shelf.prefixes,
            slots=slots,
            query_tokens=min(limits.query_tokens, room),
            answer_tokens=min(limits.answer_tokens, room),
            stops=max(stops, 1),
        )

    return Scheduler(make_batch, slots, queue)


def make_server(
    shelf: Shelf,
    scheduler: Scheduler,
    brackets: Brackets,
    limits: Limits,
    *,
    api_key: str | None,
    host: str,
    fallback: Fallback | None = None,
) -> uvicorn.Server:
    """The server, to be run with a socket; arguments as in ``make_app``."""
    app = make_app(shelf, scheduler, brackets, limits, api_key=api_key, host=host, fallback=fallback)
    # uvicorn waits for the requests that are there when it is asked to end, and they have their limit.
    config = uvicorn.Config(
        app, http=given_up_after(limits.idle_seconds), ws="none", lifespan="off", log_config=None,
        log_level="error", access_log=False, server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=int(limits.seconds) + 1,
    )  # fmt: skip
    return uvicorn.Server(config)


def run(server: uvicorn.Server, listener: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serves until a signal asks for the end, and answers what is there by then.

    Args:
      server: from ``make_server``.
      listener: the socket of its address.
      on_ready: called before the first request.

    Raises:
      KeyboardInterrupt: a second Ctrl-C cut answers short.
    """
    on_ready()
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn passes the signal on when it has ended
        if server.force_exit or not server.started:
            raise
