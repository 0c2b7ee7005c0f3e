"""`JobConfig`: the input, prompt, model, engine and output of a job."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ...engine import EngineConfig, PoolingParams, SamplingParams
from ...engine.errors import ConfigError, PoolingParamsError, SamplingParamsError
from ...engine.structured.grammar_text import check_compiles
from ..pooling.task_types import TASK_TYPES, TaskName, TaskType
from ..pooling.vectors import EmbeddingDtype
from ..report.prices import Prices
from ..settings import Settings
from ..sinks.formats import OutputFormat
from ..sources.formats import InputFormat
from ..stages.adapters import absolute_place, read_modules
from .template import Template

RowSetting = Literal["tools", "chat_template", "chat_template_kwargs"]


class MessageTemplate(Settings):
    """One message of the conversation that a row becomes.

    Attributes:
        role: ``"system"``, ``"user"`` or ``"assistant"``.
        content: Text with {column} fields.
    """

    role: str
    content: str


class JobConfig(Settings):
    """A job: a model runs over the rows of files, and writes files.

    Attributes:
        model: Folder of the model, or ``"bundled:NAME"``.
        input: File, folder, pattern, or a list of these.
        output: Folder to write files to; a path or a URL.
        format: Format of the input; None to tell it by the extensions of the files, or by the log of a table.
        output_format: Format of the output: of its files, or of the table that the output folder becomes.
        endpoint_url: Address of the store behind ``s3://``, if it is not Amazon's.
        columns_as_text: Columns of CSV or JSON lines that are read as text whatever their values look like; None for no
            column.
        prompt: Text with {column} fields.
        messages: Conversation with {column} fields, which the model's chat template renders. With neither `prompt` nor
            `messages`, the input must have a column of one of these names.
        sampling: Sampling parameters; None for the model's own.
        lora_modules: LoRA adapters that rows may name in the column `model` of the input: name of an adapter -> its
            folder, URL or hub repository.
        dynamic_lora_loading_path: Folder or URL whose subfolders are LoRA adapters that rows may name in the column
            `model` of the input.
        engine: Settings of the engine.
        replicas: Number of copies of the model.
        batch_size: Rows per block; None for 128, or 1024 where the input has 100,000 rows or more.
        on_error: Effect of a failed row: with ``"row"`` it becomes an error row, with ``"stop"`` the job ends.
        row_settings: Columns of the input that hold settings of their row: `tools`, `chat_template` or
            `chat_template_kwargs`; None for no column. A column that is not listed has no effect on the prompt.
        columns: Columns of the input to keep; None for all.
        output_column: Name of the column of the answer; None for `generated_text`, `embeddings`, `probs`, `score` or
            `reward`, as the task has it.
        seed: Seed of the rows' draws; None for the engine's `seed`.
        limit: Most rows to run; None for all.
        key: Columns whose values identify a row when the job is resumed; None to identify it by its place in the input.
        order: Order of the rows of the output: ``"any"``, or ``"input"`` for the order of the input.
        max_rows_per_file: Most rows of a file of the output.
        flush_interval_s: Seconds after which a finished row is durable.
        dedup: Whether identical rows run once. If not, each of them has draws of its own.
        task_type: The model's task: ``"generate"``, ``"embed"``, ``"classify"``, ``"score"``, ``"token_embed"``,
            ``"token_classify"`` or ``"reward"``.
        pooling: Pooling parameters, such as `dimensions`; None for the settings of the engine.
        embedding_dtype: Type of the numbers of vectors: ``"float32"``, ``"float16"``, ``"int8"``, ``"uint8"``,
            ``"binary"`` or ``"ubinary"``; None for ``"float32"``.
        score_columns: Two columns of the input, with the first and the second texts to score; None for `text_1` and
            `text_2`, or `query` and `document` or `documents`.
        prices: Prices for plan and report: a table, or the path of a YAML or JSON file with a table.
    """

    model: str = Field(min_length=1)
    input: str | list[str] = Field(min_length=1)
    output: str = Field(min_length=1)
    format: InputFormat | None = None
    columns_as_text: list[str] | None = None
    prompt: str | None = None
    messages: list[MessageTemplate] | None = None
    sampling: dict[str, Any] | None = None
    lora_modules: dict[str, str] | None = None
    dynamic_lora_loading_path: str | None = Field(default=None, min_length=1)
    engine: dict[str, Any] = Field(default_factory=dict)
    replicas: int = Field(default=1, gt=0, lt=2**31)
    batch_size: int | None = Field(default=None, gt=0, lt=2**31)
    on_error: Literal["row", "stop"] = "row"
    row_settings: list[RowSetting] | None = None
    columns: list[str] | None = None
    output_column: str | None = Field(default=None, min_length=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    limit: int | None = Field(default=None, gt=0, lt=2**63)
    output_format: OutputFormat = "parquet"
    endpoint_url: str | None = None
    key: list[str] | None = Field(default=None, min_length=1)
    order: Literal["any", "input"] = "any"
    max_rows_per_file: int = Field(default=50_000, gt=0, lt=2**63)
    flush_interval_s: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    dedup: bool = True
    task_type: TaskName = "generate"
    pooling: dict[str, Any] | None = None
    embedding_dtype: EmbeddingDtype | None = None
    score_columns: list[str] | None = Field(default=None, min_length=2, max_length=2)
    prices: Prices | None = None

    @field_validator("sampling")
    @classmethod
    def _check_sampling(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            try:
                check_compiles(SamplingParams.from_dict(value).structured_outputs)
            except SamplingParamsError as error:
                raise ConfigError(f"sampling: {error}") from error
        return value

    @field_validator("pooling")
    @classmethod
    def _check_pooling(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            PoolingParams.from_dict(value or {})
        except PoolingParamsError as error:
            raise ConfigError(f"pooling: {error}") from error
        return value

    @field_validator("lora_modules", mode="before")
    @classmethod
    def _read_modules(cls, value: Any) -> dict[str, str] | None:
        return read_modules(value)

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "model" in value:
            raise ConfigError("engine: leave out model; it is a field of the job")
        try:
            EngineConfig.check_kwargs(model="any", **value)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"engine: {error}") from error
        return value

    @model_validator(mode="after")
    def _check_text(self) -> JobConfig:
        shown = self.model_dump(include={"prompt", "messages", "output_column", "columns", "key", "columns_as_text"})
        for name, value in shown.items():
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ConfigError(
                    f"{name} holds half of a surrogate pair, which is no text; got {value!r:.100}"
                ) from None
        return self

    @model_validator(mode="after")
    def _check_order(self) -> JobConfig:
        if self.order == "input" and self.key is not None:
            raise ConfigError("order: input needs the place of a row in the input, and key replaces it; drop one")
        return self

    @model_validator(mode="after")
    def _check_prompt(self) -> JobConfig:
        if self.prompt is not None and self.messages is not None:
            raise ConfigError("prompt and messages are both given; keep one")
        if self.messages == []:
            raise ConfigError("messages is empty; give at least one message with role and content")
        try:
            self.templates()
        except ConfigError as error:
            raise ConfigError(f"{'messages' if self.prompt is None else 'prompt'}: {error}") from None
        return self

    @model_validator(mode="after")
    def _check_task(self) -> JobConfig:
        task = self.task
        asked = {
            "sampling": (self.sampling, not task.is_pooling),
            "pooling": (self.pooling, task.is_pooling),
            "embedding_dtype": (self.embedding_dtype, task.makes_vectors),
            "score_columns": (self.score_columns, task.reads_pairs),
            "prompt": (self.prompt, not task.reads_pairs),
            "messages": (self.messages, not task.reads_pairs),
        }
        for name, (value, is_read) in asked.items():
            if value is not None and not is_read:
                raise ConfigError(f"{name} has no use with task_type={task.name!r}; drop it")
        return self

    @property
    def task(self) -> TaskType:
        """The task that `task_type` names."""
        return TASK_TYPES[self.task_type]

    @property
    def answer_column(self) -> str:
        """The name of the column of the answer."""
        return self.output_column or self.task.answers[0]

    def templates(self) -> list[Template]:
        """Returns the parsed template of the prompt, or of each message."""
        texts = [self.prompt] if self.prompt is not None else [one.content for one in self.messages or []]
        return [Template.parse(text) for text in texts]

    @property
    def has_adapters(self) -> bool:
        """Whether rows may name adapters in the column `model` of the input."""
        named = self.lora_modules is not None or self.dynamic_lora_loading_path is not None
        return named or bool(self.engine.get("enable_lora"))

    def engine_kwargs(self) -> dict[str, Any]:
        """Returns the engine's settings, including the job's seed."""
        return self.engine if self.seed is None else {**self.engine, "seed": self.seed}

    def relative_to(self, folder: Path) -> JobConfig:
        """Returns the job with its relative paths resolved against the folder of its job file."""
        inputs = [self.input] if isinstance(self.input, str) else self.input
        model = self.model
        if not model.startswith("bundled:") and os.path.exists(folder / model):
            model = str(folder / model)
        modules, path = self.lora_modules, self.dynamic_lora_loading_path
        return self.model_copy(
            update={
                "model": model,
                "lora_modules": modules and {name: absolute_place(place, folder) for name, place in modules.items()},
                "dynamic_lora_loading_path": path and _from_folder(folder, path),
                "input": [_from_folder(folder, one) for one in inputs],
                "output": _from_folder(folder, self.output),
            }
        )


def _from_folder(folder: Path, path: str) -> str:
    return path if "://" in path else str(folder / os.path.expanduser(path))
