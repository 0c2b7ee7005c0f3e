"""Several Ray nodes in one machine."""

from __future__ import annotations

from typing import Any

import ray
from ray.cluster_utils import Cluster

FAST_HEALTH_CHECKS = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
"""A node that is gone refuses them, and is given up after five: here in 2.5 seconds, by default in 15."""


class Nodes:
    """A cluster of several nodes in this one machine: a head for the driver, and nodes of one `mill` each."""

    def __init__(self, count: int) -> None:
        head = {"num_cpus": 2, "include_dashboard": False, "_system_config": FAST_HEALTH_CHECKS}
        self._cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        # Before there are other nodes: the driver takes any that is on its machine, and must not die with one of them.
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level="ERROR")
        self.nodes = [self.add() for _ in range(count)]
        self._cluster.wait_for_nodes()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> Any:
        return self._cluster.add_node(num_cpus=1, resources={"mill": 1}, wait=False)

    def restore(self) -> None:
        """Adds nodes until there are as many as at the start."""
        alive = [node for node in self.nodes if node in self._cluster.worker_nodes]
        self.nodes = [*alive, *(self.add() for _ in range(len(self.nodes) - len(alive)))]
        self._cluster.wait_for_nodes()

    def remove(self, node_id: str) -> None:
        """Kills a node and all that runs there."""
        (node,) = [node for node in self.nodes if node.node_id == node_id]
        self._cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()
