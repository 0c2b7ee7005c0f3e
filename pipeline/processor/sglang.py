"""`SGLangEngineProcessorConfig`: SGLang's names for the settings of an engine and of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import model_validator

from ...engine.errors import ConfigError, SamplingParamsError
from .. import columns
from ..stages.base import Stage
from ..stages.declaration import ProcessorSettings, Side, StageDeclaration
from ..stages.stage_config import StageConfig
from .config import EngineProcessorConfig

ENGINE_NAMES = {
    "chunked_prefill_size": "max_num_batched_tokens",
    "context_length": "max_model_len",
    "disable_cuda_graph": "enforce_eager",
    "enable_deterministic_inference": "deterministic",
    "max_running_requests": "max_num_seqs",
    "mem_fraction_static": "gpu_memory_utilization",
    "model_path": "model",
    "page_size": "block_size",
    "pp_size": "pipeline_parallel_size",
    "random_seed": "seed",
    "tokenizer_path": "tokenizer",
    "tp_size": "tensor_parallel_size",
}
"""SGLang's name of an engine setting -> ours, where the meaning is the same."""

SAMPLING_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "no_stop_trim": "include_stop_str_in_output",
}
"""SGLang's name of a sampling parameter -> ours."""

CONSTRAINT_NAMES = {"json_schema": "json", "regex": "regex", "ebnf": "grammar"}
"""SGLang's name of a constraint -> ours, in `structured_outputs`."""

MAX_NEW_TOKENS = 128
"""SGLang's default limit of generated tokens, for a row without a limit."""


class SamplingNamesStage(Stage):
    """A stage that renames the sampling parameters of rows from SGLang's names to ours."""

    name = "sampling_names"

    def process(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `sampling_params` with SGLang's names replaced by ours; no column if the row has none."""
        given = row.get(columns.SAMPLING_PARAMS)
        if not isinstance(given, Mapping):
            return {}
        return {columns.SAMPLING_PARAMS: sampling_params(given)}


def _make(settings: ProcessorSettings, config: StageConfig) -> SamplingNamesStage:
    return SamplingNamesStage()


SAMPLING_NAMES_STAGE = StageDeclaration(
    SamplingNamesStage,
    config=StageConfig(),
    make=_make,
    side=Side.BEFORE_ENGINE,
    order=1000,  # It runs after every other stage on this side.
    optional=(columns.SAMPLING_PARAMS,),
)


class SGLangEngineProcessorConfig(EngineProcessorConfig):
    """Settings of a processor on our engine, under SGLang's names.

    `engine_kwargs`, and the `sampling_params` of rows, may use SGLang's names or ours; the field `sampling_params` uses
    ours. A setting that our engine does not have is refused.
    """

    @model_validator(mode="before")
    @classmethod
    def _read_names_of_sglang(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("engine_kwargs"), Mapping):
            return {**values, "engine_kwargs": engine_kwargs(values["engine_kwargs"])}
        return values

    @property
    def declared_stages(self) -> Sequence[StageDeclaration[Any]]:
        """The stages of every processor of an engine, and the stage that renames sampling parameters."""
        return sorted([*super().declared_stages, SAMPLING_NAMES_STAGE], key=lambda stage: stage.place)


def engine_kwargs(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings of the engine under our names.

    Args:
        given: Settings under SGLang's names, or ours.

    Raises:
        ConfigError: A setting is given twice, or asks for replicas.
    """
    given = {name: value for name, value in given.items() if name not in ("skip_tokenizer_init", "task")}
    num_replicas = given.pop("dp_size", 1)
    if num_replicas != 1:
        raise ConfigError(f"engine_kwargs hold dp_size={num_replicas!r}; replicas are said with concurrency")
    if "disable_radix_cache" in given:
        given["enable_prefix_caching"] = not given.pop("disable_radix_cache")
    return _renamed(given, ENGINE_NAMES, ConfigError)


def sampling_params(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row's sampling parameters under our names.

    Args:
        given: Parameters under SGLang's names, or ours. A value of None counts as absent, because Arrow gives
            each row the fields of all rows.

    Raises:
        SamplingParamsError: A parameter is given twice.
    """
    present = {name: value for name, value in given.items() if value is not None}
    constraints = {ours: present.pop(theirs) for theirs, ours in CONSTRAINT_NAMES.items() if theirs in present}
    if constraints and "structured_outputs" in present:
        raise SamplingParamsError(f"structured_outputs and {', '.join(constraints)} are the same setting; drop one")
    if constraints:
        present["structured_outputs"] = constraints
    return {"max_tokens": MAX_NEW_TOKENS, **_renamed(present, SAMPLING_NAMES, SamplingParamsError)}


def _renamed(given: Mapping[str, Any], names: Mapping[str, str], error: type[Exception]) -> dict[str, Any]:
    for theirs, ours in names.items():
        if theirs in given and ours in given:
            raise error(f"{theirs}={given[theirs]!r} and {ours}={given[ours]!r} are the same setting; drop one")
    return {names.get(name, name): value for name, value in given.items()}
