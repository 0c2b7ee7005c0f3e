"""From a processor's settings to its operators: their stages, and what of the cluster they take.

The `make_*` functions run in the worker that runs the stages; everything they are given pickles.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.data import ActorPoolStrategy

from ...actors import PoolClient, PoolConfig, check_leaves_one_cpu
from ...engine import SamplingParams, Tokenizer, resolve_model
from ...engine.errors import ConfigError, unknown_key_message
from ...engine.loading.generation_config import default_sampling_params, read_generation_config
from .. import columns
from ..answers.reasoning import find_reasoning_format
from ..answers.tool_calls import find_tool_call_format
from ..stages import (
    ChatTemplateStage,
    DetokenizeStage,
    GenerateStage,
    PoolStage,
    PostprocessStage,
    PreprocessStage,
    ReasoningStage,
    Stage,
    TokenizeStage,
    ToolCallStage,
)
from ..stages.engine import EngineClient
from .backend import OperatorKwargs, held_cpus
from .config import EngineProcessorConfig, ProcessorConfig, StageConfig
from .stage_plan import StageInfo, StagePlan

OPERATOR_CPUS = 0.0
"""CPUs that one process of an operator asks for, unless told otherwise.

An operator holds what it asks for as long as the job runs, and works in bursts. On a laptop of two CPUs a read task
needs a whole one, and where a job is resumed from Ray Data's checkpoints, their filter holds the other.
"""

MAX_CONCURRENT_BATCHES = 128
FILL = 4
"""How many times over the rows in flight fill the places of the replicas.

