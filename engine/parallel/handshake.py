"""The handshake with which two ranks prove to each other that they belong to the same engine.

Channels carry pickled objects, and any process that reaches the host can connect to a port. Therefore both ends first
prove that they know the secret of the engine. The secret is part of the address of the rendezvous and is never sent
over these connections.
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
"""Most seconds that the other end may take for its side of the handshake."""


def new_secret() -> str:
    """Returns a new random secret as hexadecimal digits."""
    return secrets.token_hex(16)


def call(connection: socket.socket, secret: str) -> None:
    """Runs the caller's side of the handshake: each end proves by an HMAC of a random number that it has the secret.

    Raises:
        OSError: The other end does not know the secret, or has gone.
    """
    with _limited(connection):
        ours = os.urandom(_NONCE_BYTES)
        theirs = _read(connection, _NONCE_BYTES)
        connection.sendall(_prove(secret, b"call", theirs) + ours)
        _check(_read(connection, _PROOF_BYTES), _prove(secret, b"answer", ours))


def answer(connection: socket.socket, secret: str) -> None:
    """Runs the listener's side of the handshake; see `call`.

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
    """Sets a timeout on a connection for the duration of a `with` block."""
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
