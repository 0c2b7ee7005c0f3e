"""Where a replica stands in the cluster: a bundle of resources for each of its ranks, reserved as one placement group.

    reserve      asks Ray for a group and waits for it, but not for ever
    release      gives it back
    reclaim      gives back whatever a dead owner left, found by name

Ray removes a group by itself only when the job *and* the actor that made it are dead. So a pool whose supervisor alone
was killed leaves groups behind; the driver, which has outlived it, reclaims them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

# The public functions start a new Ray where there is none any more, and a driver that reclaims may just be ending.
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
"""A bundle must ask for something: one byte of memory stands for a rank that takes nothing."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What Ray sets aside for one replica.

    Attributes:
        bundles: Resources of each rank.
        strategy: How Ray spreads the bundles over nodes; None for all on one node if any node is large enough, else on
            as few as possible.
    """

    bundles: tuple[Resources, ...]
    strategy: str | None = None

    @classmethod
    def read(cls, group_config: Mapping[str, Any], num_ranks: int) -> Placement:
        """Reads a `placement_group_config`, in the form that users of Ray Data LLM know.

        Args:
            group_config: ``{"bundle_per_worker": {...}}`` or ``{"bundles": [{...}, ...]}``, and ``"strategy"``.
            num_ranks: Ranks of a replica; each has a bundle.

        Raises:
            ConfigError: It says nothing of that kind.
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
        """Shares the resources of a replica out evenly.

        Args:
            resources: What the whole replica takes.
            num_ranks: Its ranks.
            accelerator_type: Kind of accelerator that the node of each rank must have; None for any.
        """
        bundle = {name: amount / num_ranks for name, amount in resources.items() if amount}
        return cls((bundle,) * num_ranks).on(accelerator_type)

    def on(self, accelerator_type: str | None) -> Placement:
        """Returns the same on nodes that have a kind of accelerator."""
        if accelerator_type is None:
            return self
        kind = {f"accelerator_type:{accelerator_type}": 0.001}
        return Placement(tuple(bundle | kind for bundle in self.bundles), self.strategy)

    @property
    def total(self) -> Resources:
        """What all ranks take together."""
        names = {name for bundle in self.bundles for name in bundle}
        return {name: sum(bundle.get(name, 0.0) for bundle in self.bundles) for name in sorted(names)}

    def resolved_strategy(self, nodes: list[Resources]) -> str:
        """Returns the strategy for a cluster with these nodes."""
        if self.strategy is not None:
            return self.strategy
        return "STRICT_PACK" if any(fits(self.total, node) for node in nodes) else "PACK"

    def describe(self, strategy: str) -> str:
        """Says what is asked for, in a few words."""
        bundles = [describe(bundle) for bundle in self.bundles]
        if len(bundles) == 1:
            return bundles[0]
        same = f"{len(bundles)} bundles of {bundles[0]}" if len(set(bundles)) == 1 else f"bundles {'; '.join(bundles)}"
        return f"{same}, {strategy}"


async def reserve(name: str, placement: Placement, timeout_s: float) -> PlacementGroup:
    """Reserves the bundles of a replica.

    Args:
        name: Name of the group: the pool's, a slash, and the replica's.
        placement: What to reserve.
        timeout_s: Seconds to wait for room.

    Returns:
        The group; whoever asked must `release` it.

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
    """Gives a group back; Ray ends what still runs in it."""
    remove_placement_group(group)


def reclaim(pool_name: str) -> list[str]:
    """Gives back all groups of a pool whose supervisor is dead.

    Args:
        pool_name: Name of the pool.

    Returns:
        Names of the groups that were there.
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
    """Returns the options of the actor of a rank: all of its bundle.

    Args:
        group: The reserved group.
        placement: What was reserved.
        rank: Which rank; its bundle has the same number.
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
