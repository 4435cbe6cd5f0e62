"""Many requests at once, slow and vanishing clients, full queues: no answer is lost, mixed up or changed."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from typing import Any

import httpx
import openai
import pytest

from jaxsp.models.generation import Live
from jaxsp.serve.connection import Connection
from jaxsp.serve.served import Served
from tests.serve.running import KINDS, Running, asked, running, until

LONG = {"model": "pump", "max_tokens": 64, "messages": [{"role": "user", "content": "Go on."}]}


async def everyone(service: Running, count: int) -> None:
    """So many at once, over all prompts; every other one is streamed, each third sampled."""
    async with openai.AsyncOpenAI(**service.options) as client:
        create: Any = client.chat.completions.create

        async def ask(i: int) -> tuple[int, str]:
            name, question = list(KINDS)[i % 4], f"What is fact {i % 50:02}?"
            options = {"temperature": 1.0, "seed": i} if i % 3 == 2 else {}
            asking = create(
                model=name, messages=[{"role": "user", "content": question}], max_tokens=4 + i % 13,
                stream=bool(i % 2), **options,
            )  # fmt: skip
            found = await asking
            if i % 2 == 0:
                return i, found.choices[0].message.content
            return i, "".join([chunk.choices[0].delta.content or "" async for chunk in found])

        found = dict(await asyncio.gather(*map(ask, range(count))))
        again = [i for i in range(count) if i % 3 == 2][:12]
        alone = dict([await ask(i) for i in again])
    for i, text in found.items():
        if i % 3 != 2:
            assert text == asked(list(KINDS)[i % 4], f"What is fact {i % 50:02}?", 4 + i % 13), i
    assert alone == {i: found[i] for i in again}


def test_24_at_once_over_4_prompts():
    with running() as service:
        asyncio.run(everyone(service, 24))
        assert service.scheduler.count == 0


@pytest.mark.slow
def test_200_at_once_over_4_prompts():
    with running(queue=256, slots=16) as service:
        asyncio.run(everyone(service, 200))
        assert service.scheduler.count == 0


def request(service: Running, body: dict, receive: int | None = None) -> socket.socket:
    """A connection on which a request has been sent; it holds ``receive`` bytes that nobody has read."""
    content = json.dumps(body).encode()
    connection = socket.socket()
    connection.settimeout(30)
    if receive is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.connect(service.place)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(content)}\r\n"
    connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(slowly, stream):
    """Long before its answer would have ended; and those beside it go on."""
    with running(slots=1) as service:
        connection = request(service, {**LONG, "stream": stream})
        if stream:
            assert b"200 OK" in connection.recv(4096)
        assert until(lambda: service.scheduler._rows)
        (served,) = service.scheduler._rows.values()
        waiting = [request(service, LONG) for _ in range(3)]
        assert until(lambda: service.scheduler.count == 4)
        waiting[1].close()
        start = time.monotonic()
        connection.close()
        assert until(lambda: service.scheduler.count == 2)
        assert until(lambda: served not in service.scheduler._rows.values())
        assert time.monotonic() - start < 1.5  # of 64 tokens' 3.2 seconds
        waiting[0].close()
        waiting[2].close()
        found = service.client.chat.completions.create(**{**LONG, "max_tokens": 4})
        assert found.choices[0].message.content == asked("pump", "Go on.", 4)


MUCH = {**LONG, "stream": True, "logprobs": True, "top_logprobs": 20}
"""Some 100,000 bytes, more than the sockets hold."""


@pytest.fixture
def holds(monkeypatch, request):
    """The server waits for a client as soon as so many bytes are not sent: by default the least."""
    made = Connection.connection_made

    def smaller(self, transport):
        made(self, transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        transport.set_write_buffer_limits(high=getattr(request, "param", 2048))

    monkeypatch.setattr(Connection, "connection_made", smaller)


def waits(service: Running) -> bool:
    """Whether an answer can't be sent, or not its rest: the server waits for the client."""
    return any(
        one.transport.get_write_buffer_size() and (one.flow.write_paused or one.cycle.response_complete)
        for one in service.connections
    )


def test_a_slow_reader_gets_all_and_holds_up_nobody(holds):
    with running() as service:
        slow = request(service, MUCH, receive=2048)
        assert until(lambda: waits(service))
        client = service.client
        got = b""
        for n in range(20):
            got += slow.recv(7)
            found = client.chat.completions.create(**{**LONG, "model": "bike", "max_tokens": 1 + n % 3})
            assert found.choices[0].message.content == asked("bike", "Go on.", 1 + n % 3)
        assert waits(service)
        while b"[DONE]" not in got:
            part = slow.recv(1000)
            assert part
            got += part
        slow.close()
    pieces = [json.loads(line[6:]) for line in got.split(b"\r\n") if line.startswith(b"data: {")]
    text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert text == asked("pump", "Go on.", 64)


def test_a_reader_that_takes_nothing_more_is_given_up(holds):
    """It is there, but its connection ends, and its slot is free."""
    with running(slots=1, idle_seconds=0.4) as service:
        silent = request(service, MUCH, receive=2048)
        assert until(lambda: waits(service))
        assert until(lambda: not service.connections, 5)
        assert until(lambda: service.scheduler.count == 0, 5)
        got = b""
        while part := silent.recv(2**16):
            got += part
        assert b"200 OK" in got
        assert b"[DONE]" not in got  # but what was sent before is there
        silent.close()


