"""`EngineProcessorConfig`: the settings of a processor: its model, its replicas and its stages.

The names are the names that users of Ray Data LLM know. A config checks the settings of the engine when it is
constructed, without loading the model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PrivateAttr, create_model, field_validator, model_validator

from ...actors import Placement
from ...engine.config import EngineConfig
from ...engine.errors import ConfigError, PoolingParamsError, SamplingParamsError, unknown_key_message
from ...engine.pooling.params import PoolingParams
from ...engine.sampling_params import SamplingParams
from ...engine.structured.grammar_text import check_compiles
from ..pooling.task_types import TASK_TYPES, TaskName, TaskType
from ..pooling.vectors import EmbeddingDtype
from ..settings import Settings
from ..stages.adapters import AdapterNames, absolute_place, read_modules
from ..stages.declaration import Config, StageDeclaration
from ..stages.declared import STAGES
from ..stages.declared.chat_template import ChatTemplateStageConfig
from ..stages.declared.detokenize import DetokenizeStageConfig
from ..stages.declared.reasoning import ReasoningStageConfig
from ..stages.declared.tokenize import TokenizerStageConfig
from ..stages.declared.tool_call import ToolCallStageConfig
from ..stages.stage_config import StageConfig, read_concurrency, read_stage

logger = logging.getLogger(__name__)

LEGACY_STAGES = {
    "apply_chat_template": ("chat_template_stage", "enabled"),
    "chat_template": ("chat_template_stage", "chat_template"),
    "chat_template_kwargs": ("chat_template_stage", "chat_template_kwargs"),
    "tokenize": ("tokenize_stage", "enabled"),
    "detokenize": ("detokenize_stage", "enabled"),
}
"""Flag of an older release of Ray Data LLM -> (field of the stage, setting) that replaced the flag."""

NOT_YET = {
    "has_image": "images",
    "prepare_image_stage": "images",
}
"""Setting of Ray Data LLM -> the feature that it turns on. This release lacks the feature and only accepts off."""

LORA_CONFIG = {
    "dynamic_lora_loading_path": "dynamic_lora_loading_path",
    "max_num_adapters_per_replica": "max_cpu_loras",
}
"""Setting in the `lora_config` of Ray Serve LLM -> our name of it, of a field or of a setting of the engine."""

LORA_WITHOUT_EFFECT = {
    "download_timeout_s": "the silence of a store has a limit of its own, MILLRACE_STORAGE_TIMEOUT_S",
    "max_download_tries": "requests to stores are repeated as storage settings say",
}

WITHOUT_EFFECT = {
    "log_engine_metrics": "replicas always publish their metrics (docs/metrics.md); Processor.stats() has them too",
    "experimental": "there are no experimental settings",
}


class PrepareMultimodalStageConfig(StageConfig):
    """Settings of the stage that would fetch images, audio and video. This release lacks the stage, so it stays off.

    Attributes:
        model_config_kwargs: Settings of the model for the stage.
        chat_template_content_format: Form in which a message's content reaches the template.
        apply_sys_msg_formatting: Whether the content of system messages also gets that form.
    """

    enabled: bool = False
    model_config_kwargs: dict[str, Any] | None = None
    chat_template_content_format: Literal["string", "openai"] = "string"
    apply_sys_msg_formatting: bool = False


class ProcessorConfig(Settings):
    """Settings of any processor.

    Attributes:
        batch_size: Rows per block between stages. Rows of all blocks share the engine, so the number limits no step.
        accelerator_type: Kind of accelerator that a replica asks for, such as ``"H100"``.
        concurrency: Number of replicas; with (min, max), the number follows the amount of work.
        should_continue_on_error: Whether a failed row becomes an error row (`__inference_error__`) or stops the job.
        runtime_env: Ray runtime environment of the processor's operators, and of the replicas.
    """

    batch_size: int = Field(default=128, gt=0)
    accelerator_type: str | None = None
    concurrency: int | tuple[int, int] = 1
    should_continue_on_error: bool = False
    runtime_env: dict[str, Any] | None = None

    @field_validator("concurrency", mode="before")
    @classmethod
    def _read_concurrency(cls, value: Any) -> Any:
        size = read_concurrency(value)
        return size[0] if isinstance(size, tuple) and size[0] == size[1] else size

    @property
    def stop_on_error(self) -> bool:
        """Whether the first failed row stops the job: the opposite of `should_continue_on_error`."""
        return not self.should_continue_on_error

    @property
    def min_replicas(self) -> int:
        """The least number of replicas."""
        return self.concurrency[0] if isinstance(self.concurrency, tuple) else self.concurrency

    @property
    def num_replicas(self) -> int:
        """The greatest number of replicas."""
        return self.concurrency[1] if isinstance(self.concurrency, tuple) else self.concurrency


STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    **{stage.field: type(stage.config) for stage in STAGES if stage.field is not None},
    "prepare_multimodal_stage": PrepareMultimodalStageConfig,
}
"""Field of a processor's config -> class of the settings of the stage that the field configures."""

