"""The settings of a batch: `BatchConfig`, which checks them when it is constructed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from ...engine.errors import ConfigError
from ..files.storage import Storage
from ..settings import Settings
from ..stages.adapters import read_modules

NO_LINES = (".gz", ".zst", ".bz2", ".xz", ".zip")


class BatchConfig(Settings):
    """The settings of a run that answers a batch file with a model and writes an out file and an error file.

    Attributes:
        model: Folder of the model, ``"bundled:NAME"``, or a URL.
        input: Path or URL of the batch file.
        output: Path or URL of the out file, which holds the answers.
        errors: Path or URL of the error file, which holds the lines that failed; None for a name beside the out file,
            such as ``"out.errors.jsonl"`` beside ``"out.jsonl"``.
        served_model_names: Model names that lines may ask for; if empty, the name that the first line asks for,
            unless it is the name of an adapter. The name in `model` is always allowed.
        lora_modules: LoRA adapters that lines may ask for as their model: name -> folder, URL or hub repository.
        dynamic_lora_loading_path: Folder or URL whose subfolders are LoRA adapters that lines may ask for.
        max_tokens: Most tokens to generate for a line that sets no limit; None for the limit in the model's
            generation_config.json, or else the default of the endpoint.
        replicas: Number of copies of the model.
        engine: Settings of the engine: name of a field of `EngineConfig` -> value.
        seed: Seed from which the run derives a seed for every line that gives none.
        tool_call_parser: Format of tool calls in the model's text, e.g. ``"hermes"``; None to leave them in the text.
        reasoning_parser: Format of reasoning in the model's text, e.g. ``"qwen3"``; None to leave it in the text.
        endpoint_url: Address of the S3 server; None for Amazon's.
        batch_size: Number of rows in a block of Ray Data.
        flush_interval_s: Most seconds until a finished row is durable.
    """

    model: str
    input: str
    output: str
    errors: str | None = None
    served_model_names: list[str] = Field(default_factory=list)
    lora_modules: dict[str, str] | None = None
    dynamic_lora_loading_path: str | None = Field(default=None, min_length=1)
    max_tokens: int | None = Field(default=None, gt=0)
    replicas: int = Field(default=1, gt=0)
    engine: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    endpoint_url: str | None = None
    batch_size: int = Field(default=128, gt=0)
    flush_interval_s: float = Field(default=5.0, gt=0)

    @field_validator("lora_modules", mode="before")
    @classmethod
    def _read_modules(cls, value: Any) -> dict[str, str] | None:
        return read_modules(value)

    @model_validator(mode="after")
    def _check_names(self) -> BatchConfig:
        for name in {*self.served_model_names, self.model}.intersection(self.lora_modules or {}):
            raise ConfigError(f"{name!r:.80} is the name of the model and of an adapter; give each a name of its own")
        return self

    @model_validator(mode="after")
    def _check_files(self) -> BatchConfig:
        if self.input.endswith(NO_LINES):
            raise ConfigError(f"input {self.input!r} is compressed; a batch file is plain lines: unpack it first")
        files = {"input": self.input_file, "output": self.output_file, "errors": self.error_file}
        names: dict[str, str] = {}
        for name, file in files.items():
            if file.url in names:
                raise ConfigError(f"{names[file.url]} and {name} are both {file.url!r}; give each a file of its own")
            names[file.url] = name
        return self

    @property
    def input_file(self) -> Storage:
        """The batch file, at an absolute path or a URL."""
        return self._file(self.input)

    @property
    def output_file(self) -> Storage:
        """The out file, at an absolute path or a URL."""
        return self._file(self.output)

    @property
    def error_file(self) -> Storage:
        """The error file: `errors`, or a name beside the out file if `errors` is None."""
        if self.errors is not None:
            return self._file(self.errors)
        stem, dot, suffix = self.output.rpartition(".")
        return self._file(f"{stem}.errors.{suffix}" if dot and "/" not in suffix else f"{self.output}.errors")

    @property
    def work_folder(self) -> Storage:
        """The hidden folder of the work in progress, beside the out file: ``".out.jsonl.millrace"``."""
        folder, slash, name = self.output_file.url.rpartition("/")
        return self._file(f"{folder}{slash}.{name}.millrace")

    def _file(self, path: str) -> Storage:
        """Returns the file at a path or URL. A path becomes absolute, because workers run in other current folders."""
        url = path if "://" in path else str(Path(path).expanduser().absolute())
        return Storage.at(url, self.endpoint_url)
