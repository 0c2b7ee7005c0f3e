"""Pools of fake engines, and waiting for events with a deadline."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from millrace.actors import EnginePool

sys.path.insert(0, str(Path(__file__).parent))

import fake_engine
from node_cluster import Nodes

# Workers cannot import from the tests, so the fake engine travels as it is.
cloudpickle.register_pickle_by_value(fake_engine)


@pytest.fixture
def start_pool(cluster: None, pools: Callable[..., EnginePool]) -> Callable[..., EnginePool]:
    """Starts pools of fake engines on the local Ray, and closes them at the end."""
    return pools


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Three nodes beside the head, for the tests of one module; a Ray that other tests have started ends."""
    ray.shutdown()
    started = Nodes(3)
    yield started
    started.shutdown()


@pytest.fixture
def cluster_of_three(nodes: Nodes) -> Nodes:
    """The same with all its nodes."""
    nodes.restore()
    return nodes


@pytest.fixture
def pools() -> Iterator[Callable[..., EnginePool]]:
    """Starts pools on whatever Ray is there, and closes them at the end."""
    started: list[EnginePool] = []

    def start(**settings: Any) -> EnginePool:
        started.append(fake_engine.start_pool(**settings))
        return started[-1]

    yield start
    for pool in started:
        pool.close()


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A path that does not exist yet: gated requests finish once it does."""
    return tmp_path / "gate"


@pytest.fixture
def eventually() -> Callable[[Callable[[], object]], None]:
    """Waits until a condition holds; fails if it does not within a minute."""

    def wait(condition: Callable[[], object]) -> None:
        calls = Retrying(retry=retry_if_result(lambda met: not met), wait=wait_fixed(0.02), stop=stop_after_delay(60))
        calls(condition)

    return wait


@pytest.fixture
def is_running() -> Callable[[int], bool]:
    """Says whether a process is there and not just waiting to be buried."""

    def check(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return check