@pytest.mark.parametrize("holds", [2048, 2**20], indirect=True)
def test_a_reader_that_takes_nothing_more_does_not_hold_up_the_end(holds):
    """Neither while its answer can't be written, nor when all is written but not sent."""
    with running(idle_seconds=0.4) as service:
        silent = request(service, MUCH, receive=2048)
        assert until(lambda: waits(service))
        start = time.monotonic()
    assert time.monotonic() - start < 5
    silent.close()


def test_a_full_queue_says_when_to_come_again(slowly):
    with running(slots=1, queue=1) as service:
        busy = [request(service, LONG) for _ in range(2)]
        assert until(lambda: service.scheduler.count == 2)
        with pytest.raises(openai.RateLimitError, match="2 requests are waiting or being answered") as full:
            service.client.chat.completions.create(**LONG)
        assert full.value.code == "queue_full"
        assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
        for connection in busy:
            connection.close()
        assert until(lambda: service.scheduler.count == 0)
        found = service.client.chat.completions.create(**{**LONG, "max_tokens": 4})
        assert found.choices[0].message.content == asked("pump", "Go on.", 4)


def test_requests_that_are_still_being_sent_count_too():
    with running(slots=1, queue=1) as service:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n"
        sending = [socket.create_connection(service.place, timeout=30) for _ in range(2)]
        for connection in sending:
            connection.sendall(head + b"content-type: application/json\r\n\r\n{")

        def asking() -> int:
            return httpx.post(f"{service.url}/completions", json={}).status_code

        assert until(lambda: asking() == 429)
        for connection in sending:
            connection.close()
        assert until(lambda: asking() == 400)


@pytest.fixture
def no_encoder(monkeypatch):
    """Nothing is encoded while a test runs."""
    end = threading.Event()

    def waiting(self, wish, limit):
        assert end.wait(60)
        return [5]

    monkeypatch.setattr(Served, "request_ids", waiting)
    yield
    end.set()


def test_the_time_of_a_request_begins_when_it_waits_to_be_encoded(no_encoder):
    with running(seconds=0.4) as service:
        for _ in range(2):  # the first is being encoded, the second waits for it
            with pytest.raises(openai.InternalServerError, match=r"took more than 0\.4 s"):
                service.client.chat.completions.create(**LONG)
        assert httpx.get(f"{service.url}/models").status_code == 200


def test_a_client_that_leaves_while_it_waits_to_be_encoded_is_noticed(no_encoder):
    with running(slots=1, queue=1) as service:
        waiting = [request(service, LONG) for _ in range(2)]

        def asking() -> int:
            return httpx.post(f"{service.url}/completions", json={}).status_code

        assert until(lambda: asking() == 429)
        for connection in waiting:
            connection.close()
        assert until(lambda: asking() == 400)


def test_what_takes_too_long_ends_in_an_error(slowly):
    with running(seconds=0.4) as service:
        with pytest.raises(openai.InternalServerError, match=r"took more than 0\.4 s") as late:
            service.client.chat.completions.create(**LONG)
        assert (late.value.status_code, late.value.code) == (504, "timeout")
        with pytest.raises(openai.APIError, match=r"took more than 0\.4 s"):
            list(service.client.chat.completions.create(**LONG, stream=True))
        assert service.scheduler.count == 0


def test_a_body_that_does_not_come_is_not_waited_for():
    with running(idle_seconds=0.2) as service:
        connection = socket.create_connection(service.place, timeout=30)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n"
        connection.sendall(head + b"content-type: application/json\r\n\r\n{")
        assert b"408 Request Timeout" in connection.recv(4096)
        connection.close()
        half = socket.create_connection(service.place, timeout=30)
        half.sendall(head + b"content-type: application/json\r\n\r\n{")
        half.close()
        assert httpx.get(f"{service.url}/models").status_code == 200


def test_a_failing_device_loses_its_requests_alone(monkeypatch, caplog):
    advance, failures = Live.advance, [True, False]

    def failing(self, steps):
        if self._seen and failures and failures.pop(0):
            raise RuntimeError("the device is gone")
        return advance(self, steps)

    with running() as service:
        monkeypatch.setattr(Live, "advance", failing)
        with pytest.raises(openai.InternalServerError, match="The server failed; its log says why"):
            service.client.chat.completions.create(**LONG)
        assert "the device is gone" in caplog.text
        found = service.client.chat.completions.create(**LONG)
        assert found.choices[0].message.content == asked("pump", "Go on.", 64)


def test_a_server_that_closes_refuses(slowly):
    with running() as service:
        waiting = request(service, LONG)
        assert until(lambda: service.scheduler.count == 1)
        service.scheduler.close()
        assert b"503 Service Unavailable" in waiting.recv(4096)
        waiting.close()
        with pytest.raises(openai.InternalServerError, match="The server is closing"):
            service.client.chat.completions.create(**LONG)
