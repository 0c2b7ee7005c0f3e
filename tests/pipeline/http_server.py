"""A real HTTP server on loopback, in a thread of the test: it answers as it was told and remembers what it saw."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Seen:
    """A request that came in.

    Attributes:
        headers: Its headers.
        body: Its body.
        at_s: When, on the server's clock.
    """

    headers: dict[str, str]
    body: bytes
    at_s: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    """What happens on the server.

    Attributes:
        answers: What to answer, one after another; afterwards a payload is read back as `{"echo": payload}`.
        hold: Requests that must be there at once before any is answered.
        seen: The requests so far.
        max_in_flight: The most requests that were there at once.
    """

    answers: list[Callable[[web.Request], Awaitable[web.StreamResponse]]] = field(default_factory=list)
    hold: int = 0
    seen: list[Seen] = field(default_factory=list)
    max_in_flight: int = 0
    url: str = ""
    _in_flight: int = 0
    _gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self._in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            body = await request.read()
            self.seen.append(Seen(dict(request.headers), body, asyncio.get_running_loop().time()))
            if self._in_flight >= self.hold:
                self._gate.set()
            await self._gate.wait()
            if self.answers:
                return await self.answers.pop(0)(request)
            return web.json_response({"echo": json.loads(body)})
        finally:
            self._in_flight -= 1


def status(code: int, text: str = "", **headers: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """An answer with a status."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=code, text=text, headers=headers)

    return answer


async def hang(request: web.Request) -> web.StreamResponse:
    """An answer that does not come."""
    await asyncio.Event().wait()
    raise AssertionError


async def hang_up(request: web.Request) -> web.StreamResponse:
    """No answer, and the connection is gone."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def cut(request: web.Request) -> web.StreamResponse:
    """Half an answer."""
    response = web.StreamResponse(headers={"Content-Length": "100", "Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"half":')
    assert request.transport is not None
    request.transport.close()
    return response


async def endless(request: web.Request) -> web.StreamResponse:
    """An answer that goes on until the client hangs up."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" " * 1000)


async def bomb(request: web.Request) -> web.StreamResponse:
    """A small answer that unpacks to 64 MiB of JSON."""
    body = gzip.compress(b'"' + b"x" * (64 << 20) + b'"', 9)
    return web.Response(body=body, headers={"Content-Encoding": "gzip", "Content-Type": "application/json"})


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Runs the server beside a block, on a port of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", server.handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/ask"
        return runner

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
