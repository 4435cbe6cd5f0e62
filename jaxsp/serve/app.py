"""The HTTP side (starlette): routes, keys, bodies, and clients that leave."""

from __future__ import annotations

import asyncio
import concurrent.futures
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jaxsp.errors import Damaged, UserError
from jaxsp.files import parse_json
from jaxsp.serve.address import LOOPBACK
from jaxsp.serve.exchange import Exchange, Limits, took_too_long
from jaxsp.serve.refusal import Refusal
from jaxsp.serve.replies import to_bytes
from jaxsp.serve.scheduler import Scheduler
from jaxsp.serve.schema import Wish, read_chat, read_completion
from jaxsp.serve.served import Served, Shelf

_T = TypeVar("_T")


def make_app(
    shelf: Shelf, scheduler: Scheduler, limits: Limits, *, api_key: str | None, host: str
) -> Starlette:
    """The application.

    Args:
      shelf: the prompts.
      scheduler: answers the requests.
      limits: of a request.
      api_key: that requests must carry; ``None``: none, and they must come by the name ``host`` or one of
        this machine's own, so that no web page reaches the server by a name of its own (DNS rebinding).
      host: address that the server listens at.
    """
    service = _Service(shelf, scheduler, limits)
    names = {*LOOPBACK, host.lower()}

    def guarded(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Any]:
        async def checked(request: Request) -> Response:
            _check_access(request, api_key, names)
            return await answer(request)

        return checked

    return Starlette(
        routes=[
            Route("/v1/models", guarded(service.models)),
            Route("/v1/models/{name:path}", guarded(service.model)),
            Route("/v1/chat/completions", guarded(service.chat), methods=["POST"]),
            Route("/v1/completions", guarded(service.completion), methods=["POST"]),
            Route("/health", service.health),
        ],
        exception_handlers={
            Refusal: _refused,
            HTTPException: _no_such_page,
            ClientDisconnect: _nobody_there,
            Exception: _failed,
        },
    )


class _Service:
    """The answers of the routes."""

    def __init__(self, shelf: Shelf, scheduler: Scheduler, limits: Limits) -> None:
        self._shelf, self._scheduler, self._limits = shelf, scheduler, limits
        self._arriving = 0  # requests that are being read or encoded
        # One at a time: a tokenizer's switches are shared.
        self._encoder = concurrent.futures.ThreadPoolExecutor(1, "jaxsp-encoder")

    async def models(self, request: Request) -> Response:
        del request
        return _json({"object": "list", "data": [served.entry for served in self._shelf.values()]})

    async def model(self, request: Request) -> Response:
        return _json(self._shelf[request.path_params["name"]].entry)

    async def health(self, request: Request) -> Response:
        del request
        return _json({"status": "ok", "requests": self._scheduler.count})

    async def chat(self, request: Request) -> Response:
        return await self._answered(request, read_chat)

    async def completion(self, request: Request) -> Response:
        return await self._answered(request, read_completion)

    async def _answered(self, request: Request, read: Callable[[dict[str, Any]], Wish]) -> Response:
        self._scheduler.check_room(self._arriving)
        self._arriving += 1
        try:
            wish, served, ids = await self._encoded(request, read)
        finally:
            self._arriving -= 1
        exchange = Exchange(self._scheduler, served, wish, ids, self._limits)
        if wish.stream:
            return _Events(exchange.events(), exchange.close)
        try:
            return _json(await _while_there(request.receive, exchange.whole()))
        finally:
            exchange.close()

    async def _encoded(
        self, request: Request, read: Callable[[dict[str, Any]], Wish]
    ) -> tuple[Wish, Served, list[int]]:
        """A request, the prompt that it is for, and its tokens behind it."""
        try:
            wish = read(parse_json(await _body(request, self._limits), "The body"))
        except Damaged as error:
            raise Refusal(str(error), code="invalid_json") from None
        served = self._shelf[wish.model]
        loop, seconds = asyncio.get_running_loop(), self._limits.seconds
        try:
            async with asyncio.timeout(seconds):
                encode = served.request_ids, wish, self._limits.query_tokens
                encoding = loop.run_in_executor(self._encoder, *encode)
                return wish, served, await _while_there(request.receive, encoding)
        except TimeoutError:
            raise took_too_long(seconds) from None
        except UserError as error:
            raise Refusal(str(error), param="prompt" if wish.messages is None else "messages") from None


class _Events(StreamingResponse):
    """Server-sent events, whose client may leave."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _while_there(receive: Receive, work: Awaitable[_T]) -> _T:
    """The result of the work, which is cancelled if the client leaves.

    Raises:
      ClientDisconnect: it has left.
    """

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _body(request: Request, limits: Limits) -> bytes:
    """The request's JSON.

    Raises:
      Refusal: it is of another kind, too large, or doesn't come.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # nor could a web page send that here without being asked first (CORS)
        raise Refusal(
            f"The body must be JSON, with the header content-type: application/json, not {kind[:60]!r}.",
            status=415,
        )
    size, parts = 0, []
    try:
        async with asyncio.timeout(limits.idle_seconds):
            async for part in request.stream():
                size += len(part)
                if size <= limits.body_bytes:
                    parts.append(part)
                elif size > 16 * limits.body_bytes:
                    break  # until there it is read: else the client might miss the answer
    except TimeoutError:
        raise Refusal(
            f"The body did not come within {limits.idle_seconds:g} s.", status=408, code="timeout"
        ) from None
    if size > limits.body_bytes:
        raise Refusal(
            f"The body has more than {limits.body_bytes:,} bytes, the most that this server reads.",
            status=413,
            code="body_too_large",
        )
    return b"".join(parts)


def _check_access(request: Request, api_key: str | None, names: set[str]) -> None:
    if api_key is not None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode(), api_key.encode()):
            raise Refusal(
                "The API key is missing or wrong; send the header Authorization: Bearer KEY.",
                status=401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return
    try:
        name = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        name = ""
    if name not in names:
        raise Refusal(
            f"This server is not called {name!r:.60}; ask it by the address that it listens at, or start it"
            " with --api-key.",
            status=403,
        )


def _json(content: Any) -> Response:
    return Response(to_bytes(content), media_type="application/json")


def _refusal(refusal: Refusal) -> Response:
    return Response(refusal.body, refusal.status, refusal.headers, "application/json")


async def _refused(request: Request, error: Any) -> Response:
    del request
    return _refusal(error)


async def _no_such_page(request: Request, error: Any) -> Response:
    there = "POST /v1/chat/completions, POST /v1/completions, GET /v1/models and GET /health"
    message = f"There is no {request.method} {request.url.path[:100]} here, but {there}."
    return _refusal(Refusal(message, status=error.status_code, headers=error.headers))


async def _nobody_there(request: Request, error: Any) -> Response:
    del request, error
    return Response(status_code=499)


async def _failed(request: Request, error: Any) -> Response:
    del request, error
    message = "The server failed; its log says why."
    return _refusal(Refusal(message, status=500, type="server_error"))
