"""`Seal`: the authentication of the messages that go one way over a connection between two ranks.

A tag is the HMAC of a message and of its number. The key belongs to one direction of one connection. So a message that
was made up, changed, repeated, left out, sent back or taken from another connection does not fit its tag.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass

from .wire import Buffer

__all__ = ["TAG_BYTES", "Seal", "Seals"]

TAG_BYTES = 32
_NUMBER = struct.Struct("<Q")


class Seal:
    """The key of one direction of a connection, and the number of tags that were made or checked with it.

    Args:
        key: The key, which both ends derive from the secret of the engine.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._num_tags = 0

    def next_tag(self, message: Buffer) -> bytes:
        """Returns the `TAG_BYTES` bytes that authenticate the next message."""
        content = _NUMBER.pack(self._num_tags) + hashlib.sha256(message).digest()
        self._num_tags += 1
        return hmac.digest(self._key, content, "sha256")

    def fits(self, tag: Buffer, message: Buffer) -> bool:
        """Returns whether the other end has made `tag` for `message`, as the next of its messages."""
        return hmac.compare_digest(self.next_tag(message), tag)


@dataclass(frozen=True, slots=True)
class Seals:
    """The seals of the two directions of a connection.

    Attributes:
        sending: Seal of the messages that this end sends.
        receiving: Seal of the messages that it receives.
    """

    sending: Seal
    receiving: Seal
