"""The work of each process of a replica: rank 0 runs the engine, every other rank runs its part of the model.

Ray starts the processes and notices their deaths. Tensors and step plans travel over connections that the ranks open
themselves, once rank 0 has announced an address, so no step waits for Ray.
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
"""Takes the address at which rank 0 waits for the other ranks."""

EngineFactory = Callable[[dict[str, Any], int, Announce | None], Engine]
"""Makes an engine from its keyword arguments, the number of ranks on its node, and an `Announce` for several ranks."""

RankMain = Callable[[dict[str, Any], int, int, str, StepWatchdog | None], None]
"""Runs a rank other than 0 until the engine closes. Arguments: the keyword arguments of the engine, the number of
ranks on the node, the rank, the address of rank 0, and a watchdog."""


@dataclass(frozen=True, slots=True)
class RankInfo:
    """The process and the node of a rank.

    Attributes:
        pid: Process id.
        node_id: Id of the Ray node, in hexadecimal.
    """

    pid: int
    node_id: str


def build_engine(engine_kwargs: dict[str, Any], num_sharing: int = 1, announce: Announce | None = None) -> Engine:
    """Builds an `LLMEngine` in this process, as rank 0. torch is imported by this call, not by the module.

    Args:
        engine_kwargs: Keyword arguments of `EngineConfig.from_kwargs`. Without `num_threads` the engine gets its share
            of this node's cores.
        num_sharing: Number of ranks that share the cores of this node.
        announce: Function that gets the address to which the other ranks connect; None for an engine of one rank.

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
    """Runs a rank other than 0 of an `LLMEngine` in this process until rank 0 closes the engine.

    Args:
        engine_kwargs: As for `build_engine`.
        num_sharing: Number of ranks that share the cores of this node.
        rank: The rank, 1 or more.
        address: The address that rank 0 announced.
        watchdog: Watchdog that runs during steps; None for no watchdog.

    Raises:
        MillraceError: The rank cannot load its part of the model, or another rank is gone.
    """
    from ...engine.executor.worker import run_worker

    run_worker(_engine_config(engine_kwargs, num_sharing), rank=rank, address=address, watchdog=watchdog)


def share_of_cores(num_cores: int, num_cpus: float, num_sharing: int) -> int:
    """Returns the number of threads that a rank computes with: its share of the cores of its node, at least 1.

    The threads of a rank wait for each other at every layer. If there are more threads than free cores, some thread is
    always descheduled, and the others wait for it.

    Args:
        num_cores: Physical cores of the node.
        num_cpus: CPUs of the node that Ray may use; if fewer than the cores, the ranks share these.
        num_sharing: Number of ranks on the node.
    """
    return max(1, int(min(num_cores, num_cpus)) // num_sharing)


def _engine_config(engine_kwargs: dict[str, Any], num_sharing: int) -> EngineConfig:
    from ...engine.config import EngineConfig
    from ...engine.device import num_physical_cores

    settings = dict(engine_kwargs)
    if settings.get("num_threads") is None:
        # The default of the engine is wrong here: Ray sets OMP_NUM_THREADS of a worker to the CPUs that it reserved.
        settings["num_threads"] = share_of_cores(num_physical_cores(), _node_cpus(), num_sharing)
    return EngineConfig.from_kwargs(**settings)


def _node_cpus() -> float:
    node_id = ray.get_runtime_context().get_node_id()
    cpus: float = next(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["NodeID"] == node_id)
    return cpus
