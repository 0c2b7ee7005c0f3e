"""`JobConfig`: what to read, what to ask, what to run it on, where to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ...engine import EngineConfig, SamplingParams
from ...engine.errors import ConfigError, SamplingParamsError
from ...engine.structured.grammar_text import check_compiles
from ..columns import GENERATED_TEXT
from ..report.prices import Prices
from ..settings import Settings
from ..sinks.formats import OutputFormat
from ..sources.formats import InputFormat
from .template import Template


class MessageTemplate(Settings):
    """One message of the conversation that a row becomes.

    Attributes:
        role: ``"system"``, ``"user"`` or ``"assistant"``.
        content: Text with {column} fields.
    """

    role: str
    content: str


class JobConfig(Settings):
    """A job: rows of files through a model into files.

    Attributes:
        model: Folder of the model, or ``"bundled:NAME"``.
        input: File, folder, pattern, or a list of these.
        output: Folder to write files to; a path or a URL.
        format: Format of the input; None to tell it by the extensions of the files, or by the log of a table.
        output_format: Format of the output: of its files, or of the table that the output folder becomes.
        endpoint_url: Where ``s3://`` leads, for stores that are not Amazon's.
        prompt: Text with {column} fields.
        messages: Conversation with {column} fields, rendered by the model's chat template. With neither `prompt` nor
            `messages`, rows bring a column of one of these names.
        sampling: Sampling parameters; None for the model's own.
        engine: Settings of the engine.
        replicas: Number of copies of the model.
        batch_size: Rows per block; None for 128, or 1024 where the input has 100,000 rows or more.
        on_error: What a failed row does: ``"row"`` makes it an error row, ``"stop"`` ends the job.
        columns: Columns of the input to keep; None for all.
        output_column: Name of the column of the generated text.
        seed: Seed of the rows' draws; the engine's `seed` if None.
        limit: Rows to run at most; None for all.
        key: Columns by whose values a row is known when the job is resumed; None for its place in the input.
        order: ``"any"``, or ``"input"`` for rows in the order of the input.
        max_rows_per_file: Most rows of a file of the output.
        flush_interval_s: Seconds after which a finished row is durable.
        dedup: Whether identical rows run once.
        prices: What things cost, for plan and report: a table, or the path of a YAML or JSON file with one.
    """

    model: str
    input: str | list[str]
    output: str
    format: InputFormat | None = None
    prompt: str | None = None
    messages: list[MessageTemplate] | None = None
    sampling: dict[str, Any] | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
    replicas: int = Field(default=1, gt=0)
    batch_size: int | None = Field(default=None, gt=0)
    on_error: Literal["row", "stop"] = "row"
    columns: list[str] | None = None
    output_column: str = GENERATED_TEXT
    seed: int | None = None
    limit: int | None = Field(default=None, gt=0)
    output_format: OutputFormat = "parquet"
    endpoint_url: str | None = None
    key: list[str] | None = Field(default=None, min_length=1)
    order: Literal["any", "input"] = "any"
    max_rows_per_file: int = Field(default=50_000, gt=0)
    flush_interval_s: float = Field(default=5.0, gt=0)
    dedup: bool = True
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

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            EngineConfig.check_kwargs(model="any", **value)
        except ConfigError as error:
            raise ConfigError(f"engine: {error}") from error
        except TypeError as error:
            raise ConfigError("engine: leave out model; it is a field of the job") from error
        return value

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

    def templates(self) -> list[Template]:
        """Returns the parsed templates: of the prompt, or of each message."""
        texts = [self.prompt] if self.prompt is not None else [one.content for one in self.messages or []]
        return [Template.parse(text) for text in texts]

    def engine_kwargs(self) -> dict[str, Any]:
        """Returns the engine's settings, the job's seed among them."""
        return self.engine if self.seed is None else {**self.engine, "seed": self.seed}

    def relative_to(self, folder: Path) -> JobConfig:
        """Returns the job with its relative paths taken from a folder, that of the job file."""
        inputs = [self.input] if isinstance(self.input, str) else self.input
        model = self.model
        if not model.startswith("bundled:") and (folder / model).is_dir():
            model = str(folder / model)
        return self.model_copy(
            update={
                "model": model,
                "input": [_from_folder(folder, one) for one in inputs],
                "output": _from_folder(folder, self.output),
            }
        )


def _from_folder(folder: Path, path: str) -> str:
    return path if "://" in path else str(folder / Path(path).expanduser())
