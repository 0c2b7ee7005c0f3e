"""The handshake with which two ranks prove to each other that they belong to the same engine.

Any process that reaches the host can connect to a port. Therefore both ends first prove that they know the secret of
the engine, which is part of the address of the rendezvous and is never sent over these connections. The proofs also
cover the two addresses of the connection, so that a third process cannot pass the handshake on to another connection.
The handshake leaves each end with the keys that seal every message after it (`Seals`).
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import time

from .seal import Seal, Seals

__all__ = ["answer", "call", "new_secret"]

_NONCE_BYTES, _PROOF_BYTES = 16, 32
HANDSHAKE_TIMEOUT_S = 10.0
"""Most seconds that a caller may take for its side of the handshake, so that it does not keep out the next one."""


def new_secret() -> str:
    """Returns a new random secret as hexadecimal digits."""
    return secrets.token_hex(16)


def call(connection: socket.socket, secret: str, timeout_s: float) -> Seals:
    """Runs the caller's side of the handshake: each end proves by an HMAC of random numbers that it has the secret.

    Args:
        connection: The connection to a listener.
        secret: The secret of the engine.
        timeout_s: Most seconds that the listener may take until it answers.

    Returns:
        The seals of the messages that follow.

    Raises:
        OSError: The other end does not know the secret, has not answered in time, or has gone.
    """
    deadline = time.monotonic() + timeout_s
    ours = os.urandom(_NONCE_BYTES)
    theirs = _read(connection, _NONCE_BYTES, deadline)
    session = _derive(secret.encode(), theirs + ours + _name(connection.getsockname(), connection.getpeername()))
    connection.sendall(ours + _derive(session, b"proof of the caller"))
    _check(_read(connection, _PROOF_BYTES, deadline), _derive(session, b"proof of the listener"))
    return Seals(Seal(_derive(session, b"caller")), Seal(_derive(session, b"listener")))


def answer(connection: socket.socket, secret: str) -> Seals:
    """Runs the listener's side of the handshake, which may take `HANDSHAKE_TIMEOUT_S`; see `call`.

    Raises:
        OSError: The other end does not know the secret, has not answered in time, or has gone.
    """
    deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
    ours = os.urandom(_NONCE_BYTES)
    connection.sendall(ours)
    theirs = _read(connection, _NONCE_BYTES, deadline)
    session = _derive(secret.encode(), ours + theirs + _name(connection.getpeername(), connection.getsockname()))
    _check(_read(connection, _PROOF_BYTES, deadline), _derive(session, b"proof of the caller"))
    connection.sendall(_derive(session, b"proof of the listener"))
    return Seals(Seal(_derive(session, b"listener")), Seal(_derive(session, b"caller")))


def _name(caller: tuple[str, int], listener: tuple[str, int]) -> bytes:
    """Returns the bytes that stand for a connection: the address of its caller and that of its listener."""
    return repr((caller[:2], listener[:2])).encode()


def _derive(key: bytes, purpose: bytes) -> bytes:
    return hmac.digest(key, purpose, "sha256")


def _check(proof: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(proof, expected):
        raise ConnectionError("the other end is not of this engine, or a process between the two relays the connection")


def _read(connection: socket.socket, size: int, deadline: float) -> bytes:
    """Returns the next `size` bytes.

    Raises:
        OSError: They have not come by the deadline, in seconds of `time.monotonic`.
    """
    received = b""
    while len(received) < size:
        connection.settimeout(max(1e-3, deadline - time.monotonic()))
        part = connection.recv(size - len(received))
        if not part:
            raise ConnectionError("the other end has closed the connection")
        received += part
    return received