A block's last rows hold it open, half as long again as its average one where lengths vary, and the next block takes its
time to come: with 2, engines run dry now and then.
"""

SPARE_BATCHES = 2
"""Blocks under way beyond those whose rows are in flight, so that the next rows are there when places come free."""

MAP_KWARGS = frozenset(
    {"accelerator_type", "compute", "concurrency", "fn_args", "fn_kwargs", "label_selector", "memory", "num_cpus"}
    | {"num_gpus", "resources", "runtime_env"}
)

MakeClient = Callable[[str], EngineClient]


@dataclass(frozen=True)
class UserFunction:
    """A function of the user and how its operator is to run.

    Attributes:
        name: ``"preprocess"`` or ``"postprocess"``.
        function: Called with each row; None if there is none.
        map_kwargs: What the user would have given `Dataset.map` for it.
    """

    name: str
    function: Callable[..., Mapping[str, Any]] | None = None
    map_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.function is not None and not callable(self.function):
            raise ConfigError(f"{self.name} must be a function of a row; got {type(self.function).__name__}")
        for key in self.map_kwargs:
            if key not in MAP_KWARGS:
                raise ConfigError(unknown_key_message(f"{self.name}_map_kwargs", key, MAP_KWARGS))

    @property
    def call_kwargs(self) -> dict[str, Any]:
        """Further arguments of the function."""
        return {key: value for key, value in self.map_kwargs.items() if key in ("fn_args", "fn_kwargs")}


@functools.lru_cache(maxsize=4)
def load_tokenizer(folder: str, chat_template: str | None = None) -> Tokenizer:
    """Loads a tokenizer once for all stages of a process."""
    return Tokenizer(resolve_model(folder), chat_template)


def prepare_plans(config: EngineProcessorConfig) -> list[StagePlan]:
    """Returns the stages before the engine, in order.

    Args:
        config: Settings of the processor.
    """
    chat, tokenize = config.chat_template_stage, config.tokenize_stage
    plans = []
    if chat.enabled:
        optional = (columns.PROMPT, columns.CHAT_TEMPLATE_KWARGS, columns.TOOLS, columns.CHAT_TEMPLATE)
        info = StageInfo("ChatTemplateStage", chat, (columns.MESSAGES,), optional)
        plans.append(StagePlan(info, functools.partial(_make_chat_template, config)))
    if tokenize.enabled:
        info = StageInfo("TokenizeStage", tokenize, (columns.PROMPT,), (columns.TOKENIZED_PROMPT,))
        plans.append(StagePlan(info, functools.partial(_make_tokenize, config)))
    return plans


def finish_plans(config: EngineProcessorConfig) -> list[StagePlan]:
    """Returns the stages after the engine, in order.

    Args:
        config: Settings of the processor.
    """
    plans = []
    if config.detokenize_stage.enabled and not config.pools:
        info = StageInfo("DetokenizeStage", config.detokenize_stage, (columns.GENERATED_TOKENS,))
        plans.append(StagePlan(info, functools.partial(_make_detokenize, config)))
    if config.reasoning_stage.enabled:
        info = StageInfo("ReasoningStage", config.reasoning_stage, (columns.GENERATED_TEXT,))
        plans.append(StagePlan(info, functools.partial(_make_reasoning, config)))
    if config.tool_call_stage.enabled:
        info = StageInfo("ToolCallStage", config.tool_call_stage, (columns.GENERATED_TEXT,))
        plans.append(StagePlan(info, functools.partial(_make_tool_call, config)))
    return plans


def make_stages(plans: Sequence[StagePlan], user: UserFunction, *, stop_on_error: bool) -> list[Stage]:
    """Makes the stages of one operator on the CPU: those planned, and the user's function at its end of them.

    Args:
        plans: The stages, in order.
        user: `preprocess`, which goes first, or `postprocess`, which goes last.
        stop_on_error: Whether the first failed row stops the job.
    """
    stages = [_make_sized(plan) for plan in plans]
    if user.function is None:
        return stages
    kind = PreprocessStage if user.name == "preprocess" else PostprocessStage
    function = kind(user.function, **user.call_kwargs, stop_on_error=stop_on_error)
    return [function, *stages] if kind is PreprocessStage else [*stages, function]


def _make_sized(plan: StagePlan) -> Stage:
    stage = plan.make()
    if plan.info.config.batch_size is not None:
        stage.batch_size = plan.info.config.batch_size
    return stage


def make_prepare_stages(config: EngineProcessorConfig, user: UserFunction) -> list[Stage]:
    """Makes the stages before the engine.

    Args:
        config: Settings of the processor.
        user: The user's `preprocess`.
    """
    return make_stages(prepare_plans(config), user, stop_on_error=config.stop_on_error)


def make_generate_stages(config: EngineProcessorConfig, pool_name: str, make_client: MakeClient) -> list[Stage]:
    """Makes the stage that talks to the engine.

    Args:
        config: Settings of the processor.
        pool_name: Name of the pool. A name, not a handle: handles in an actor's arguments break its restart.
        make_client: Makes the pool's client from its name.
    """
    settings: dict[str, Any] = {
        "model": config.model_source,
        "duplicates": config.deduplicate,
        "stop_on_error": config.stop_on_error,
    }
    if config.pools:
        return [PoolStage(make_client(pool_name), **settings)]
    stage = GenerateStage(
        make_client(pool_name),
        default_params=_default_params(config),
        job_seed=config.engine_config.seed,
        detokenize_later=config.detokenize_stage.enabled,
        **settings,
    )
    return [stage]


def make_pool_client(pool_name: str, max_pending: int | None = None) -> EngineClient:
    """Connects to a pool by its name.

    Args:
        pool_name: Name of the pool.
        max_pending: Rows in flight at once; None for no bound.
    """
    return PoolClient(pool_name, max_pending)


def max_pending_rows(config: EngineProcessorConfig) -> int | None:
    """Returns how many rows may be in flight at once; None if there is no bound.

    Rows are counted, not blocks: however large the blocks of a dataset are, the replicas see the same.

    Args:
        config: Settings of the processor.
    """
    if config.max_pending_requests is not None:
        return config.max_pending_requests if config.max_pending_requests > 0 else None
    return FILL * config.num_replicas * config.engine_config.max_num_seqs


def block_rows(config: ProcessorConfig, stages: Sequence[StageConfig]) -> int:
    """Returns how many rows a block needs for every stage that runs over it to get its `batch_size` of them.

    Args:
        config: Settings of the processor.
        stages: Settings of the stages.
    """
    return max([config.batch_size, *(stage.batch_size or 0 for stage in stages)])


def operator_kwargs(config: ProcessorConfig, user: UserFunction, *stages: StageConfig) -> dict[str, Any]:
    """Returns how an operator on the CPU runs, as arguments of `Dataset.map_batches`.

    What the user said for a stage counts before the processor's, and what was said in `map_kwargs` before that.

    Args:
        config: Settings of the processor.
        user: The user's function that runs in the operator.
        *stages: Settings of the stages that run in it.
    """
    on = [stage for stage in stages if stage.enabled]
    sizes = [stage.concurrency for stage in on if stage.concurrency is not None]
    asked: dict[str, Any] = {
        "num_cpus": sum(stage.num_cpus for stage in on if stage.num_cpus) or OPERATOR_CPUS,
        "memory": sum(stage.memory for stage in on if stage.memory) or None,
        "runtime_env": _one_runtime_env(on) or config.runtime_env,
        "concurrency": max(sizes, key=lambda size: size if isinstance(size, int) else size[1]) if sizes else None,
        **{key: value for key, value in user.map_kwargs.items() if key not in ("fn_args", "fn_kwargs")},
    }
    size = asked.pop("concurrency") or (1, config.num_replicas)
    low, high = size if isinstance(size, tuple | list) else (size, size)
    asked.setdefault("compute", ActorPoolStrategy(min_size=low, max_size=high))
    return {key: value for key, value in asked.items() if value is not None}


def generate_kwargs(config: EngineProcessorConfig) -> dict[str, Any]:
    """Returns how the generate operator runs: one process, a thread for each block under way."""
    compute = ActorPoolStrategy(
        size=1,
        max_tasks_in_flight_per_actor=config.max_tasks_in_flight_per_actor,
        max_concurrent_calls_per_actor=config.max_concurrent_batches
        or num_blocks(max_pending_rows(config), config.batch_size),
        enable_true_multi_threading=True,
    )
    kwargs = {"num_cpus": OPERATOR_CPUS, "compute": compute, "runtime_env": config.runtime_env}
    return {key: value for key, value in kwargs.items() if value is not None}


def num_blocks(max_rows: int | None, batch_size: int) -> int:
    """Returns how many blocks must be under way to hold the rows in flight.

    Args:
        max_rows: Rows in flight at once; None for no bound.
        batch_size: Rows of a block.
    """
    wanted = MAX_CONCURRENT_BATCHES if max_rows is None else math.ceil(max_rows / batch_size) + SPARE_BATCHES
    return min(MAX_CONCURRENT_BATCHES, max(FILL, wanted))


def rows_per_block(max_rows: int | None, batch_size: int) -> int:
    """Returns how many rows small blocks are gathered into, so that the blocks under way hold the rows in flight.

    Args:
        max_rows: Rows in flight at once; None for no bound.
        batch_size: Rows of a block that the user asked for.
    """
    return max(batch_size, math.ceil((max_rows or 0) / (MAX_CONCURRENT_BATCHES - SPARE_BATCHES)))


def gathered_rows(config: EngineProcessorConfig) -> int:
    """Returns how many rows small blocks are gathered into before the engine.

    Args:
        config: Settings of the processor.
    """
    if config.max_concurrent_batches is not None:
        return config.batch_size
    return rows_per_block(max_pending_rows(config), config.batch_size)


def pool_config(config: EngineProcessorConfig, operators: Sequence[OperatorKwargs]) -> PoolConfig:
    """Settles what a replica takes, and checks that the job can run beside the replicas.

    Args:
        config: Settings of the processor.
        operators: Arguments of the operators, as from `operator_kwargs` and `generate_kwargs`.

    Returns:
        Settings of the pool.

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


