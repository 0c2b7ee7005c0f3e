"""Settings of a processor: which model, how many replicas, which stages.

The names are those that users of Ray Data LLM know. Engine settings are checked here, when the config is made, and no
model is loaded for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

from pydantic import Field, PrivateAttr, field_validator, model_validator

from ...actors import Placement
from ...engine.config import EngineConfig
from ...engine.errors import ConfigError, SamplingParamsError
from ...engine.sampling_params import SamplingParams
from ...engine.structured.grammar_text import check_compiles
from ..answers.reasoning import find_reasoning_format
from ..answers.tool_calls import find_tool_call_format
from ..settings import Settings

logger = logging.getLogger(__name__)

AnyStageConfig = TypeVar("AnyStageConfig", bound="StageConfig")

LEGACY_STAGES = {
    "apply_chat_template": ("chat_template_stage", "enabled"),
    "chat_template": ("chat_template_stage", "chat_template"),
    "chat_template_kwargs": ("chat_template_stage", "chat_template_kwargs"),
    "tokenize": ("tokenize_stage", "enabled"),
    "detokenize": ("detokenize_stage", "enabled"),
}
"""Flags of older releases of Ray Data LLM -> the stage and the setting they became."""

TaskType = Literal["generate", "embed", "classify"]
TASK_TYPES = get_args(TaskType)

NOT_YET = {
    "has_image": "images",
    "prepare_image_stage": "images",
    "dynamic_lora_loading_path": "adapters chosen by row",
}
"""Settings of Ray Data LLM whose feature this release does not have: anything but off is refused."""

WITHOUT_EFFECT = {
    "log_engine_metrics": "replicas always publish their metrics (docs/metrics.md); Processor.stats() has them too",
    "experimental": "there are no experimental settings",
}


class StageConfig(Settings):
    """Settings that every stage has. None takes the processor's value.

    Attributes:
        enabled: Whether the stage runs.
        model_source: Folder of another model's tokenizer.
        concurrency: Number of processes of the operator the stage runs in, fixed or as (min, max).
        num_cpus: CPUs of one such process.
        memory: Bytes of memory of one such process.
        runtime_env: Ray runtime environment of the operator.
        batch_size: Rows that the stage is given at once, at most; None for all rows of a block.
    """

    enabled: bool = True
    model_source: str | None = None
    concurrency: int | tuple[int, int] | None = None
    num_cpus: float | None = Field(default=None, gt=0)
    memory: float | None = Field(default=None, gt=0)
    runtime_env: dict[str, Any] | None = None
    batch_size: int | None = Field(default=None, gt=0)

    @field_validator("concurrency", mode="before")
    @classmethod
    def _read_concurrency(cls, value: Any) -> Any:
        return None if value is None else _pool_size(value)


class ChatTemplateStageConfig(StageConfig):
    """The stage that renders `messages`.

    Attributes:
        chat_template: Jinja text or file that replaces the model's template.
        chat_template_kwargs: Variables of the template, such as `enable_thinking`.
    """

    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizerStageConfig(StageConfig):
    """The stage that tokenises `prompt`."""


class DetokenizeStageConfig(StageConfig):
    """The stage that makes text of `generated_tokens`."""


class PrepareMultimodalStageConfig(StageConfig):
    """The stage that would fetch images, audio and video. This release has none: it stays off.

    Attributes:
        model_config_kwargs: Settings of the model for it.
        chat_template_content_format: How a message's content reaches the template.
        apply_sys_msg_formatting: Whether system messages are brought into that form too.
    """

    enabled: bool = False
    model_config_kwargs: dict[str, Any] | None = None
    chat_template_content_format: Literal["string", "openai"] = "string"
    apply_sys_msg_formatting: bool = False


class ReasoningStageConfig(StageConfig):
    """The stage that splits `generated_text` into `reasoning_content` and `content`.

    Attributes:
        parser: How the model marks its reasoning: a name in `reasoning.REASONING_FORMATS`.
    """

    parser: str = ""

    @model_validator(mode="after")
    def _check_parser(self) -> ReasoningStageConfig:
        if self.enabled:
            find_reasoning_format(self.parser)
        return self


class ToolCallStageConfig(StageConfig):
    """The stage that takes `tool_calls` out of `generated_text` and leaves `content`.

    Attributes:
        parser: How the model writes calls: a name in `tool_calls.TOOL_CALL_FORMATS`.
    """

    parser: str = ""

    @model_validator(mode="after")
    def _check_parser(self) -> ToolCallStageConfig:
        if self.enabled:
            find_tool_call_format(self.parser)
        return self


STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    "chat_template_stage": ChatTemplateStageConfig,
    "tokenize_stage": TokenizerStageConfig,
    "detokenize_stage": DetokenizeStageConfig,
    "reasoning_stage": ReasoningStageConfig,
    "tool_call_stage": ToolCallStageConfig,
    "prepare_multimodal_stage": PrepareMultimodalStageConfig,
}
"""Field of a processor -> the class of its settings."""


class ProcessorConfig(Settings):
    """Settings of any processor.

    Attributes:
        batch_size: Rows per block between stages. Rows of all blocks share the engine, so it bounds no batch there.
        accelerator_type: Kind of accelerator a replica asks for, such as ``"H100"``.
        concurrency: Number of replicas; (min, max) for as many as the work needs.
        should_continue_on_error: Whether a failed row becomes an error row (`__inference_error__`) or stops the job.
        runtime_env: Ray runtime environment of our operators, and of the replicas.
    """

    batch_size: int = Field(default=128, gt=0)
    accelerator_type: str | None = None
    concurrency: int | tuple[int, int] = 1
    should_continue_on_error: bool = False
    runtime_env: dict[str, Any] | None = None

    @field_validator("concurrency", mode="before")
    @classmethod
    def _read_concurrency(cls, value: Any) -> Any:
        size = _pool_size(value)
        return size[0] if isinstance(size, tuple) and size[0] == size[1] else size

    @property
    def stop_on_error(self) -> bool:
        """Whether the first failed row stops the job."""
        return not self.should_continue_on_error

    @property
    def min_replicas(self) -> int:
        """The fewest replicas of the model."""
        return self.concurrency[0] if isinstance(self.concurrency, tuple) else self.concurrency

    @property
    def num_replicas(self) -> int:
        """The most replicas of the model."""
        return self.concurrency[1] if isinstance(self.concurrency, tuple) else self.concurrency


class EngineProcessorConfig(ProcessorConfig):
    """Settings of a processor that runs a model on our engine.

    Attributes:
        model_source: Folder of the model in Hugging Face's layout, or ``"bundled:NAME"``.
        engine_kwargs: Settings of the engine, under the names that users of vLLM know.
        sampling_params: Sampling parameters of rows that bring none; None takes the model's own defaults.
        task_type: What the model does: ``"generate"``, ``"embed"`` or ``"classify"``. The last two add `embeddings`.
        deduplicate: Whether identical requests run once and share the output, which is that of each of them.
        num_cpus_per_replica: CPUs a replica asks Ray for; None for what is left by one task and our operators, at
            most 1.
        num_gpus_per_replica: GPUs a replica asks Ray for; None for 1 where the cluster has some, else 0.
        placement_group_config: What each rank of a replica takes of the cluster and how ranks are spread over nodes:
            `bundle_per_worker` or `bundles`, and `strategy`. It replaces the CPUs and GPUs above.
        max_pending_requests: Rows in flight at the replicas at once, whatever the size of blocks; 0 or less for no
            bound; None for four times the replicas' `max_num_seqs` places.
        max_concurrent_batches: Blocks under way in the generate stage at once; None for as many as hold the rows in
            flight and some more.
        max_tasks_in_flight_per_actor: Blocks given to the generate stage at once; None for twice as many as are under
            way.
        chat_template_stage: Stage that renders `messages`: on, off, or its settings.
        tokenize_stage: Stage that tokenises `prompt`, away from the engine.
        detokenize_stage: Stage that makes the text, away from the engine.
        reasoning_stage: Stage that tells the model's reasoning from its answer; off unless given its parser.
        tool_call_stage: Stage that reads tool calls; off unless given its parser.
        prepare_multimodal_stage: Not there yet: it stays off.
    """

    model_source: str
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    sampling_params: dict[str, Any] | None = None
    task_type: TaskType = "generate"
    deduplicate: bool = True
    num_cpus_per_replica: float | None = Field(default=None, gt=0)
    num_gpus_per_replica: float | None = Field(default=None, ge=0)
    placement_group_config: dict[str, Any] | None = None
    max_concurrent_batches: int | None = Field(default=None, gt=0)
    max_pending_requests: int | None = None
    max_tasks_in_flight_per_actor: int | None = Field(default=None, gt=0)
    chat_template_stage: ChatTemplateStageConfig = ChatTemplateStageConfig()
    tokenize_stage: TokenizerStageConfig = TokenizerStageConfig()
    detokenize_stage: DetokenizeStageConfig = DetokenizeStageConfig()
    reasoning_stage: ReasoningStageConfig = ReasoningStageConfig(enabled=False)
    tool_call_stage: ToolCallStageConfig = ToolCallStageConfig(enabled=False)
    prepare_multimodal_stage: PrepareMultimodalStageConfig = PrepareMultimodalStageConfig()

    _engine_config: EngineConfig = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _read_names_of_ray(cls, values: Any) -> Any:
        return _translate(dict(values)) if isinstance(values, Mapping) else values

    @field_validator("task_type", mode="before")
    @classmethod
    def _refuse_other_tasks(cls, value: Any) -> Any:
        if value not in TASK_TYPES:
            allowed = ", ".join(map(repr, TASK_TYPES))
            raise ConfigError(f"task_type={value!r} is not there yet; this release does {allowed}")
        return value

    @field_validator(*STAGE_CONFIGS, mode="before")
    @classmethod
    def _read_stage(cls, value: Any, info: Any) -> Any:
        return read_stage(value, STAGE_CONFIGS[info.field_name], info.field_name)

    @field_validator("prepare_multimodal_stage")
    @classmethod
    def _refuse_multimodal(cls, value: PrepareMultimodalStageConfig) -> PrepareMultimodalStageConfig:
        if value.enabled:
            raise ConfigError(
                "prepare_multimodal_stage needs images, audio and video, which this release does not have"
            )
        return value

    @field_validator("sampling_params")
    @classmethod
    def _check_sampling_params(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            try:
                check_compiles(SamplingParams.from_dict(value).structured_outputs)
            except SamplingParamsError as error:
                raise ConfigError(f"sampling_params: {error}") from error
        return value

    @model_validator(mode="after")
    def _check_engine_kwargs(self) -> EngineProcessorConfig:
        kwargs = self.all_engine_kwargs
        if kwargs["model"] != self.model_source:
            raise ConfigError(
                f"engine_kwargs name the model {kwargs['model']!r} and model_source {self.model_source!r}; drop one"
            )
        self._engine_config = EngineConfig.from_kwargs(**kwargs)
        self._check_task()
        if self.placement_group_config is not None:
            Placement.read(self.placement_group_config, self._engine_config.num_ranks)
            if self.num_cpus_per_replica is not None or self.num_gpus_per_replica is not None:
                logger.warning("num_cpus_per_replica and num_gpus_per_replica give way to placement_group_config")
        return self

    def _check_task(self) -> None:
        asked = self._engine_config.task
        fits = asked == self.task_type if self.pools else asked in ("auto", "generate")
        if not fits or (self._engine_config.runner == "pooling" and not self.pools):
            raise ConfigError(
                f"engine_kwargs ask for task={asked!r} and runner={self._engine_config.runner!r}, and task_type is "
                f"{self.task_type!r}; say it once, with task_type"
            )
        for name in ("reasoning_stage", "tool_call_stage") if self.pools else ():
            if getattr(self, name).enabled:
                raise ConfigError(f"{name} reads generated text, and task_type={self.task_type!r} generates none")
        if self.pools and self.sampling_params is not None:
            raise ConfigError(f"sampling_params are for generation, and task_type is {self.task_type!r}; drop them")

    @property
    def pools(self) -> bool:
        """Whether prompts are made vectors, and nothing is generated."""
        return self.task_type != "generate"

    @property
    def all_engine_kwargs(self) -> dict[str, Any]:
        """The settings of the engine, those among them that other fields say."""
        task = {"task": self.task_type} if self.pools else {}
        return {"model": self.model_source, **task, **self.engine_kwargs}

    @property
    def engine_config(self) -> EngineConfig:
        """The checked engine settings."""
        return self._engine_config


vLLMEngineProcessorConfig = EngineProcessorConfig  # noqa: N816  # the name that users of Ray Data LLM import


def read_stage(value: Any, kind: type[AnyStageConfig], field: str) -> AnyStageConfig:
    """Returns the settings of a stage in whichever of three ways they were given.

    Args:
        value: A bool, a dict of settings, or the settings.
        kind: Their class.
        field: The field they were given to.

    Raises:
        ConfigError: It is none of these, or a setting is wrong.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, bool):
        return kind(enabled=value)
    if isinstance(value, Mapping):
        return kind(**value)
    raise ConfigError(f"{field} must be a bool, a dict or a {kind.__name__}; got {type(value).__name__} {value!r:.80}")


