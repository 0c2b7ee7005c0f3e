"""A connection between two ranks that carries small messages: step plans one way, results the other.

TCP, on one host or between several. When a process ends, however it ends, the kernel closes its connections: who is at
the other end hears of it at once, and nobody needs a timeout.
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
"""A host that vanishes closes nothing: after 25 silent seconds it counts as gone."""


class Channel:
    """One end of a connection.

    Args:
        connection: The socket; it belongs to the channel.
        peer: Who is at the other end, for messages.
    """

    def __init__(self, connection: socket.socket, peer: str) -> None:
        connection.setblocking(True)
        # Two plans may follow each other before the first is acknowledged; neither is to wait for that.
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
        """Sends memory of a size that the other end knows.

        Raises:
            EngineDeadError: The other end is closed.
        """
        try:
            self._connection.sendall(memory)
        except OSError as error:
            raise self.dead() from error

    def receive_bytes_into(self, memory: memoryview) -> None:
        """Waits until a memory is filled.

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
        """Waits for a message.

        Raises:
            EngineDeadError: The other end is closed.
        """
        (size,) = _HEADER.unpack(self._read(_HEADER.size))
        return self._read(size)

    def send_object(self, value: Any) -> None:
        """Sends a small object, pickled: only processes of one engine talk here."""
        self.send(pickle.dumps(value, protocol=5))

    def receive_object(self) -> Any:
        """Waits for an object."""
        return pickle.loads(self.receive())

    def spin(self, timeout_s: float) -> bool:
        """Looks again and again for a message instead of sleeping: waking up takes longer than the message.

        Returns:
            Whether something is there to be received, be it the end.

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
        """Waits, at most so long, until something is there to be received, be it the end."""
        return bool(self._readable.poll(timeout_s * 1e3))

    def is_closed(self) -> bool:
        """Returns whether the other end is closed; messages sent before may still be received."""
        return any(event & _CLOSED for _, event in self._closing.poll(0))

    def dead(self) -> EngineDeadError:
        """Returns the error of this channel's other end having ended."""
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
    """Where rank 0 is called by the others.

    Args:
        ip: Of this host, as the others reach it.
        secret: What a caller must know.
    """

    def __init__(self, ip: str, secret: str) -> None:
        self._server = socket.create_server((ip, 0))
        self._secret = secret

    @property
    def address(self) -> tuple[str, int]:
        """IP and port."""
        ip, port = self._server.getsockname()[:2]
        return ip, port

    def accept(self, timeout_s: float) -> socket.socket | None:
        """Returns the next connection; None if nobody called in time, or somebody who is not of this engine."""
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
        """Takes no more calls."""
        self._server.close()


def connect(ip: str, port: int, secret: str, peer: str, timeout_s: float) -> Channel:
    """Calls a listener.

    Raises:
        EngineDeadError: It does not answer, or does not know the secret.
    """
    try:
        connection = socket.create_connection((ip, port), timeout=timeout_s)
        call(connection, secret)
        return Channel(connection, peer)
    except OSError as error:
        raise EngineDeadError(f"{peer} does not answer at {ip}:{port}: {error}") from error
