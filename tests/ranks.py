"""Two ends of a connection between ranks, in one process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from millrace.engine.parallel.channel import Channel, Listener, connect
from millrace.engine.parallel.handshake import new_secret


def connected_channels() -> tuple[Channel, Channel]:
    """Returns the channel of rank 1, which has called, and the channel of rank 0, which has answered."""
    listener = Listener("127.0.0.1", secret := new_secret())
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(listener.accept, 10, "rank 1")
        near = connect(*listener.address, secret, "rank 0", 10)
        far = accepted.result()
    listener.close()
    assert far is not None
    return near, far
