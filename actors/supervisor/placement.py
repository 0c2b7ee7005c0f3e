"""Resources of a replica in the cluster: one bundle for each rank, reserved together as a placement group.

    reserve      asks Ray for a group and waits for it until a timeout
    release      removes the group
    reclaim      finds the groups of a dead pool by name and removes them

Ray removes a group by itself only when the job *and* the actor that made the group are dead. If only the supervisor of
a pool was killed, its groups remain, and the driver reclaims them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

# Ray's public functions start a new Ray if none is running, which must not happen in a driver that is just ending.
from ray._private.state import state as ray_state
from ray._private.worker import global_worker
from ray._raylet import PlacementGroupID
from ray.util import placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...engine.errors import ConfigError, PlacementError, unknown_key_message
from .nodes import Resources, cluster_nodes, describe, fits

STRATEGIES = ("PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD")

NEXT_TO_NOTHING = {"memory": 1.0}
"""Ray refuses an empty bundle, so a rank that takes no resources asks for one byte of memory."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The resources that Ray reserves for one replica.

    Attributes:
        bundles: Resources of each rank.
        strategy: Ray's strategy for spreading the bundles over nodes, one of `STRATEGIES`. None places all bundles on
            one node if any node is large enough, else on as few nodes as possible.
    """

    bundles: tuple[Resources, ...]
    strategy: str | None = None

    @classmethod
    def read(cls, group_config: Mapping[str, Any], num_ranks: int) -> Placement:
        """Converts a `placement_group_config` in the form of Ray Data LLM to a placement.

        Args:
            group_config: ``{"bundle_per_worker": {...}}`` or ``{"bundles": [{...}, ...]}``, and ``"strategy"``.
            num_ranks: Number of ranks of a replica, each of which needs a bundle.

        Raises:
            ConfigError: The form is wrong; the message names the entry.
        """
        known = ("bundle_per_worker", "bundles", "strategy")
        for key in group_config:
            if key not in known:
                raise ConfigError(unknown_key_message("placement_group_config", key, known))
        if ("bundle_per_worker" in group_config) == ("bundles" in group_config):
            raise ConfigError("placement_group_config must have one of bundle_per_worker (a dict) and bundles (a list)")
        strategy = group_config.get("strategy")
        if strategy not in (None, *STRATEGIES):
            raise ConfigError(
                f"placement_group_config: strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}"
            )
        bundles = group_config.get("bundles", [group_config.get("bundle_per_worker")] * num_ranks)
        if not isinstance(bundles, list | tuple) or len(bundles) != num_ranks:
            raise ConfigError(
                f"placement_group_config: bundles must be a list of {num_ranks}, one for each of "
                f"tensor_parallel_size x pipeline_parallel_size ranks; got {bundles!r:.120}"
            )
        return cls(tuple(_read_bundle(bundle) for bundle in bundles), strategy)

    @classmethod
    def even(cls, resources: Resources, num_ranks: int, accelerator_type: str | None) -> Placement:
        """Returns the placement that divides the resources of a replica evenly among its ranks.

        Args:
            resources: Resources of the whole replica.
            num_ranks: Number of ranks of the replica.
            accelerator_type: Accelerator type that the node of each rank must have; None for any node.
        """
        bundle = {name: amount / num_ranks for name, amount in resources.items() if amount}
        return cls((bundle,) * num_ranks).on(accelerator_type)

    def on(self, accelerator_type: str | None) -> Placement:
        """Returns a copy restricted to nodes with an accelerator type; this placement itself for None."""
        if accelerator_type is None:
            return self
        kind = {f"accelerator_type:{accelerator_type}": 0.001}
        return Placement(tuple(bundle | kind for bundle in self.bundles), self.strategy)

    @property
    def total(self) -> Resources:
        """Resources of all ranks together."""
        names = {name for bundle in self.bundles for name in bundle}
        return {name: sum(bundle.get(name, 0.0) for bundle in self.bundles) for name in sorted(names)}

    def resolved_strategy(self, nodes: list[Resources]) -> str:
        """Returns `strategy`; in place of None the strategy that fits a cluster whose nodes have these resources."""
        if self.strategy is not None:
            return self.strategy
        return "STRICT_PACK" if any(fits(self.total, node) for node in nodes) else "PACK"

    def describe(self, strategy: str) -> str:
        """Returns a text with the bundles, and the strategy if there are several, for error messages."""
        bundles = [describe(bundle) for bundle in self.bundles]
        if len(bundles) == 1:
            return bundles[0]
        same = f"{len(bundles)} bundles of {bundles[0]}" if len(set(bundles)) == 1 else f"bundles {'; '.join(bundles)}"
        return f"{same}, {strategy}"


async def reserve(name: str, placement: Placement, timeout_s: float) -> PlacementGroup:
    """Reserves the bundles of a replica as a placement group, and waits until the cluster has room for them.

    Args:
        name: Name of the group: the name of the pool, a slash, and the id of the replica.
        placement: The resources to reserve.
        timeout_s: Seconds to wait for room.

    Returns:
        The group; the caller must `release` it.

    Raises:
        PlacementError: There was no room in time.
    """
    strategy = placement.resolved_strategy(cluster_nodes())
    bundles = [bundle or NEXT_TO_NOTHING for bundle in placement.bundles]
    group = placement_group([dict(bundle) for bundle in bundles], strategy=strategy, name=name)
    try:
        await asyncio.wait_for(_until_ready(group), timeout_s)
    except TimeoutError:
        release(group)
        raise PlacementError(_no_room(name, placement.describe(strategy), timeout_s)) from None
    except BaseException:
        release(group)
        raise
    return group


def release(group: PlacementGroup) -> None:
    """Removes a placement group; Ray kills the actors that still run in it."""
    remove_placement_group(group)


def reclaim(pool_name: str) -> list[str]:
    """Removes all placement groups of a pool whose supervisor is dead.

    Args:
        pool_name: Name of the pool.

    Returns:
        Names of the groups that were removed.
    """
    left = {
        entry["name"]: entry["placement_group_id"]
        for entry in ray_state.placement_group_table().values()
        if entry["name"].startswith(f"{pool_name}/") and entry["state"] != "REMOVED"
    }
    for group_id in left.values():
        worker: Any = global_worker
        worker.core_worker.remove_placement_group(PlacementGroupID(bytes.fromhex(group_id)))
    return list(left)


def rank_options(group: PlacementGroup, placement: Placement, rank: int) -> dict[str, Any]:
    """Returns the options of Ray with which the actor of a rank is placed in its bundle and takes all of it.

    Args:
        group: The reserved group.
        placement: The placement that was reserved.
        rank: The rank, which is also the index of its bundle.
    """
    bundle = placement.bundles[rank]
    own = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU", "memory")}
    return {
        "num_cpus": bundle.get("CPU", 0.0),
        "num_gpus": bundle.get("GPU", 0.0),
        "resources": own,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
    }


async def _until_ready(group: PlacementGroup) -> None:
    await group.ready()


def _no_room(name: str, asked: str, timeout_s: float) -> str:
    nodes = "; ".join(describe(node) for node in cluster_nodes()) or "no node"
    return (
        f"no room for replica {name.rpartition('/')[2]} within {timeout_s:g} s: it asks for {asked}; the cluster's "
        f"nodes have {nodes}, of which {describe(ray.available_resources())} is free. Ask for less "
        "(num_cpus_per_replica, num_gpus_per_replica, accelerator_type, placement_group_config), end what holds the "
        "rest, add nodes, or raise placement_timeout_s"
    )


def _read_bundle(bundle: Any) -> Resources:
    if not isinstance(bundle, Mapping) or not bundle:
        raise ConfigError(
            f"placement_group_config: a bundle must be a dict such as {{'CPU': 1, 'GPU': 1}}; got {bundle!r:.120}"
        )
    for name, amount in bundle.items():
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not amount >= 0:
            raise ConfigError(
                f"placement_group_config: {name!r} of a bundle must be a number of at least 0; got {amount!r}"
            )
    return {str(name): float(amount) for name, amount in bundle.items() if amount}
