"""How the ranks of an engine find each other: one address, and from it all connections between them.

Rank 0 opens a store at a free port; everybody else needs its address and nothing more. Process groups are made by hand
and belong to the engine: torch.distributed's default group is one per process, and would be shared with whoever else
uses it.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Self

import torch
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from ..errors import EngineDeadError
from .channel import Channel, Listener, connect
from .collectives import Collectives, GroupCollectives
from .context import ParallelContext, StageLink
from .handshake import new_secret
from .process_groups import GroupLink, make_group
from .shared_memory import SharedCollectives, SharedRegion, can_share_memory
from .stage_link import ChannelLink
from .star import Star

__all__ = ["Rendezvous", "Team", "join"]

JOIN_TIMEOUT_S = 300.0
"""How long the ranks wait for each other at the start: imports and GPUs take their time."""

_LOOK_S = 0.2
"""How often it is checked meanwhile that those who are to come can still come."""


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks of one engine meet.

    Attributes:
        address: IP, port and secret, as in `10.0.0.1:29500#0a1b...`. Who has it can join, so it is told to ranks alone.
        store: Of torch.distributed. Not secret, and not trusted with more than where listeners are.
    """

    address: str
    store: Store

    @classmethod
    def open(cls, ip: str = "127.0.0.1") -> Self:
        """Opens a store at a free port. For rank 0.

        Args:
            ip: Of this host, as the other ranks reach it.
        """
        store = TCPStore(ip, 0, is_master=True, wait_for_workers=False, timeout=_timeout())
        return cls(f"{ip}:{store.port}#{new_secret()}", store)

    @classmethod
    def at(cls, address: str) -> Self:
        """Finds a store that rank 0 has opened.

        Raises:
            EngineDeadError: There is none.
        """
        ip, port = split_address(address.partition("#")[0])
        try:
            store = TCPStore(ip, port, is_master=False, wait_for_workers=False, timeout=_timeout())
        except RuntimeError as error:
            raise EngineDeadError(f"rank 0 does not answer at {ip}:{port}: {error}") from error
        return cls(address, store)

    @property
    def ip(self) -> str:
        """IP of rank 0."""
        return split_address(self.address.partition("#")[0])[0]

    @property
    def secret(self) -> str:
        """What the ranks of this engine know each other by."""
        return self.address.partition("#")[2]


@dataclass(frozen=True, slots=True)
class Team:
    """The ranks of an engine, joined.

    Attributes:
        parallel: This rank, with the means to compute together.
        channels: To the other ranks: rank 0 has one to each, in order; the others have one to rank 0.
        num_on_host: Ranks on this host, which share its cores and its memory.
    """

    parallel: ParallelContext
    channels: list[Channel]
    num_on_host: int

    def check(self) -> None:
        """Checks that the ranks this one hears of are alive.

        Raises:
            EngineDeadError: One is not.
        """
        check_alive(self.channels)

    def receive_from(self, channel: Channel) -> Any:
        """Waits for an object from one rank; if it waits for another that has ended, that is noticed here.

        Raises:
            EngineDeadError: A rank has ended.
        """
        while not channel.has_message(_LOOK_S):
            self.check()
        return channel.receive_object()

    def close(self) -> None:
        """Closes the connections, by which the other ranks know that it is over."""
        for channel in self.channels:
            channel.close()
        if self.parallel.stages is not None:
            self.parallel.stages.close()


def check_alive(channels: list[Channel]) -> None:
    """Raises the error of the first channel whose other end is closed."""
    for channel in channels:
        if channel.is_closed():
            raise channel.dead()


def join(
    rendezvous: Rendezvous,
    place: ParallelContext,
    device: torch.device,
    check: Callable[[], None] = lambda: None,
) -> Team:
    """Connects a rank with all others; returns when all have joined.

    Args:
        rendezvous: Where to.
        place: Which rank this is.
        device: Where it computes.
        check: Raises if some rank can no longer come; called now and then while rank 0 waits.

    Raises:
        EngineDeadError: A rank did not come.
    """
    channels = _meet(rendezvous, place, check)
    world, ip = Star(channels, place.rank), _own_ip(rendezvous.ip)
    num_on_host = _count_on_host(rendezvous.store, place)

    def group(name: str, rank: int, size: int) -> Any:
        return make_group(PrefixStore(name, rendezvous.store), rank, size, device.type, ip)

    tensor: Collectives | None = None
    if place.tp_size > 1:
        name = f"stage{place.pp_rank}"
        tensor = _share_memory(PrefixStore(name, rendezvous.store), world, place, device, channels)
        tensor = tensor or GroupCollectives(group(name, place.tp_rank, place.tp_size), place.tp_size)
    stages: StageLink | None = None
    if place.pp_size > 1 and device.type == "cpu":
        stages = _link_stages(rendezvous, place, ip)
    elif place.pp_size > 1:
        stages = GroupLink(group(f"lane{place.tp_rank}", place.pp_rank, place.pp_size), place.pp_rank)
    return Team(replace(place, tensor=tensor, stages=stages, world=world), channels, num_on_host)


