"""The HTTP side (starlette): routes, keys, bodies, and clients that leave."""

from __future__ import annotations

import asyncio
import concurrent.futures
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jaxsp.errors import Damaged, UserError
from jaxsp.files import parse_json
from jaxsp.serve import page
from jaxsp.serve.address import LOOPBACK
from jaxsp.serve.brackets import DOCUMENT, Bracket, Brackets
from jaxsp.serve.exchange import Exchange, Limits, took_too_long
from jaxsp.serve.fallback import Fallback
from jaxsp.serve.refusal import Refusal
from jaxsp.serve.replies import to_bytes
from jaxsp.serve.scheduler import Scheduler
from jaxsp.serve.schema import Wish, read_chat, read_completion
from jaxsp.serve.served import Served, Shelf
from jaxsp.terminal import say_once

_T = TypeVar("_T")
CONTEXT_HEADER = "x-jaxsp-context"
"""Header of an answer that says what it was read after: ``sigma``, ``full`` (the document) or ``none``."""

_PLAIN = {"x-content-type-options": "nosniff", "cache-control": "no-store"}


def make_app(
    shelf: Shelf,
    scheduler: Scheduler,
    brackets: Brackets,
    limits: Limits,
    *,
    api_key: str | None,
    host: str,
    fallback: Fallback | None = None,
) -> Starlette:
    """The application.

    Args:
      shelf: the prompts.
      scheduler: answers the requests.
      brackets: what the prompts are compared with.
      limits: of a request.
      api_key: that requests must carry; ``None``: none, and they must come by the name ``host`` or one of
        this machine's own, so that no web page reaches the server by a name of its own (DNS rebinding).
      host: address that the server listens at.
      fallback: which answers of σ are not given, but the document's; ``None``: all are given.
    """
    service = _Service(shelf, scheduler, brackets, limits, fallback)
    names = {*LOOPBACK, host.lower()}

    def guarded(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Any]:
        async def checked(request: Request) -> Response:
            _check_access(request, api_key, names)
            return await answer(request)

        return checked

    return Starlette(
        routes=[
            Route("/", service.page),
            Route("/page/prompts", guarded(service.prompts)),
            Route("/page/prompts/{name:path}", guarded(service.document)),
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


class _Asked(NamedTuple):
    """A request that is ready for the batch which answers it."""

    wish: Wish
    served: Served
    ids: list[int]
    scheduler: Scheduler


class _Service:
    """The answers of the routes."""

    def __init__(
        self,
        shelf: Shelf,
        scheduler: Scheduler,
        brackets: Brackets,
        limits: Limits,
        fallback: Fallback | None,
    ) -> None:
        self._shelf, self._scheduler, self._limits = shelf, scheduler, limits
        self._brackets, self._fallback = brackets, fallback
        self._documents: dict[str, Response] = {}
        self._arriving = 0  # requests that are being read or encoded
        # One at a time: a tokenizer's switches are shared.
        self._encoder = concurrent.futures.ThreadPoolExecutor(1, "jaxsp-encoder")

    async def models(self, request: Request) -> Response:
        del request
        return _json({"object": "list", "data": [served.entry for served in self._shelf.values()]})

    async def model(self, request: Request) -> Response:
        return _json(self._meant(request.path_params["name"]).entry)

    async def page(self, request: Request) -> Response:
        del request
        return Response(page.html(), headers=page.headers(), media_type="text/html")

    async def prompts(self, request: Request) -> Response:
        del request
        return _json(page.listed(self._shelf))

    async def document(self, request: Request) -> Response:
        served = self._shelf[request.path_params["name"]]
        if served.name not in self._documents:  # it takes a while where it is long
            self._documents[served.name] = _json(await asyncio.to_thread(page.document, served))
        return self._documents[served.name]

    async def health(self, request: Request) -> Response:
        del request
        return _json({"status": "ok", "requests": self._scheduler.count + self._brackets.count})

    async def chat(self, request: Request) -> Response:
        return await self._answered(request, read_chat)

    async def completion(self, request: Request) -> Response:
        return await self._answered(request, read_completion)

    async def _answered(self, request: Request, read: Callable[[dict[str, Any]], Wish]) -> Response:
        self._scheduler.check_room(self._arriving)
        self._arriving += 1
        try:
            asked = await self._ready(request, read)
        finally:
            self._arriving -= 1
        least, name = None, f"{asked.served.name}:{DOCUMENT}"
        if self._fallback is not None and self._brackets.find(name) is not None:
            least = self._fallback.least(asked.served, asked.wish, len(asked.ids))
        exchange = Exchange(*_parts(asked), self._limits, least=least)
        if least is not None:
            exchange = await self._judged(request, asked, exchange)
        if asked.wish.stream:
            return _Events(exchange)
        try:
            content = await _while_there(request.receive, exchange.whole())
            return _json(content, {CONTEXT_HEADER: exchange.context})
        finally:
            exchange.close()

    async def _judged(self, request: Request, asked: _Asked, exchange: Exchange) -> Exchange:
        """The exchange, whose answer is there, if σ is sure of it; or else another after the document."""
        try:
            if await _while_there(request.receive, exchange.is_sure()):
                return exchange
        finally:
            exchange.close()  # it has ended, or is not needed
        bracket = self._brackets.find(f"{asked.served.name}:{DOCUMENT}")
        assert bracket is not None  # or it would not be judged
        served, scheduler = await self._brackets.open(bracket, self._encoder)
        asked = asked._replace(served=served, scheduler=scheduler)
        return Exchange(*_parts(asked), self._limits, instead_of=exchange)

    def _meant(self, name: str) -> Served | Bracket:
        """The model of a name.

        Raises:
          Refusal: there is none.
        """
        meant = self._brackets.find(name) or self._shelf[name]
        served = meant.unread if isinstance(meant, Bracket) else meant
        if served.changed:
            say_once(
                f"{served.folder} holds another soft prompt than when this server started; it goes on with"
                " the one that it has read. Start it again for the new one."
            )
        return meant

    async def _ready(self, request: Request, read: Callable[[dict[str, Any]], Wish]) -> _Asked:
        """A request, the model that it is for, and its tokens behind what that has read."""
        try:
            wish = read(parse_json(await _body(request, self._limits), "The body"))
        except Damaged as error:
            raise Refusal(str(error), code="invalid_json") from None
        meant = self._meant(wish.model)
        served = meant.unread if isinstance(meant, Bracket) else meant
        loop, seconds = asyncio.get_running_loop(), self._limits.seconds
        try:
            async with asyncio.timeout(seconds):
                encode = served.request_ids, wish, self._limits.query_tokens
                encoding = loop.run_in_executor(self._encoder, *encode)
                ids = await _while_there(request.receive, encoding)
        except TimeoutError:
            raise took_too_long(seconds) from None
        except UserError as error:
            raise Refusal(str(error), param="prompt" if wish.messages is None else "messages") from None
        if not isinstance(meant, Bracket):
            return _Asked(wish, served, ids, self._scheduler)
        served, scheduler = await self._brackets.open(meant, self._encoder)
        return _Asked(wish, served, ids, scheduler)


def _parts(asked: _Asked) -> tuple[Scheduler, Served, Wish, list[int]]:
    return asked.scheduler, asked.served, asked.wish, asked.ids


class _Events(StreamingResponse):
    """The server-sent events of an exchange, whose client may leave."""

    def __init__(self, exchange: Exchange) -> None:
        headers = {"cache-control": "no-cache", CONTEXT_HEADER: exchange.context}
        super().__init__(exchange.events(), media_type="text/event-stream", headers=headers)
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.close()


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


def _json(content: Any, more: Mapping[str, str] = {}) -> Response:
    return Response(to_bytes(content), headers={**_PLAIN, **more}, media_type="application/json")


def _refusal(refusal: Refusal) -> Response:
    return Response(refusal.body, refusal.status, {**_PLAIN, **refusal.headers}, "application/json")


async def _refused(request: Request, error: Any) -> Response:
    del request
    return _refusal(error)


async def _no_such_page(request: Request, error: Any) -> Response:
    there = "POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /health and the page at /"
    message = f"There is no {request.method} {request.url.path[:100]} here, but {there}."
    return _refusal(Refusal(message, status=error.status_code, headers=error.headers))


async def _nobody_there(request: Request, error: Any) -> Response:
    del request, error
    return Response(status_code=499)


async def _failed(request: Request, error: Any) -> Response:
    del request, error
    message = "The server failed; its log says why."
    return _refusal(Refusal(message, status=500, type="server_error"))
