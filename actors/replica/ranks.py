"""What the processes of a replica run: rank 0 the engine, every other rank its part of the model.

Ray only starts them and sees them die. Their tensors and plans go over connections of the engine's own, which the ranks
make once rank 0 has announced an address: no step waits for Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from .engine_thread import Engine
from .watchdog import StepWatchdog

if TYPE_CHECKING:
    from ...engine.config import EngineConfig

Announce = Callable[[str], None]
"""Takes the address where rank 0 waits for the others."""

EngineFactory = Callable[[dict[str, Any], int, Announce | None], Engine]
"""Makes the engine from its keyword arguments, the number of ranks on its node, and for several ranks an `Announce`."""

RankMain = Callable[[dict[str, Any], int, int, str, StepWatchdog | None], None]
"""Runs another rank to its end, from keyword arguments, ranks on its node, its number, the address of rank 0, and what
is told of its steps."""


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Where a rank runs.

    Attributes:
        pid: Its process.
        node_id: Its Ray node, in hexadecimal.
    """

    pid: int
    node_id: str


def build_engine(engine_kwargs: dict[str, Any], num_sharing: int = 1, announce: Announce | None = None) -> Engine:
    """Builds the engine of this package; torch is loaded here and not before.

    Args:
        engine_kwargs: Keyword arguments of `EngineConfig.from_kwargs`. Without `num_threads` the engine gets its share
            of this node's cores.
        num_sharing: Ranks that share them.
        announce: Called with the address that the other ranks come to; None for an engine of one rank.

    Returns:
        The engine with its model loaded.
    """
    from ...engine.engine import LLMEngine

    config = _engine_config(engine_kwargs, num_sharing)
    if announce is None:
        return LLMEngine.from_config(config)
    from ...engine.parallel.rendezvous import Rendezvous

    rendezvous = Rendezvous.open(ray.util.get_node_ip_address())
    announce(rendezvous.address)
    return LLMEngine.from_config(config, rendezvous=rendezvous)


def run_rank(
    engine_kwargs: dict[str, Any], num_sharing: int, rank: int, address: str, watchdog: StepWatchdog | None = None
) -> None:
    """Runs a rank of the engine of this package until its rank 0 closes it.

    Args:
        engine_kwargs: As for `build_engine`.
        num_sharing: Ranks that share the cores of this node.
        rank: Which rank, from 1.
        address: What rank 0 announced.
        watchdog: Told of its steps; None for none.

    Raises:
        MillraceError: The rank cannot load its part, or another one is gone.
    """
    from ...engine.executor.worker import run_worker

    run_worker(_engine_config(engine_kwargs, num_sharing), rank=rank, address=address, watchdog=watchdog)


def share_of_cores(num_cores: int, num_cpus: float, num_sharing: int) -> int:
    """Returns the threads of an engine that shares its node with others.

    Threads of an engine wait for each other at every layer: one more than there are free cores, and all of them wait
    for the scheduler of the operating system instead.

    Args:
        num_cores: Physical cores of the node.
        num_cpus: CPUs of the node that Ray may use.
        num_sharing: Engines on the node.
    """
    return max(1, int(min(num_cores, num_cpus)) // num_sharing)


def _engine_config(engine_kwargs: dict[str, Any], num_sharing: int) -> EngineConfig:
    from ...engine.config import EngineConfig
    from ...engine.device import num_physical_cores

    settings = dict(engine_kwargs)
    if settings.get("num_threads") is None:
        # Not the engine's own default: Ray sets OMP_NUM_THREADS in its workers to the CPUs that it set aside.
        settings["num_threads"] = share_of_cores(num_physical_cores(), _node_cpus(), num_sharing)
    return EngineConfig.from_kwargs(**settings)


def _node_cpus() -> float:
    node_id = ray.get_runtime_context().get_node_id()
    cpus: float = next(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["NodeID"] == node_id)
    return cpus