if TYPE_CHECKING:

    class StageFields(ProcessorConfig):
        """A config with a field for the settings of each declared stage, written out for editors and type checkers."""

        chat_template_stage: ChatTemplateStageConfig = ChatTemplateStageConfig()
        tokenize_stage: TokenizerStageConfig = TokenizerStageConfig()
        detokenize_stage: DetokenizeStageConfig = DetokenizeStageConfig()
        reasoning_stage: ReasoningStageConfig = ReasoningStageConfig(enabled=False)
        tool_call_stage: ToolCallStageConfig = ToolCallStageConfig(enabled=False)

else:
    StageFields = create_model(
        "StageFields",
        __base__=ProcessorConfig,
        **{stage.field: (type(stage.config), stage.config) for stage in STAGES if stage.field is not None},
    )


class EngineProcessorConfig(StageFields):
    """Settings of a processor that runs a model on our engine.

    Attributes:
        model_source: Folder of the model in Hugging Face's layout, or ``"bundled:NAME"``.
        engine_kwargs: Settings of the engine, under the names of vLLM.
        sampling_params: Sampling parameters of rows that bring none; None for the defaults of the model.
        lora_modules: Adapters that rows may name in the column `model`: name -> folder, URL or hub repository; or a
            list of ``"name=place"``. It turns `enable_lora` on, as `dynamic_lora_loading_path` does.
        dynamic_lora_loading_path: Folder or URL whose subfolders are adapters that rows may name. With `enable_lora`
            and neither of the two, the column `model` holds folders or hub repositories.
        task_type: The model's task: ``"generate"``; ``"embed"`` or ``"token_embed"`` for the vector of a prompt or of
            each token; ``"classify"`` or ``"token_classify"`` for probabilities of classes; ``"score"`` for pairs of
            texts; ``"reward"`` for the number that a reward model gives.
        pooling_params: Pooling parameters of rows that bring none; None for the settings of the engine.
        embedding_dtype: Type of the numbers in `embeddings`, which is then a list of fixed size: ``"float32"``,
            ``"float16"``, ``"int8"`` or ``"uint8"`` with a scale for each vector, ``"binary"`` or ``"ubinary"`` for
            signs, eight in a byte. None for lists of 32-bit floats, whose length may differ from row to row.
        score_columns: Columns of the first and of the second texts to score; None for `text_1` and `text_2`, or `query`
            and `document` or `documents`.
        deduplicate: Whether identical requests run once and share the output. If not, each one that samples without a
            seed has draws of its own.
        num_cpus_per_replica: CPUs that a replica asks Ray for; None for an equal share of the CPUs that remain beside
            one read task and our operators, at most 1.
        num_gpus_per_replica: GPUs that a replica asks Ray for; None for one per rank if the engine runs on GPUs,
            otherwise 0.
        placement_group_config: Resources of each rank of a replica (`bundle_per_worker` or `bundles`) and the spread of
            ranks over nodes (`strategy`). It replaces the settings `num_cpus_per_replica` and
            `num_gpus_per_replica`.
        max_pending_requests: Most rows in flight at the replicas, whatever the size of blocks; 0 or less for no limit;
            None for four times the sequences that all replicas can run at once.
        max_concurrent_batches: Most blocks under way in the generate stage; None for as many as hold the most rows
            in flight, and two more, but at least 4 and at most 128.
        max_tasks_in_flight_per_actor: Most blocks submitted to the generate stage; None for twice the number under way.
        chat_template_stage: Stage that renders `messages`: on, off, or its settings.
        tokenize_stage: Stage that tokenises `prompt` outside of the engine.
        detokenize_stage: Stage that decodes the generated tokens to text outside of the engine.
        reasoning_stage: Stage that separates the model's reasoning from its answer; off unless it is given a parser.
        tool_call_stage: Stage that reads tool calls; off unless it is given a parser.
        prepare_multimodal_stage: A stage that this release does not have; it stays off.
    """

    model_source: str
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    sampling_params: dict[str, Any] | None = None
    lora_modules: dict[str, str] | None = None
    dynamic_lora_loading_path: str | None = None
    task_type: TaskName = "generate"
    pooling_params: dict[str, Any] | None = None
    embedding_dtype: EmbeddingDtype | None = None
    score_columns: tuple[str, str] | None = None
    deduplicate: bool = True
    num_cpus_per_replica: float | None = Field(default=None, gt=0)
    num_gpus_per_replica: float | None = Field(default=None, ge=0)
    placement_group_config: dict[str, Any] | None = None
    max_concurrent_batches: int | None = Field(default=None, gt=0)
    max_pending_requests: int | None = None
    max_tasks_in_flight_per_actor: int | None = Field(default=None, gt=0)
    prepare_multimodal_stage: PrepareMultimodalStageConfig = PrepareMultimodalStageConfig()

    _engine_config: EngineConfig = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _read_names_of_ray(cls, values: Any) -> Any:
        return _translate(dict(values)) if isinstance(values, Mapping) else values

    @field_validator("lora_modules", mode="before")
    @classmethod
    def _read_modules(cls, value: Any) -> dict[str, str] | None:
        modules = read_modules(value)
        return modules and {name: absolute_place(place, Path.cwd()) for name, place in modules.items()}

    @field_validator("dynamic_lora_loading_path")
    @classmethod
    def _read_loading_path(cls, value: str | None) -> str | None:
        if value == "":
            raise ConfigError("dynamic_lora_loading_path is empty; pass a folder or URL, or None")
        return value if value is None or "://" in value else os.path.abspath(os.path.expanduser(value))

    @field_validator("task_type", mode="before")
    @classmethod
    def _refuse_other_tasks(cls, value: Any) -> Any:
        if not isinstance(value, str) or value not in TASK_TYPES:
            allowed = ", ".join(map(repr, TASK_TYPES))
            raise ConfigError(f"task_type must be {allowed}; got {value!r:.80}")
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
        if callable(kwargs.get("hf_overrides")):
            raise ConfigError(
                "hf_overrides is a function, which only LLM takes; pass a dict, which is sent to other machines and "
                "stored with a job"
            )
        if kwargs["model"] != self.model_source:
            raise ConfigError(
                f"engine_kwargs name the model {kwargs['model']!r} and model_source {self.model_source!r}; drop one"
            )
        self._engine_config = EngineConfig.from_kwargs(**kwargs)
        self._check_adapters()
        self._check_task()
        if self.placement_group_config is not None:
            Placement.read(self.placement_group_config, self._engine_config.num_ranks)
            if self.num_cpus_per_replica is not None or self.num_gpus_per_replica is not None:
                logger.warning("num_cpus_per_replica and num_gpus_per_replica give way to placement_group_config")
        return self

    def _check_adapters(self) -> None:
        named = [name for name in ("lora_modules", "dynamic_lora_loading_path") if getattr(self, name) is not None]
        if named and not self._engine_config.enable_lora:
            raise ConfigError(f"{' and '.join(named)} need enable_lora, and engine_kwargs say False; drop one")
        for name in self.adapter_names.base_names:
            if name in (self.lora_modules or {}):
                raise ConfigError(
                    f"lora_modules name {name!r:.80}, which is the model itself; name the adapter otherwise"
                )
        if self.adapter_names.takes_places:
            logger.warning(
                "rows name folders and hub repositories of adapters in the column 'model', and the engine reads them; "
                "lora_modules or dynamic_lora_loading_path say which ones rows may name"
            )

    def _check_task(self) -> None:
        asked, task = self._engine_config, self.task
        expected = task.engine or {"task": ("auto", "generate"), "runner": ("auto", "generate")}
        for name, values in expected.items():
            value = getattr(asked, name)
            if value not in ((values,) if isinstance(values, str) else values):
                raise ConfigError(
                    f"engine_kwargs ask for {name}={value!r}, and task_type is {task.name!r}; say it once, with "
                    "task_type"
                )
        for stage in self.declared_stages if self.is_pooling else ():
            # A stage that is on by default is dropped silently. One that is off by default was asked for by the user.
            if stage.reads_generated and not stage.config.enabled and self.stage_config(stage).enabled:
                raise ConfigError(
                    f"{stage.field} reads generated text, and task_type={self.task_type!r} generates none"
                )
        if self.is_pooling and self.sampling_params is not None:
            raise ConfigError(f"sampling_params are for generation, and task_type is {self.task_type!r}; drop them")
        self._check_pooling()

    def _check_pooling(self) -> None:
        asked = {
            "pooling_params": (self.pooling_params, self.is_pooling),
            "embedding_dtype": (self.embedding_dtype, self.task.makes_vectors),
            "score_columns": (self.score_columns, self.task.reads_pairs),
        }
        for name, (value, is_read) in asked.items():
            if value is not None and not is_read:
                raise ConfigError(f"{name} has no use with task_type={self.task_type!r}; drop it")
        try:
            self.default_pooling_params  # noqa: B018  # the property checks the parameters
        except PoolingParamsError as error:
            raise ConfigError(f"pooling_params: {error}") from error

    @property
    def is_pooling(self) -> bool:
        """Whether the engine computes a vector for each prompt and generates no text."""
        return self.task.is_pooling

    @property
    def reads_pairs(self) -> bool:
        """Whether a row has pairs of texts in place of a prompt."""
        return self.task.reads_pairs

    @property
    def task(self) -> TaskType:
        """The task that `task_type` names."""
        return TASK_TYPES[self.task_type]

    @property
    def default_pooling_params(self) -> PoolingParams:
        """The pooling parameters of rows that bring none."""
        return PoolingParams.from_dict({**self.task.pooling, **(self.pooling_params or {})})

    @property
    def all_engine_kwargs(self) -> dict[str, Any]:
        """The settings of the engine: `engine_kwargs`, and the settings that other fields of this config determine."""
        has_adapters = self.lora_modules is not None or self.dynamic_lora_loading_path is not None
        lora = {"enable_lora": True} if has_adapters else {}
        return {"model": self.model_source, **self.task.engine, **lora, **self.engine_kwargs}

    @property
    def adapter_names(self) -> AdapterNames:
        """The names of the model, and the adapters that rows may name."""
        served = self.engine_kwargs.get("served_model_name") or ()
        names = (self.model_source, *([served] if isinstance(served, str) else served))
        modules, path = self.lora_modules or {}, self.dynamic_lora_loading_path
        takes_places = self._engine_config.enable_lora and self.lora_modules is None and path is None
        return AdapterNames(names, modules, path, takes_places)

    @property
    def engine_config(self) -> EngineConfig:
        """The checked engine settings."""
        return self._engine_config

    @property
    def tokenizer_source(self) -> str:
        """Folder of the model's tokenizer."""
        return self._engine_config.tokenizer or self.model_source

    @property
    def declared_stages(self) -> Sequence[StageDeclaration[Any]]:
        """The stages that the processor may have, in the order in which they run."""
        return STAGES

    def stage_config(self, stage: StageDeclaration[Config]) -> Config:
        """Returns the settings of a stage.

        Args:
            stage: One of `declared_stages`.
        """
        return stage.config if stage.field is None else getattr(self, stage.field)


