"""`Rendezvous`: the address with which the ranks of an engine find each other and open all their connections.

Rank 0 listens at a free port, and the other ranks need only its address, which holds the secret of the engine. Whatever
ranks tell each other goes over channels between ranks that have proved to know the secret. The process groups are made
by hand and belong to the engine. The default group of torch.distributed exists once in a process, so the engine would
share it with any other library that uses it.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Self, TypeVar

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
from .symmetric_memory import Registration, SymmetricCollectives, can_map, describe_rank

__all__ = ["Rendezvous", "Team", "join"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

JOIN_TIMEOUT_S = 300.0
"""Most seconds that the ranks wait for each other at the start, where imports and GPU set-up take time."""

_LOOK_S = 0.2
"""Seconds between two checks, during that wait, that the missing ranks are still alive."""


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """The place at which the ranks of one engine find each other.

    Attributes:
        address: IP, port and secret, as in `10.0.0.1:29500#0a1b...`. A process with the address can join the engine, so
            only ranks get it.
        listener: Listener of rank 0 at the address; None in the other ranks.
    """

    address: str = field(repr=False)
    listener: Listener | None = None

    @classmethod
    def open(cls, ip: str = "127.0.0.1") -> Self:
        """Listens at a free port of one address of this host, and at no other; rank 0 calls this.

        Args:
            ip: Address of this host for the other ranks.
        """
        secret = new_secret()
        listener = Listener(ip, secret)
        return cls("{}:{}#{}".format(*listener.address, secret), listener)

    @classmethod
    def at(cls, address: str) -> Self:
        """Returns the rendezvous that rank 0 has opened, for another rank; `join` connects to it."""
        return cls(address)

    @property
    def ip(self) -> str:
        """IP of rank 0."""
        return self.place[0]

    @property
    def place(self) -> tuple[str, int]:
        """IP and port of rank 0."""
        ip, _, port = self.address.partition("#")[0].rpartition(":")
        return ip, int(port)

    @property
    def secret(self) -> str:
        """The secret that the ranks of this engine share."""
        return self.address.partition("#")[2]


@dataclass(frozen=True, slots=True)
class Team:
    """The ranks of an engine, connected with each other.

    Attributes:
        parallel: The context of this rank, with its connections.
        channels: Channels to other ranks: rank 0 has one to each rank in order, the others have one to rank 0.
        num_on_host: Number of ranks on this host, which share its cores and its memory.
    """

    parallel: ParallelContext
    channels: list[Channel]
    num_on_host: int

    def check(self) -> None:
        """Checks that the ranks at the other ends of the channels are alive.

        Raises:
            EngineDeadError: One of these ranks has ended.
        """
        check_alive(self.channels)

    def receive_from(self, channel: Channel) -> Any:
        """Waits for an object from one rank, and notices meanwhile if any other rank has ended.

        Raises:
            EngineDeadError: A rank has ended.
        """
        while not channel.has_message(_LOOK_S):
            self.check()
        return channel.receive_object()

    def close(self) -> None:
        """Closes the connections, which tells the other ranks that the engine has ended."""
        for channel in self.channels:
            channel.close()
        for connections in (self.parallel.tensor, self.parallel.stages):
            if connections is not None:
                connections.close()


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
        rendezvous: The rendezvous of the engine.
        place: Context of this rank, without connections.
        device: Device of this rank.
        check: Raises if a rank that has not joined is dead; it is called periodically while rank 0 waits.

    Raises:
        EngineDeadError: A rank did not join in time, or has ended.
    """
    channels = _meet(rendezvous, place, check)
    world, ip = Star(channels, place.rank), _own_ip(rendezvous.ip)
    num_on_host = world.gather(socket.gethostname()).count(socket.gethostname())
    on_cpu = device.type == "cpu"
    tensor: Collectives | None = None
    if place.tp_size > 1:
        tensor = _share_memory(world, place, on_cpu and can_share_memory(), channels)
    stages: StageLink | None = None
    if place.pp_size > 1 and on_cpu:
        stages = _link_stages(rendezvous, world, place, ip)
    needs_sums, needs_lanes = place.tp_size > 1 and tensor is None, place.pp_size > 1 and stages is None
    if needs_sums or needs_lanes:
        store = _open_store(rendezvous.ip, world, place)

        def group(name: str, rank: int, size: int) -> Any:
            return make_group(PrefixStore(name, store), rank, size, device.type, ip)

        if needs_sums:
            sums = group(f"stage{place.pp_rank}", place.tp_rank, place.tp_size)
            tensor = GroupCollectives(sums, place.tp_size)
            if not on_cpu:
                own_store = PrefixStore(f"memory{place.pp_rank}", store)
                tensor = _map_memory(world, place, tensor, (sums, own_store), device) or tensor
        if needs_lanes:
            stages = GroupLink(group(f"lane{place.tp_rank}", place.pp_rank, place.pp_size), place.pp_rank)
    return Team(replace(place, tensor=tensor, stages=stages, world=world), channels, num_on_host)


