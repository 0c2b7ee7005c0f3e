"""`Channel`: a TCP connection between two ranks that carries step plans one way and results the other.

The ranks may be on one host or on several. When a process ends in any way, the kernel closes its connections, so the
rank at the other end notices the death at once and needs no timeout.
"""

from __future__ import annotations

import logging
import pickle
import select
import socket
import struct
import time
from typing import Any

from ..errors import EngineDeadError
from .handshake import answer, call

__all__ = ["Channel", "Listener", "connect"]

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<Q")
_CLOSED = select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
"""A host that vanishes does not close its connections, so it counts as gone after 25 seconds of silence."""


class Channel:
    """One end of a TCP connection between two ranks; sends and receives messages, pickled objects and raw bytes.

    Args:
        connection: The socket, which the channel owns.
        peer: Name of the other rank in error messages.
    """

    def __init__(self, connection: socket.socket, peer: str) -> None:
        connection.setblocking(True)
        # A second plan may follow before the first is acknowledged, and must not wait for that.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, seconds)
        self._connection = connection
        self._closing = select.poll()
        self._closing.register(connection, select.POLLRDHUP)
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)
        self.peer = peer

    def send(self, message: bytes) -> None:
        """Sends a message.

        Raises:
            EngineDeadError: The other end is closed.
        """
        try:
            self._connection.sendall(_HEADER.pack(len(message)) + message)
        except OSError as error:
            raise self.dead() from error

    def send_bytes_of(self, memory: memoryview) -> None:
        """Sends the bytes of `memory` without a header; the other end must know their number (`receive_bytes_into`).

        Raises:
            EngineDeadError: The other end is closed.
        """
        try:
            self._connection.sendall(memory)
        except OSError as error:
            raise self.dead() from error

    def receive_bytes_into(self, memory: memoryview) -> None:
        """Receives bytes into `memory` until it is full.

        Raises:
            EngineDeadError: The other end is closed.
        """
        while memory:
            try:
                received = self._connection.recv_into(memory)
            except OSError as error:
                raise self.dead() from error
            if not received:
                raise self.dead()
            memory = memory[received:]

    def receive(self) -> bytes:
        """Waits for a message and returns it.

        Raises:
            EngineDeadError: The other end is closed.
        """
        (size,) = _HEADER.unpack(self._read(_HEADER.size))
        return self._read(size)

    def send_object(self, value: Any) -> None:
        """Sends a small object, pickled; only processes of the same engine are connected."""
        self.send(pickle.dumps(value, protocol=5))

    def receive_object(self) -> Any:
        """Waits for an object that the other end sent with `send_object`, and returns it."""
        return pickle.loads(self.receive())

    def spin(self, timeout_s: float) -> bool:
        """Polls for a message without sleeping, because waking up takes longer than the message.

        Returns:
            Whether a message or the end of the connection can be received.

        Raises:
            EngineDeadError: The connection is broken.
        """
        until = time.perf_counter() + timeout_s
        while time.perf_counter() < until:
            try:
                self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                return True
            except BlockingIOError:
                continue
            except OSError as error:
                raise self.dead() from error
        return False

    def has_message(self, timeout_s: float) -> bool:
        """Returns whether a message or the end of the connection can be received within `timeout_s` seconds."""
        return bool(self._readable.poll(timeout_s * 1e3))

    def is_closed(self) -> bool:
        """Returns whether the other end is closed; messages that it sent earlier can still be received."""
        return any(event & _CLOSED for _, event in self._closing.poll(0))

    def dead(self) -> EngineDeadError:
        """Returns the error that says that the rank at the other end has ended."""
        return EngineDeadError(
            f"{self.peer} of this engine has ended, and no rank can go on without it; its own output says why. "
            "Construct another engine"
        )

    def close(self) -> None:
        """Closes this end."""
        self._connection.close()

    def _read(self, size: int) -> bytes:
        received = bytearray(size)
        self.receive_bytes_into(memoryview(received))
        return bytes(received)


class Listener:
    """A listening socket, to which other ranks of the engine connect.

    Args:
        ip: Address of this host for the other ranks.
        secret: Secret that a rank must know to connect.
    """

    def __init__(self, ip: str, secret: str) -> None:
        self._server = socket.create_server((ip, 0))
        self._secret = secret

    @property
    def address(self) -> tuple[str, int]:
        """IP address and port at which the socket listens."""
        ip, port = self._server.getsockname()[:2]
        return ip, port

    def accept(self, timeout_s: float) -> socket.socket | None:
        """Returns the next connection; None if no process connected in time, or one that does not know the secret."""
        self._server.settimeout(timeout_s)
        try:
            connection = self._server.accept()[0]
        except TimeoutError:
            return None
        try:
            answer(connection, self._secret)
        except OSError as error:
            logger.warning("a call at %s:%d was refused: %s", *self.address, error)
            connection.close()
            return None
        return connection

    def close(self) -> None:
        """Closes the socket, so that no more ranks can connect."""
        self._server.close()


def connect(ip: str, port: int, secret: str, peer: str, timeout_s: float) -> Channel:
    """Connects to a `Listener`, and returns this end of the connection.

    Raises:
        EngineDeadError: The listener does not answer, or does not know the secret.
    """
    try:
        connection = socket.create_connection((ip, port), timeout=timeout_s)
        call(connection, secret)
        return Channel(connection, peer)
    except OSError as error:
        raise EngineDeadError(f"{peer} does not answer at {ip}:{port}: {error}") from error
