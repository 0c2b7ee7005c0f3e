"""The resources of the operators and replicas of a processor, and the numbers of rows and blocks under way.

An operator on the CPU holds its resources as long as the job runs, but works in bursts. By default it therefore asks
for no CPU: on a machine with two CPUs, a read task needs one, and in a job that Ray Data resumes from checkpoints,
their filter holds the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from ...actors import PoolConfig, check_leaves_one_cpu
from ...engine.config import DEFAULT_MAX_NUM_SEQS, LARGE_MAX_NUM_SEQS
from ...engine.errors import ConfigError
from ..stages.stage_config import StageConfig
from ..stages.user_function import UserFunction
from .config import EngineProcessorConfig, ProcessorConfig

OperatorResources = Mapping[str, Any]
"""Resources of an operator: arguments of `Dataset.map_batches`, among them `num_cpus` and `compute`."""

OPERATOR_CPUS = 0.0
"""Default number of CPUs that one process of an operator asks for."""

CHECKPOINT_CPUS = 1.0
"""CPUs of the operator that Ray Data adds after the reader to filter out finished rows of a checkpoint."""

MAX_CONCURRENT_BATCHES = 128
FILL = 4
"""Ratio of the rows in flight to the sequences that the replicas can run at once.

A block ends with its last row. If output lengths vary, that row takes half as long again as the average row, and the
next block takes time to arrive. With a ratio of 2, engines sometimes have no rows.
"""

SPARE_BATCHES = 2
"""Blocks under way beyond the blocks whose rows are in flight, so that rows wait when the engines have room."""


def max_pending_rows(config: EngineProcessorConfig) -> int | None:
    """Returns the most rows that may be in flight at once; None for no limit.

    The limit counts rows, not blocks, so the replicas see the same number whatever the size of a dataset's blocks. If
    `max_num_seqs` is not set, engines choose it when they load; the limit then counts the most that they may choose.
    """
    if config.max_pending_requests is not None:
        return config.max_pending_requests if config.max_pending_requests > 0 else None
    num_gpus = _num_gpus(config, ray.cluster_resources() if ray.is_initialized() else {})
    most = LARGE_MAX_NUM_SEQS if num_gpus else DEFAULT_MAX_NUM_SEQS
    return FILL * config.num_replicas * (config.engine_config.max_num_seqs or most)


def block_rows(config: ProcessorConfig, stages: Sequence[StageConfig]) -> int:
    """Returns the rows of a block: the largest `batch_size` of the processor and of the given stages."""
    return max([config.batch_size, *(stage.batch_size or 0 for stage in stages)])


def operator_resources(config: ProcessorConfig, user: UserFunction, *stages: StageConfig) -> dict[str, Any]:
    """Returns the resources of an operator on the CPU, as arguments of `Dataset.map_batches`.

    Settings of a stage replace those of the processor, and the `map_kwargs` of the user's function replace both.

    Args:
        config: Settings of the processor.
        user: The user's function that runs in the operator.
        *stages: Settings of the stages that run in the operator.
    """
    on = [stage for stage in stages if stage.enabled]
    sizes = [stage.concurrency for stage in on if stage.concurrency is not None]
    asked: dict[str, Any] = {
        "num_cpus": sum(stage.num_cpus for stage in on if stage.num_cpus) or OPERATOR_CPUS,
        "memory": sum(stage.memory for stage in on if stage.memory) or None,
        "runtime_env": _one_runtime_env(on) or config.runtime_env,
        "concurrency": max(sizes, key=lambda size: size if isinstance(size, int) else size[1]) if sizes else None,
        **user.resources,
    }
    size = asked.pop("concurrency") or (1, config.num_replicas)
    low, high = size if isinstance(size, tuple | list) else (size, size)
    asked.setdefault("compute", ActorPoolStrategy(min_size=low, max_size=high))
    return {key: value for key, value in asked.items() if value is not None}


def generate_resources(config: EngineProcessorConfig) -> dict[str, Any]:
    """Returns the resources of the generate operator: one process with a thread for each block under way."""
    compute = ActorPoolStrategy(
        size=1,
        max_tasks_in_flight_per_actor=config.max_tasks_in_flight_per_actor,
        max_concurrent_calls_per_actor=config.max_concurrent_batches
        or num_blocks(max_pending_rows(config), config.batch_size),
        enable_true_multi_threading=True,
    )
    asked = {"num_cpus": OPERATOR_CPUS, "compute": compute, "runtime_env": config.runtime_env}
    return {key: value for key, value in asked.items() if value is not None}


def num_blocks(max_rows: int | None, batch_size: int) -> int:
    """Returns the number of blocks under way that holds the rows in flight and two more blocks, from 4 to 128.

    Args:
        max_rows: Most rows in flight at once; None for no limit.
        batch_size: Rows of a block.
    """
    wanted = MAX_CONCURRENT_BATCHES if max_rows is None else math.ceil(max_rows / batch_size) + SPARE_BATCHES
    return min(MAX_CONCURRENT_BATCHES, max(FILL, wanted))


def rows_per_block(max_rows: int | None, batch_size: int) -> int:
    """Returns the number of rows up to which small blocks are joined, so that `max_rows` rows can be in flight.

    Args:
        max_rows: Most rows in flight at once; None for no limit.
        batch_size: Rows of a block that the user asked for.
    """
    return max(batch_size, math.ceil((max_rows or 0) / (MAX_CONCURRENT_BATCHES - SPARE_BATCHES)))


def gathered_rows(config: EngineProcessorConfig) -> int:
    """Returns the number of rows up to which small blocks are joined before the generate operator."""
    if config.max_concurrent_batches is not None:
        return config.batch_size
    return rows_per_block(max_pending_rows(config), config.batch_size)


def pool_config(config: EngineProcessorConfig, operators: Sequence[OperatorResources]) -> PoolConfig:
    """Returns the config of the pool of replicas, and checks that the cluster has room to run the job beside them.

    Args:
        config: Settings of the processor.
        operators: Resources of each operator of the processor.

    Raises:
        ConfigError: Replicas and operators would leave no whole CPU to read the dataset with.
    """
    held = held_cpus(operators)
    have = ray.cluster_resources()
    share = max(0.0, (have.get("CPU", 0.0) - 1 - held) / config.num_replicas)
    num_cpus = config.num_cpus_per_replica
    if num_cpus is None:
        num_cpus = min(1.0, math.floor(share * 100) / 100)
    settled = PoolConfig(
        engine_kwargs=config.all_engine_kwargs,
        num_replicas=config.concurrency,
        num_cpus_per_replica=num_cpus,
        num_gpus_per_replica=_num_gpus(config, have),
        accelerator_type=config.accelerator_type,
        placement_group_config=config.placement_group_config,
        runtime_env=config.runtime_env,
    )
    check_leaves_one_cpu(settled, held)
    return settled


def held_cpus(operators: Sequence[OperatorResources]) -> float:
    """Returns the CPUs that a running job holds for its operators and for the filter of Ray Data's checkpoints.

    Args:
        operators: Resources of each operator.
    """
    held = float(sum(one["num_cpus"] * one["compute"].max_size for one in operators))
    resumes = DataContext.get_current().checkpoint_config is not None
    return held + (CHECKPOINT_CPUS if resumes else 0.0)


def check_room(operators: Sequence[OperatorResources]) -> None:
    """Checks that a read task, which takes a whole CPU, can run beside the operators.

    Args:
        operators: Resources of each operator.

    Raises:
        ConfigError: No whole CPU is left, so the job would wait forever.
    """
    held, have = held_cpus(operators), ray.cluster_resources().get("CPU", 0.0)
    # Operators that hold no CPU cannot block a read task, and a cluster without a CPU may still grow.
    if held and have - held < 1 - 1e-6:
        raise ConfigError(
            f"the operators of the job hold {held:g} of the cluster's {have:g} CPUs and leave less than a whole one to "
            "read with: the job would wait forever; lower num_cpus or concurrency of the stages and functions"
        )


def _num_gpus(config: EngineProcessorConfig, have: Mapping[str, float]) -> float:
    if config.num_gpus_per_replica is not None:
        return config.num_gpus_per_replica
    device = config.engine_config.device
    wants_one = device == "cuda" or (device == "auto" and (config.accelerator_type or have.get("GPU", 0) >= 1))
    return float(config.engine_config.num_ranks) if wants_one else 0.0


def _one_runtime_env(stages: list[StageConfig]) -> dict[str, Any] | None:
    given = [stage.runtime_env for stage in stages if stage.runtime_env is not None]
    if any(one != given[0] for one in given):
        raise ConfigError(
            "the stages before the engine run in one process, as do those after it: give them one runtime_env"
        )
    return given[0] if given else None