def _pool_size(value: Any) -> int | tuple[int, int]:
    """Reads a number of processes, or (min, max), in the spellings Ray Data LLM takes."""
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise ConfigError(f"concurrency must be a positive integer or (min, max); got {value!r}")
        low, high = (_positive_int(one) for one in value)
        if low > high:
            raise ConfigError(f"concurrency must have min at most max; got min > max in {value!r}")
        return low, high
    return _positive_int(value)


def _positive_int(value: Any) -> int:
    try:
        number = int(float(value)) if not isinstance(value, bool) and float(value) == int(float(value)) else 0
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1:
        raise ConfigError(f"concurrency must be a positive integer or (min, max) of them; got {value!r}")
    return number


def _translate(values: dict[str, Any]) -> dict[str, Any]:
    """Turns what only Ray Data LLM has, or once had, into our settings: with a warning, or an error."""
    for name, feature in NOT_YET.items():
        value = values.pop(name, None)
        if value and not (isinstance(value, Mapping) and value.get("enabled") is False):
            raise ConfigError(f"{name}={value!r:.80} needs {feature}, which this release does not have")
    for name, reason in WITHOUT_EFFECT.items():
        value = values.pop(name, None)
        if value not in (None, True, {}):
            logger.warning("%s=%r is ignored: %s", name, value, reason)
    for name, (field, key) in LEGACY_STAGES.items():
        if name not in values:
            continue
        value = values.pop(name)
        logger.warning("%s is the name of an older release; use %s={%r: ...}", name, field, key)
        stage = values.get(field, {})
        if not isinstance(stage, dict):
            raise ConfigError(f"{name} and {field} are both given; use {field} only")
        values[field] = {**stage, key: value}
    return values
