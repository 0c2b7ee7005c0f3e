"""How two ranks make sure of each other before they talk: what they then send each other is trusted.

Channels carry pickled objects, and a port is open to whoever reaches the host. So both ends first show that they know
the engine's secret, which travels with the rendezvous' address and never over these connections.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["answer", "call", "new_secret"]

_NONCE_BYTES, _PROOF_BYTES = 16, 32
HANDSHAKE_TIMEOUT_S = 10.0
"""How long the other end may take for its part."""


def new_secret() -> str:
    """Returns a secret that is a word of hexadecimal digits."""
    return secrets.token_hex(16)


def call(connection: socket.socket, secret: str) -> None:
    """Does the part of who has called.

    Raises:
        OSError: The other end does not know the secret, or has gone.
    """
    with _limited(connection):
        ours = os.urandom(_NONCE_BYTES)
        theirs = _read(connection, _NONCE_BYTES)
        connection.sendall(_prove(secret, b"call", theirs) + ours)
        _check(_read(connection, _PROOF_BYTES), _prove(secret, b"answer", ours))


def answer(connection: socket.socket, secret: str) -> None:
    """Does the part of who was called.

    Raises:
        OSError: The other end does not know the secret, or has gone.
    """
    with _limited(connection):
        ours = os.urandom(_NONCE_BYTES)
        connection.sendall(ours)
        proof = _read(connection, _PROOF_BYTES)
        theirs = _read(connection, _NONCE_BYTES)
        _check(proof, _prove(secret, b"call", ours))
        connection.sendall(_prove(secret, b"answer", theirs))


@contextmanager
def _limited(connection: socket.socket) -> Iterator[None]:
    """Limits how long the other end may take, for the time of a block."""
    before = connection.gettimeout()
    connection.settimeout(HANDSHAKE_TIMEOUT_S)
    try:
        yield
    finally:
        connection.settimeout(before)


def _prove(secret: str, role: bytes, nonce: bytes) -> bytes:
    return hmac.digest(secret.encode(), role + nonce, "sha256")


def _check(proof: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(proof, expected):
        raise ConnectionError("the other end is not of this engine")


def _read(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise ConnectionError("the other end has closed the connection")
        received += part
    return received
