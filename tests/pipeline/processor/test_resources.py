"""What operators and replicas take of the cluster, and how many rows and blocks are under way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import ray.data
from ray import cloudpickle

from millrace import ConfigError
from millrace.pipeline import CustomStage, EngineProcessorConfig, Processor, StageConfig, TokenizerStageConfig
from millrace.pipeline.processor.resources import (
    gathered_rows,
    generate_resources,
    max_pending_rows,
    operator_resources,
    pool_config,
)
from millrace.pipeline.stages.base import BatchStage
from millrace.pipeline.stages.user_function import PreprocessStage, UserFunction

# Workers cannot import from the tests, so what is defined here travels as it is.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def operators(make_config: Any) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """What the three operators take, for given settings."""

    def make(**changes: Any) -> list[dict[str, Any]]:
        config = make_config(**changes)
        none = UserFunction(PreprocessStage)
        return [operator_resources(config, none), generate_resources(config), operator_resources(config, none)]

    return make


def test_a_job_leaves_a_whole_cpu_of_two_for_reading(make_config: Any, operators: Any) -> None:
    held = sum(one["num_cpus"] * one["compute"].max_size for one in operators())
    config = pool_config(make_config(), operators())
    assert held + config.num_cpus_per_replica * config.num_replicas <= 1.0
    assert config.num_cpus_per_replica > 0


def test_more_replicas_than_fit_still_leave_it(make_config: Any, operators: Any) -> None:
    config = pool_config(make_config(concurrency=3), operators(concurrency=3))
    assert 3 * config.num_cpus_per_replica <= 1.0


def test_threads_are_the_users_choice_or_else_the_replicas_own(make_config: Any, operators: Any) -> None:
    assert "num_threads" not in pool_config(make_config(), operators()).engine_kwargs
    config = make_config(engine_kwargs={"num_threads": 3})
    assert pool_config(config, operators()).engine_kwargs["num_threads"] == 3


def test_the_pool_is_as_large_as_was_said_and_its_ranks_have_a_gpu_each(make_config: Any, operators: Any) -> None:
    config = make_config(
        concurrency=(1, 3),
        engine_kwargs={"tensor_parallel_size": 2},
        accelerator_type="L4",
        placement_group_config=None,
    )
    pool = pool_config(config, operators(concurrency=3))
    assert (pool.min_replicas, pool.max_replicas) == (1, 3)
    assert [bundle["GPU"] for bundle in pool.placement.bundles] == [1.0, 1.0]
    given = {"bundle_per_worker": {"mill": 1}}
    assert pool_config(make_config(placement_group_config=given), operators()).placement.bundles == ({"mill": 1.0},)


def test_a_job_that_would_wait_forever_is_refused(make_config: Any, operators: Any) -> None:
    with pytest.raises(ConfigError, match="wait forever"):
        pool_config(make_config(num_cpus_per_replica=1.5), operators())


@pytest.mark.parametrize("batch_size", [1, 32, 10_000])
def test_blocks_under_way_hold_rows_for_the_engines_four_times_over(make_config: Any, batch_size: int) -> None:
    config = make_config(batch_size=batch_size, concurrency=2, engine_kwargs={"max_num_seqs": 64})
    assert max_pending_rows(config) == 512
    num_blocks = generate_resources(config)["compute"].max_concurrent_calls_per_actor
    assert 4 <= num_blocks <= 128
    assert num_blocks * gathered_rows(config) >= 512


def test_rows_and_blocks_under_way_are_the_users_choice(make_config: Any) -> None:
    config = make_config(max_concurrent_batches=3)
    assert generate_resources(config)["compute"].max_concurrent_calls_per_actor == 3
    assert max_pending_rows(make_config(max_pending_requests=7)) == 7
    assert max_pending_rows(make_config(max_pending_requests=0)) is None
    assert max_pending_rows(make_config(max_pending_requests=-1)) is None


def test_map_kwargs_replace_the_resources_of_stages(make_config: Any) -> None:
    user = UserFunction(PreprocessStage, dict, {"num_cpus": 0.5, "concurrency": 3, "fn_kwargs": {"a": 1}})
    kwargs = operator_resources(
        make_config(tokenize_stage={"num_cpus": 2, "memory": 7}), user, make_config().tokenize_stage
    )
    assert kwargs["num_cpus"] == 0.5
    assert (kwargs["compute"].min_size, kwargs["compute"].max_size) == (3, 3)
    assert "fn_kwargs" not in kwargs


def prepare_resources(**fields: Any) -> dict[str, Any]:
    """What the operator before the engine takes."""
    config = EngineProcessorConfig(model_source="somewhere", **fields)
    return operator_resources(config, UserFunction(PreprocessStage), config.chat_template_stage, config.tokenize_stage)


def test_a_stage_without_resources_takes_those_of_the_processor() -> None:
    kwargs = prepare_resources(concurrency=3, runtime_env={"env_vars": {"A": "1"}})
    assert (kwargs["compute"].min_size, kwargs["compute"].max_size) == (1, 3)
    assert kwargs["runtime_env"] == {"env_vars": {"A": "1"}}
    assert kwargs["num_cpus"] == 0


def test_resources_of_a_stage_replace_those_of_the_processor() -> None:
    env = {"env_vars": {"B": "2"}}
    kwargs = prepare_resources(
        concurrency=3,
        runtime_env={"env_vars": {"A": "1"}},
        chat_template_stage={"num_cpus": 0.25, "runtime_env": env},
        tokenize_stage=TokenizerStageConfig(num_cpus=0.5, concurrency=(2, 4), memory=100),
    )
    assert kwargs["runtime_env"] == env  # Not merged.
    assert (kwargs["compute"].min_size, kwargs["compute"].max_size) == (2, 4)
    assert (kwargs["num_cpus"], kwargs["memory"]) == (0.75, 100)


def test_stages_of_one_process_need_one_environment() -> None:
    with pytest.raises(ConfigError, match="give them one runtime_env"):
        prepare_resources(
            chat_template_stage={"runtime_env": {"pip": ["a"]}}, tokenize_stage={"runtime_env": {"pip": ["b"]}}
        )


def test_a_group_of_cpus_only_takes_no_gpu(make_config: Any) -> None:
    config = make_config(placement_group_config={"bundles": [{"CPU": 0.75}]})
    pool = pool_config(config, [generate_resources(config)])
    assert pool.placement.bundles == ({"CPU": 0.75},)


def test_resources_of_a_stage_reach_its_process(make_config: Any) -> None:
    class Look(BatchStage):
        name = "look"

        def process_batch(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
            import os

            given = ray.get_runtime_context().get_assigned_resources()
            seen = {"cpus": given["CPU"], "memory": given["memory"], "variable": os.environ.get("MILL")}
            return [seen for _ in rows]

    settings = StageConfig(num_cpus=0.25, memory=2e6, runtime_env={"env_vars": {"MILL": "turns"}})
    config = make_config()
    stages = [CustomStage(Look, config=settings)]
    with Processor(config, stages) as processor:
        (row,) = processor(ray.data.from_items([{"prompt": "a"}])).take_all()
    assert (row["cpus"], row["memory"], row["variable"]) == (0.25, 2e6, "turns")
