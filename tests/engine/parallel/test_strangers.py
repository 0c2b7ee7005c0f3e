"""A process that does not know the secret of an engine can neither join it nor put a message in."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from millrace.engine.errors import EngineDeadError
from millrace.engine.parallel.channel import Channel, Listener, connect
from millrace.engine.parallel.context import ParallelContext
from millrace.engine.parallel.handshake import new_secret
from millrace.engine.parallel.rendezvous import Rendezvous, join
from millrace.engine.parallel.seal import TAG_BYTES
from ranks import connected_channels

FORGED = "has not sent"


class Bomb:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self._folder),)


@contextmanager
def relay(port: int) -> Iterator[tuple[int, list[socket.socket]]]:
    """Passes on the bytes of one connection to a port, both ways; gives its own port, and the two sockets."""
    sockets: list[socket.socket] = []

    def pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(4096):
                target.sendall(data)
        except OSError:
            pass
        finally:
            target.close()

    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            sockets.extend((server.accept()[0], socket.create_connection(("127.0.0.1", port))))
            threads = [threading.Thread(target=pump, args=pair) for pair in (sockets, sockets[::-1])]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        thread = threading.Thread(target=run)
        thread.start()
        yield server.getsockname()[1], sockets
        thread.join()


def test_a_relayed_handshake_is_refused_at_both_ends(tmp_path: Path) -> None:
    secret = new_secret()
    listener = Listener("127.0.0.1", secret)
    with ThreadPoolExecutor(1) as pool, relay(listener.address[1]) as (port, _):
        accepted = pool.submit(listener.accept, 10)
        with pytest.raises(EngineDeadError, match="does not answer"):
            connect("127.0.0.1", port, secret, "rank 0", 10)
        assert accepted.result() is None
    listener.close()


def test_a_pickle_at_the_rendezvous_is_not_read(tmp_path: Path) -> None:
    rendezvous = Rendezvous.open()
    content = pickle.dumps(Bomb(tmp_path / "ran"))

    def come() -> None:
        with socket.create_connection(rendezvous.place) as stranger:
            stranger.sendall(bytes(48) + struct.pack("<Q", len(content)) + content)
        join(Rendezvous.at(rendezvous.address), ParallelContext.of_rank(1, 1, 2), torch.device("cpu")).close()

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(come)
        join(rendezvous, ParallelContext.of_rank(0, 1, 2), torch.device("cpu")).close()
        coming.result()
    assert not (tmp_path / "ran").exists()


def test_a_listener_is_at_the_address_that_was_asked_and_no_other() -> None:
    rendezvous = Rendezvous.open("127.0.0.1")
    mine = [c for c in psutil.Process().net_connections("tcp") if c.laddr.port == rendezvous.place[1]]
    assert [(c.laddr.ip, c.status) for c in mine] == [("127.0.0.1", "LISTEN")]
    assert rendezvous.secret not in repr(rendezvous)


class Wire:
    """A connection between two ranks and a stranger who can read and write it."""

    def __init__(self) -> None:
        self.near, self.far = connected_channels()

    def write(self, content: bytes) -> None:
        """Puts bytes into what `far` receives."""
        self.near._connection.sendall(content)

    def copy_of(self, message: bytes) -> bytes:
        """Returns the bytes of a message that `near` sends; the message is taken off the connection."""
        self.near.send(message)
        wanted = 8 + TAG_BYTES + len(message) + TAG_BYTES
        return self.far._connection.recv(wanted, socket.MSG_WAITALL)

    def reflect(self, message: bytes) -> bytes:
        """Returns the bytes of a message that `far` sends, taken off the connection."""
        self.far.send(message)
        return self.near._connection.recv(8 + 2 * TAG_BYTES + len(message), socket.MSG_WAITALL)


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.near.close()
    wire.far.close()


def refuse(channel: Channel) -> None:
    with pytest.raises(EngineDeadError, match=FORGED):
        channel.receive_object()


@pytest.mark.parametrize("size", [8, 2**63])
def test_an_injected_message_is_not_read(wire: Wire, tmp_path: Path, size: int) -> None:
    content = pickle.dumps(Bomb(tmp_path / "ran"))
    wire.write(struct.pack("<Q", size) + bytes(TAG_BYTES) + content + bytes(TAG_BYTES))
    refuse(wire.far)
    assert not (tmp_path / "ran").exists()


def test_a_changed_message_is_not_read(wire: Wire) -> None:
    sent = bytearray(wire.copy_of(b"give 1"))
    sent[-TAG_BYTES - 1] ^= 1
    wire.write(bytes(sent))
    refuse(wire.far)


def test_a_repeated_message_is_not_read(wire: Wire) -> None:
    sent = wire.copy_of(b"give 1")
    wire.write(sent)
    assert wire.far.receive() == b"give 1"
    wire.write(sent)
    refuse(wire.far)


def test_a_message_after_one_that_was_left_out_is_not_read(wire: Wire) -> None:
    wire.copy_of(b"first")
    wire.near.send(b"second")
    refuse(wire.far)


def test_a_message_sent_back_is_not_read(wire: Wire) -> None:
    wire.write(wire.reflect(b"give 1"))
    refuse(wire.far)


def test_a_message_of_another_connection_is_not_read(wire: Wire) -> None:
    wire.write(Wire().copy_of(b"give 1"))
    refuse(wire.far)


def test_changed_hidden_states_are_not_used(wire: Wire) -> None:
    wire.write(bytes(16) + bytes(TAG_BYTES))
    with pytest.raises(EngineDeadError, match=FORGED):
        wire.far.receive_bytes_into(memoryview(bytearray(16)))


def test_an_error_that_is_no_plain_object_is_an_error(wire: Wire) -> None:
    wire.near.send(pickle.dumps(3))
    with pytest.raises(EngineDeadError, match="rank 1"):
        wire.far.receive_object()
