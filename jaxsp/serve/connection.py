"""Connections whose clients are there, but take nothing more: they are given up."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

LOOKS = 4
"""Looks at a connection in the time that it has."""


class Connection(H11Protocol):
    """uvicorn's connection, but for one that stands still.

    While nothing can be written, and when all is written and the connection is to be closed, uvicorn and
    asyncio wait for the client without an end, and the server's own end waits with them. Here the client has
    ``seconds`` to take a piece of what is there. A client that leaves is noticed by asyncio itself.
    """

    seconds: float = 30.0
    _size = 0  # bytes that waited at the last look
    _still = 0  # looks since then without a change
    _look_task: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look_task is not None:
            self._look_task.cancel()
        super().connection_lost(exc)

    def _look_later(self) -> None:
        self._look_task = self.loop.call_later(self.seconds / LOOKS, self._look)

    def _look(self) -> None:
        """Gives the connection up if the client has taken nothing for so long."""
        size = self.transport.get_write_buffer_size()
        stuck = size > 0 and (self.flow.write_paused or self.transport.is_closing())  # nothing is added
        self._still = self._still + 1 if stuck and size == self._size else 0
        self._size = size
        if self._still >= LOOKS:
            self.transport.abort()
        else:
            self._look_later()


def given_up_after(seconds: float) -> type[Connection]:
    """The class of connections whose clients have so many seconds to take a piece of an answer.

    Args:
      seconds: the number, above 0.

    Example:
      >>> given_up_after(2).seconds
      2
    """
    return type("Connection", (Connection,), {"seconds": seconds})