def _meet(rendezvous: Rendezvous, place: ParallelContext, check: Callable[[], None]) -> list[Channel]:
    """Opens the channels between rank 0 and each of the others."""
    if place.rank:
        place_of_0 = split_address(rendezvous.store.get("channels").decode())
        channel = connect(*place_of_0, rendezvous.secret, "rank 0", JOIN_TIMEOUT_S)
        channel.send_object(place.rank)
        return [channel]
    listener = Listener(rendezvous.ip, rendezvous.secret)
    rendezvous.store.set("channels", "{}:{}".format(*listener.address))
    found: dict[int, Channel] = {}
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while len(found) < place.num_ranks - 1:
        check()
        connection = listener.accept(_LOOK_S)
        if connection is not None:
            channel = Channel(connection, "a rank")
            rank = channel.receive_object()
            channel.peer = f"rank {rank}"
            found[rank] = channel
        elif time.monotonic() > deadline:
            raise EngineDeadError(
                f"{len(found) + 1} of {place.num_ranks} ranks came to {rendezvous.ip} within {JOIN_TIMEOUT_S} s; "
                "start the others at the same time, and see that they reach this address"
            )
    listener.close()
    return [found[rank] for rank in sorted(found)]


def _link_stages(rendezvous: Rendezvous, place: ParallelContext, ip: str) -> ChannelLink:
    """Connects a rank with those of its place in the stage before and the next."""
    store, secret = rendezvous.store, rendezvous.secret
    listener = None
    if not place.is_first_stage:
        listener = Listener(ip, secret)
        store.set(f"lane{place.rank}", "{}:{}".format(*listener.address))
    to_next = from_previous = None
    if not place.is_last_stage:
        rank = place.rank + place.tp_size
        address = split_address(store.get(f"lane{rank}").decode())
        to_next = connect(*address, secret, f"rank {rank}", JOIN_TIMEOUT_S)
    if listener is not None:
        from_previous = _await_call(listener, f"rank {place.rank - place.tp_size}")
    return ChannelLink(to_next, from_previous)


def _await_call(listener: Listener, peer: str) -> Channel:
    """Waits for a rank to call."""
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while (connection := listener.accept(_LOOK_S)) is None:
        if time.monotonic() > deadline:
            raise EngineDeadError(f"{peer} did not call within {JOIN_TIMEOUT_S} s")
    listener.close()
    return Channel(connection, peer)


def split_address(address: str) -> tuple[str, int]:
    """Splits `ip:port`."""
    ip, _, port = address.rpartition(":")
    return ip, int(port)


def _count_on_host(store: Store, place: ParallelContext) -> int:
    store.set(f"host{place.rank}", socket.gethostname())
    hosts = [store.get(f"host{rank}").decode() for rank in range(place.num_ranks)]
    return hosts.count(socket.gethostname())


def _share_memory(
    store: Store, world: Star, place: ParallelContext, device: torch.device, channels: list[Channel]
) -> SharedCollectives | None:
    """Sets up collectives in shared memory if all ranks of all stages can: they are on CPUs, each stage on one host."""
    num_bytes = SharedCollectives.num_bytes(place.tp_size)
    region = None
    if device.type == "cpu" and can_share_memory():
        region = _open_region(store, place.tp_rank, num_bytes)
    elif place.tp_rank == 0:
        store.set("region", "")
    all_have_it = world.smallest(int(region is not None))
    if region is None:
        return None
    if place.tp_rank == 0:  # All that could open it have.
        region.unlink()
    if not all_have_it:
        return None
    return SharedCollectives(region, place.tp_rank, place.tp_size, lambda: check_alive(channels))


def _open_region(store: Store, tp_rank: int, num_bytes: int) -> SharedRegion | None:
    """Makes the region, or opens it; None if there is no room for it, or it is on another host."""
    try:
        if tp_rank == 0:
            name = ""
            try:
                name = SharedRegion.create(num_bytes)
            finally:
                store.set("region", name)
        name = store.get("region").decode()
        return SharedRegion(name, num_bytes) if name else None
    except OSError:
        return None


def _own_ip(other: str) -> str:
    """Returns the IP that this host has on the way to another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 1))
        return str(probe.getsockname()[0])


def _timeout() -> timedelta:
    return timedelta(seconds=JOIN_TIMEOUT_S)
