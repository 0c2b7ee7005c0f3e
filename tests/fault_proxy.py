"""An HTTP proxy that breaks some of the answers, chosen by a seed."""

from __future__ import annotations

import collections
import contextlib
import http.client
import random
import socket
import struct
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

REFUSED = b"<Error><Code>InvalidAccessKeyId</Code><Message>The key you provided does not exist.</Message></Error>"
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
FAULTS = ("503", "reset", "lost answer", "stall", "truncate", "shorten")
"""The kinds of faults: the status 503; a reset before the request is passed on; a reset after it, so that the request
was carried out without an answer; an answer that never ends; an answer that ends before its stated length; an answer
whose
stated length is too small."""


@dataclass(frozen=True)
class FaultPlan:
    """The choice of the requests that fail, and of their faults.

    Attributes:
        seed: Seed of the choice.
        rate: Share of the requests that fail.
        faults: Kinds of faults, which are equally frequent.
    """

    seed: int = 0
    rate: float = 0.25
    faults: tuple[str, ...] = FAULTS

    def fault(self, number: int) -> str | None:
        """Returns the fault of the request with this number; None if it does not fail."""
        draw = random.Random(f"{self.seed}/{number}")
        return draw.choice(self.faults) if draw.random() < self.rate else None


class FaultProxy:
    """A proxy in front of a server, used as a context manager.

    Args:
        host: Host of the server.
        port: Port of the server.
        plan: The faults.
    """

    def __init__(self, host: str, port: int, plan: FaultPlan) -> None:
        self.upstream = (host, port)
        self.plan = plan
        self.counts: collections.Counter[str] = collections.Counter()
        self.closed = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        """The URL to which its clients send requests."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def next_fault(self) -> str | None:
        """Counts a request and returns its fault."""
        with self._lock:
            fault = self.plan.fault(self.counts.total())
            self.counts[fault or "none"] += 1
            return fault

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # The client has closed the connection.
            super().handle()

    def _handle(self) -> None:
        body = self._read_body()
        fault = self.proxy.next_fault()
        if fault in ("403", "503"):
            content = REFUSED if fault == "403" else SLOW_DOWN
            self._answer(int(fault), {"Content-Type": "application/xml"}, content, len(content))
            return
        if fault == "reset":
            self._reset()
            return
        status, headers, content, length = self._forward(body)
        if fault == "lost answer":
            self._reset()
        elif fault in ("stall", "truncate") and content:
            self._answer(status, headers, content[: len(content) // 2], length)
            self.wfile.flush()
            if fault == "stall":
                self._wait_for_client()
            self.close_connection = True
        elif fault == "shorten" and status == 206:
            half = len(content) // 2
            self._answer(status, headers, content[:half], half)
        else:
            self._answer(status, headers, content, length)

    def _read_body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_expect_100(self) -> bool:
        """Sends nothing yet: `_read_body` sends the status 100."""
        return True

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes, int]:
        upstream = http.client.HTTPConnection(*self.proxy.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("expect", "connection")}
        try:
            upstream.request(self.command, self.path, body or None, headers)
            answer = upstream.getresponse()
            content = answer.read()
        finally:
            upstream.close()
        dropped = ("content-length", "connection", "transfer-encoding", "date", "server")
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in dropped}
        return answer.status, kept, content, int(answer.headers.get("Content-Length", len(content)))

    def _answer(self, status: int, headers: dict[str, str], content: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":  # A client would read a body after it as the beginning of the next answer.
            self.wfile.write(content)

    def _reset(self) -> None:
        """Ends the connection with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        raise ConnectionResetError

    def _wait_for_client(self) -> None:
        """Sends nothing more until the client gives up."""
        self.connection.settimeout(0.2)
        while not self.proxy.closed.is_set():
            try:
                if not self.connection.recv(1024):
                    return
            except TimeoutError:
                continue

    def log_message(self, format: str, *args: Any) -> None:
        """Writes no log."""


for verb in ("GET", "PUT", "POST", "HEAD", "DELETE"):
    setattr(_Handler, f"do_{verb}", _Handler._handle)