def _meet(rendezvous: Rendezvous, place: ParallelContext, check: Callable[[], None]) -> list[Channel]:
    """Returns the channels to all other ranks, in order, on rank 0, and the channel to rank 0 on another rank."""
    if place.rank:
        channel = connect(*rendezvous.place, rendezvous.secret, "rank 0", JOIN_TIMEOUT_S)
        channel.send_object(place.rank)
        return [channel]
    listener = rendezvous.listener
    assert listener is not None, "rank 0 joins the rendezvous that it has opened"
    found: dict[int, Channel] = {}
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while len(found) < place.num_ranks - 1:
        check()
        caller = listener.accept(_LOOK_S)
        if caller is not None:
            rank = caller.receive_object()
            caller.peer = f"rank {rank}"
            found[rank] = caller
        elif time.monotonic() > deadline:
            raise EngineDeadError(
                f"{len(found) + 1} of {place.num_ranks} ranks came to {rendezvous.ip} within {JOIN_TIMEOUT_S} s; "
                "start the others at the same time, and see that they reach this address"
            )
    listener.close()
    return [found[rank] for rank in sorted(found)]


def _link_stages(rendezvous: Rendezvous, world: Star, place: ParallelContext, ip: str) -> ChannelLink:
    """Returns the link between a rank and the ranks of its `tp_rank` in the previous and the next pp stage."""
    listener = None if place.is_first_stage else Listener(ip, rendezvous.secret)
    addresses = world.gather(None if listener is None else listener.address)
    to_next = from_previous = None
    if not place.is_last_stage:
        rank = place.rank + place.tp_size
        next_ip, port = addresses[rank]
        to_next = connect(next_ip, port, rendezvous.secret, f"rank {rank}", JOIN_TIMEOUT_S)
    if listener is not None:
        from_previous = _await_call(listener, f"rank {place.rank - place.tp_size}")
    return ChannelLink(to_next, from_previous)


def _await_call(listener: Listener, peer: str) -> Channel:
    """Waits until the rank `peer` connects, closes the listener and returns the channel to the rank."""
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while (channel := listener.accept(_LOOK_S, peer)) is None:
        if time.monotonic() > deadline:
            raise EngineDeadError(f"{peer} did not call within {JOIN_TIMEOUT_S} s")
    listener.close()
    return channel


def _open_store(ip: str, world: Star, place: ParallelContext) -> Store:
    """Returns the store in which process groups exchange the addresses of their connections; rank 0 has it.

    A store of torch.distributed would listen on all addresses of the host, so it is given a socket that listens on one.
    """
    timeout = timedelta(seconds=JOIN_TIMEOUT_S)
    if place.rank:
        port = world.gather(None)[0]
        return TCPStore(ip, port, is_master=False, wait_for_workers=False, timeout=timeout)
    server = socket.create_server((ip, 0))
    port = server.getsockname()[1]
    store = TCPStore(
        ip, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=server.detach()
    )
    world.gather(port)
    return store


def _share_memory(
    world: Star, place: ParallelContext, can_share: bool, channels: list[Channel]
) -> SharedCollectives | None:
    """Returns collectives in shared memory; None unless all ranks can use them: on CPUs, each pp stage on one host."""
    num_bytes = SharedCollectives.num_bytes(place.tp_size)
    names = world.gather(_make_region(num_bytes) if can_share and place.tp_rank == 0 else "")
    name = names[place.rank - place.tp_rank]
    region = _open_region(name, num_bytes) if can_share and name else None
    all_have_it = world.smallest(int(region is not None))
    if region is None:
        return None
    if place.tp_rank == 0:  # All ranks of the pp stage have tried to open it by now.
        region.unlink()
    if not all_have_it:
        return None
    return SharedCollectives(region, place.tp_rank, place.tp_size, lambda: check_alive(channels))


def _map_memory(
    world: Star, place: ParallelContext, nccl: GroupCollectives, group: tuple[Any, Store], device: torch.device
) -> SymmetricCollectives | None:
    """Returns collectives in symmetric memory; None unless all can use them: each pp stage is on GPUs of one host."""
    registration = _try(lambda: Registration.make(*group, place.tp_rank, place.tp_size))
    ranks = world.gather(registration and _try(lambda: describe_rank(registration, device)))
    stages = (ranks[first : first + place.tp_size] for first in range(0, place.num_ranks, place.tp_size))
    if registration is None or not all(can_map(stage) for stage in stages):
        return None
    found = _try(lambda: SymmetricCollectives.open(nccl, registration, device))
    return found if world.smallest(int(found is not None)) else None


def _try(work: Callable[[], T]) -> T | None:
    """Returns the result of `work`, a part of the set-up of symmetric memory; None, and a warning, if it fails."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001  # The functions of torch that it calls are not public, and may change.
        logger.warning("the GPUs of a host add up through NCCL, because they cannot share memory: %s", error)
        return None


def _make_region(num_bytes: int) -> str:
    """Returns the name of a new region of shared memory; empty if there is no memory for it."""
    try:
        return SharedRegion.create(num_bytes)
    except OSError:
        return ""


def _open_region(name: str, num_bytes: int) -> SharedRegion | None:
    """Returns a region of shared memory; None if it is on another host."""
    try:
        return SharedRegion(name, num_bytes)
    except OSError:
        return None


def _own_ip(other: str) -> str:
    """Returns the IP address with which this host reaches another host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 1))
        return str(probe.getsockname()[0])
