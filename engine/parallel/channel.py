"""`Channel`: a TCP connection between two ranks that carries step plans one way and results the other.

The ranks may be on one host or on several. When a process ends in any way, the kernel closes its connections, so the
rank at the other end notices the death at once and needs no timeout.

Both ends have proved that they know the secret of the engine (`handshake`), and every message has a tag that only they
can make (`Seal`). The first message that does not fit its tag ends the engine, before anything reads the message.
"""

from __future__ import annotations

import logging
import select
import socket
import struct
import time
from typing import Any

from ..errors import EngineDeadError
from .handshake import answer, call
from .seal import TAG_BYTES, Seals
from .wire import Buffer, decode, encode

__all__ = ["Channel", "Listener", "connect"]

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<Q")
_CLOSED = select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
"""A host that vanishes does not close its connections, so it counts as gone after 25 seconds of silence."""


class Channel:
    """One end of a TCP connection between two ranks; sends and receives messages, plain objects and raw bytes.

    Args:
        connection: The socket, which the channel owns.
        peer: Name of the other rank in error messages.
        seals: The seals that the handshake has given this end.
    """

    def __init__(self, connection: socket.socket, peer: str, seals: Seals) -> None:
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
        self._seals = seals
        self.peer = peer

    def send(self, message: bytes) -> None:
        """Sends a message.

        Raises:
            EngineDeadError: The other end is closed.
        """
        header = _HEADER.pack(len(message))
        tags = self._seals.sending.next_tag(header), self._seals.sending.next_tag(message)
        self._send_all(b"".join((header, tags[0], message, tags[1])))

    def send_bytes_of(self, memory: memoryview) -> None:
        """Sends the bytes of `memory` without a header; the other end must know their number (`receive_bytes_into`).

        Raises:
            EngineDeadError: The other end is closed.
        """
        self._send_all(memory)
        self._send_all(self._seals.sending.next_tag(memory))

    def receive_bytes_into(self, memory: memoryview) -> None:
        """Receives bytes into `memory` until it is full.

        Raises:
            EngineDeadError: The other end is closed, or has not sent these bytes.
        """
        self._fill(memory)
        self._check(self._read(TAG_BYTES), memory)

    def receive(self) -> bytearray:
        """Waits for a message and returns it.

        Raises:
            EngineDeadError: The other end is closed, or has not sent this message.
        """
        header = self._read(_HEADER.size)
        self._check(self._read(TAG_BYTES), header)  # So that no memory is reserved for a stranger.
        (size,) = _HEADER.unpack(header)
        message = self._read(size)
        self._check(self._read(TAG_BYTES), message)
        return message

    def send_object(self, value: Any) -> None:
        """Sends a small object, which `encode` of `wire` can put into plain form."""
        self.send(encode(value))

    def receive_object(self) -> Any:
        """Waits for an object that the other end sent with `send_object`, and returns it.

        Raises:
            EngineDeadError: The other end is closed, or has not sent an object; all ranks must run the same release.
        """
        try:
            return decode(self.receive())
        except (ValueError, TypeError) as error:
            raise EngineDeadError(
                f"{self.peer} of this engine has sent a message that is no object: {error}"
            ) from error

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

    def _send_all(self, content: Buffer) -> None:
        try:
            self._connection.sendall(content)
        except OSError as error:
            raise self.dead() from error

    def _check(self, tag: Buffer, message: Buffer) -> None:
        """Raises if the other end has not made `tag` for `message`; every later message then fails too."""
        if not self._seals.receiving.fits(tag, message):
            raise EngineDeadError(
                f"a message that {self.peer} of this engine has not sent came over its connection, so another process "
                "writes to it; nothing of the message was used. Construct another engine, on a network of your own"
            )

    def _read(self, size: int) -> bytearray:
        received = bytearray(size)
        self._fill(memoryview(received))
        return received

    def _fill(self, memory: memoryview) -> None:
        """Receives bytes into `memory` until it is full."""
        while memory:
            try:
                received = self._connection.recv_into(memory)
            except OSError as error:
                raise self.dead() from error
            if not received:
                raise self.dead()
            memory = memory[received:]


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

    def accept(self, timeout_s: float, peer: str = "a rank") -> Channel | None:
        """Returns the next connection; None if no process connected in time, or one that does not know the secret.

        Args:
            timeout_s: Most seconds to wait for a process.
            peer: Name of the other rank in error messages.
        """
        self._server.settimeout(timeout_s)
        try:
            connection = self._server.accept()[0]
        except TimeoutError:
            return None
        try:
            return Channel(connection, peer, answer(connection, self._secret))
        except OSError as error:
            logger.warning("a call at %s:%d was refused: %s", *self.address, error)
            connection.close()
            return None

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
        return Channel(connection, peer, call(connection, secret, timeout_s))
    except OSError as error:
        raise EngineDeadError(f"{peer} does not answer at {ip}:{port}: {error}") from error