vLLMEngineProcessorConfig = EngineProcessorConfig  # noqa: N816  # Ray Data LLM has this name


def _translate(values: dict[str, Any]) -> dict[str, Any]:
    """Returns settings with names of Ray Data LLM replaced or dropped; raises if one asks for a missing feature."""
    for name, feature in NOT_YET.items():
        value = values.pop(name, None)
        if value and not (isinstance(value, Mapping) and value.get("enabled") is False):
            raise ConfigError(f"{name}={value!r:.80} needs {feature}, which this release does not have")
    for name, reason in WITHOUT_EFFECT.items():
        value = values.pop(name, None)
        if value not in (None, True, {}):
            logger.warning("%s=%r is ignored: %s", name, value, reason)
    _translate_lora_config(values)
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


def _translate_lora_config(values: dict[str, Any]) -> None:
    """Replaces `lora_config`, the adapters' settings of Ray Serve LLM, by the settings that we have for them."""
    given = values.pop("lora_config", None)
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise ConfigError(f"lora_config must be a dict; got {type(given).__name__} {given!r:.80}")
    for name, value in given.items():
        if name in LORA_WITHOUT_EFFECT:
            logger.warning("lora_config: %s=%r is ignored: %s", name, value, LORA_WITHOUT_EFFECT[name])
        elif name not in LORA_CONFIG:
            raise ConfigError(unknown_key_message("lora_config", name, [*LORA_CONFIG, *LORA_WITHOUT_EFFECT]))
    asked = {LORA_CONFIG[name]: value for name, value in given.items() if name in LORA_CONFIG and value is not None}
    kwargs = {**values.get("engine_kwargs", {})}
    for name, value in asked.items():
        holder = kwargs if name == "max_cpu_loras" else values
        if holder.get(name) not in (None, value):
            raise ConfigError(
                f"lora_config says {name}={value!r:.80}, and another setting {holder[name]!r:.80}; drop one"
            )
        holder[name] = value
    values["engine_kwargs"] = {"enable_lora": True, **kwargs}
