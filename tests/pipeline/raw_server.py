"""A server on loopback that answers with the bytes it is told, whatever they are, or with what it was sent."""

from __future__ import annotations

import socketserver
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class RawServer(socketserver.ThreadingTCPServer):
    """A server whose next answers are in `script`: bytes to send, and seconds to wait. Without one it echoes."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    script: Sequence[bytes | float] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/ask"


class _Handler(socketserver.StreamRequestHandler):
    server: RawServer

    def handle(self) -> None:
        try:
            while line := self.rfile.readline():
                self.answer(line)
        except OSError:
            pass  # The client has hung up.

    def answer(self, line: bytes) -> None:
        size = 0
        while (header := self.rfile.readline()).strip():
            name, _, value = header.partition(b":")
            size = int(value) if name.lower() == b"content-length" else size
        body = self.rfile.read(size)
        if self.server.script is None:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            return
        for step in self.server.script:
            if isinstance(step, bytes):
                self.wfile.write(step)
            else:
                time.sleep(step)
        self.connection.shutdown(2)


@contextmanager
def running_raw() -> Iterator[RawServer]:
    """Runs a server beside a block, on a port of its own."""
    with RawServer(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()