def _num_gpus(config: EngineProcessorConfig, have: Mapping[str, float]) -> float:
    if config.num_gpus_per_replica is not None:
        return config.num_gpus_per_replica
    device = config.engine_config.device
    wants_one = device == "cuda" or (device == "auto" and (config.accelerator_type or have.get("GPU", 0) >= 1))
    return float(config.engine_config.num_ranks) if wants_one else 0.0


def _make_chat_template(config: EngineProcessorConfig) -> Stage:
    chat = config.chat_template_stage
    tokenizer = load_tokenizer(
        _tokenizer_folder(config, chat), chat.chat_template or config.engine_config.chat_template
    )
    return ChatTemplateStage(tokenizer, chat.chat_template_kwargs, stop_on_error=config.stop_on_error)


def _make_tokenize(config: EngineProcessorConfig) -> Stage:
    chat = config.chat_template_stage
    # The same template as the stage before, so that the two share a tokenizer.
    same = chat.chat_template or config.engine_config.chat_template if chat.enabled else None
    tokenizer = load_tokenizer(_tokenizer_folder(config, config.tokenize_stage), same)
    return TokenizeStage(tokenizer, stop_on_error=config.stop_on_error)


def _make_detokenize(config: EngineProcessorConfig) -> Stage:
    tokenizer = load_tokenizer(_tokenizer_folder(config, config.detokenize_stage))
    return DetokenizeStage(tokenizer, stop_on_error=config.stop_on_error)


def _make_reasoning(config: EngineProcessorConfig) -> Stage:
    tokenizer = load_tokenizer(_tokenizer_folder(config, config.reasoning_stage))
    tools = config.tool_call_stage
    marks = find_tool_call_format(tools.parser).marks if tools.enabled else ()
    kind = find_reasoning_format(config.reasoning_stage.parser)
    return ReasoningStage(tokenizer, kind, marks, stop_on_error=config.stop_on_error)


def _make_tool_call(config: EngineProcessorConfig) -> Stage:
    tokenizer = load_tokenizer(_tokenizer_folder(config, config.tool_call_stage))
    kind = find_tool_call_format(config.tool_call_stage.parser)
    reads_content = config.reasoning_stage.enabled
    return ToolCallStage(tokenizer, kind, reads_content=reads_content, stop_on_error=config.stop_on_error)


def _tokenizer_folder(config: EngineProcessorConfig, stage: StageConfig) -> str:
    return stage.model_source or config.engine_config.tokenizer or config.model_source


def _default_params(config: EngineProcessorConfig) -> SamplingParams:
    """Returns the parameters of rows that bring none: the processor's, else those the model's makers recommend."""
    if config.sampling_params is not None:
        return SamplingParams.from_dict(config.sampling_params)
    if config.engine_config.generation_config != "auto":
        return SamplingParams()
    return default_sampling_params(read_generation_config(resolve_model(config.model_source)))


def _one_runtime_env(stages: list[StageConfig]) -> dict[str, Any] | None:
    given = [stage.runtime_env for stage in stages if stage.runtime_env is not None]
    if any(one != given[0] for one in given):
        raise ConfigError(
            "the stages before the engine run in one process, as do those after it: give them one runtime_env"
        )
    return given[0] if given else None
