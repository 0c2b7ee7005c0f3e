"""What a processor reads of a pooling model without its weights: its task, the size of its vectors, its labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...engine import EngineConfig, PoolingParams, resolve_model
from ...engine.errors import CheckpointError, ConfigError
from ...engine.loading.model_source import locate_model
from ...engine.storage import read_json_object

if TYPE_CHECKING:
    from ...engine.tasks.pool import PoolingTask


def pooling_task(config: EngineConfig) -> PoolingTask:
    """Returns the task that an engine with these settings will have.

    Args:
        config: Settings of a pooling engine.

    Raises:
        ConfigError: The model cannot do the task.
        UnsupportedModelError: The model is not implemented.
    """
    from ...engine.models import load_hf_config  # These load torch.
    from ...engine.tasks.choose import choose_task
    from ...engine.tasks.pool import PoolingTask

    folder = resolve_model(config.model, config.hub)
    task = choose_task(config, load_hf_config(folder, config.hf_overrides, **config.model_code))
    assert isinstance(task, PoolingTask)
    return task


def vector_size(config: EngineConfig, params: PoolingParams) -> int:
    """Returns the number of elements of the vectors of a model, after it has checked the pooling parameters.

    Args:
        config: Settings of a pooling engine.
        params: Pooling parameters of the requests.

    Raises:
        ConfigError: The model cannot do the task.
        PoolingParamsError: The parameters do not fit the model.
    """
    task = pooling_task(config)
    task.check_pooling(params)
    return params.dimensions or task.pooler.config.dimensions or task.size


def class_labels(config: EngineConfig) -> list[str]:
    """Returns the names of a classifier's classes that its config.json, or `hf_overrides`, has.

    Raises:
        CheckpointError: config.json cannot be read, or its `id2label` does not map numbers to names.
    """
    file = locate_model(config.model, config.hub, with_weights=False) / "config.json"
    overrides = config.hf_overrides
    if callable(overrides):
        raise ConfigError("hf_overrides is a function, which only LLM takes; pass a dict")
    named = {**read_json_object(file), **(overrides or {})}.get("id2label") or {}
    try:
        return [str(named[key]) for key in sorted(named, key=int)]
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"id2label of {file} must map numbers to names; got {named!r:.100}") from error
