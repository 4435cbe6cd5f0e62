"""A server in a thread, with tiny soft prompts of several kinds and lengths."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from jaxsp.artifact import SoftPrompt
from jaxsp.serve import address, server
from jaxsp.serve.brackets import Brackets
from jaxsp.serve.exchange import Limits
from jaxsp.serve.fallback import Fallback
from jaxsp.serve.scheduler import Scheduler
from jaxsp.serve.served import Shelf
from tests.conftest import CONTEXT
from tests.exports import consumer

LIMITS = Limits(query_tokens=256, answer_tokens=64)
SLOTS = 4
KINDS = {"pump": "per_head", "oven": "nested", "lamp": "key_value", "bike": "embedding"}


@functools.cache
def shelf() -> Shelf:
    """One prompt of each kind, saved and read again; all for one tiny model."""
    folder = Path(tempfile.mkdtemp(prefix="jaxsp-serve-"))
    found = []
    for n, (name, kind) in enumerate(KINDS.items()):
        prompt = consumer.prompt("llama", kind, bias=True, context=f"This is the {name}. {CONTEXT[10 * n :]}")
        prompt.save(folder / name)
        found.append((folder / name, SoftPrompt.load(folder / name)))
    return server.open_shelf(consumer.model("llama"), found)


@functools.cache
def asked(name: str, question: str, max_tokens: int) -> str:
    """The answer of `jaxsp ask`."""
    served = shelf()[name]
    return served.prompt.ask(question, model=served.model, max_tokens=max_tokens)


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that is running."""

    url: str
    scheduler: Scheduler
    server: uvicorn.Server
    client: Any
    options: dict[str, Any]
    fallback: Fallback | None = None

    @property
    def connections(self) -> list[Any]:
        return list(self.server.server_state.connections)

    @property
    def place(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").removesuffix("/v1").split(":")
        return host, int(port)


@contextlib.contextmanager
def running(
    *,
    queue: int = 64,
    slots: int = SLOTS,
    api_key: str | None = None,
    found: Shelf | None = None,
    below: str = "",
    share: float | None = None,
    **limits: Any,
) -> Iterator[Running]:
    own = dataclasses.replace(LIMITS, **limits)
    own_shelf = found or shelf()
    scheduler = server.open_scheduler(own_shelf, own, slots=slots, queue=queue)
    brackets = Brackets(own_shelf, own, slots=slots, queue=queue)
    with contextlib.closing(address.bind("127.0.0.1", 0)) as listener:
        fallback = None if share is None else Fallback(own_shelf, share)
        access = {"api_key": api_key, "host": "127.0.0.1", "fallback": fallback}
        made = server.make_server(own_shelf, scheduler, brackets, own, **access)
        if below:  # as a proxy lets it be
            inner: Any = made.config.app
            made.config.app = Starlette(routes=[Mount(below, inner)])
        thread = threading.Thread(target=server.run, args=(made, listener, lambda: None))
        url = address.base_url(listener)
        thread.start()
        options = {"base_url": url, "api_key": api_key or "any", "max_retries": 0, "timeout": 60}
        try:
            with openai.OpenAI(**options) as client:
                yield Running(url, scheduler, made, client, options, fallback)
        finally:
            made.should_exit = True
            thread.join(60)
            brackets.close()
            scheduler.close()
    assert not thread.is_alive()


def until(good: Callable[[], object], seconds: float = 20) -> bool:
    """Whether it becomes true in time."""
    end = time.monotonic() + seconds
    while not good():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
