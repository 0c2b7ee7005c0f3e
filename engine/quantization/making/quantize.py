"""`quantize_model`: writes a quantised copy of a model folder, in the format of compressed-tensors.

Without rows the tensors are read, rounded and written one after another, so the model is never in memory as a whole.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...config import EngineConfig
from ...errors import ConfigError, quote
from ...gguf.files import find_gguf
from ...loading.model_source import locate_model, resolve_model
from ...models import build_model, load_hf_config, weight_map
from ...storage import Location
from ...weights.checkpoint import StoredTensor, checkpoint_files, iter_tensors
from ...weights.remote import iter_remote_tensors
from .grid import round_to_grid
from .output import CheckpointOutput, new_checkpoint
from .plan import QuantizationPlan, make_plan
from .recipe import HEAD_BITS, find_recipe
from .report import QuantizationReport

__all__ = ["quantize_model"]

logger = logging.getLogger(__name__)

REPORT = "quantization_report.json"


def quantize_model(
    model: str,
    out: str | Path,
    *,
    scheme: str,
    group_size: int | None = None,
    symmetric: bool = True,
    head_bits: int | None = None,
    shows_progress: bool = True,
    **settings: Any,
) -> QuantizationReport:
    """Writes a quantised copy of a model folder, in the format of compressed-tensors.

    Linear layers are quantised, experts too. Embeddings, norms, routers and the output head stay as they are, and so do
    layers that the format cannot store; the report and a warning name these.

    Args:
        model: The model, as `LLM` takes it: a folder of safetensors, or a name on a hub.
        out: The folder to write, which must not exist or must be empty. It appears when it is whole.
        scheme: `"w4a16"` (weights of 4 bits in groups), `"w8a16"` (weights of 8 bits), `"w8a8"` (8-bit integers, also
            for the inputs of layers) or `"fp8"` (8-bit floats, also for the inputs of layers).
        group_size: Weights that share a scale in `"w4a16"`, 128, 64 or 32; None for the largest that all layers have.
        symmetric: Whether groups have no zero points.
        head_bits: Bits of the output head, 4 or 8; None to leave it as it is.
        shows_progress: Whether a progress bar is shown.
        **settings: Further fields of `EngineConfig`, such as `revision`.

    Returns:
        The report, which is in the folder as quantization_report.json too.

    Raises:
        UserError: The model cannot be read or quantised, or the folder cannot be written.
    """
    config = EngineConfig.from_kwargs(model=model, **settings)
    recipe = find_recipe(scheme, group_size, symmetric=symmetric)
    if head_bits not in (None, *HEAD_BITS):
        raise ConfigError(f"head_bits must be one of {', '.join(map(str, HEAD_BITS))}, or left out; got {head_bits!r}")
    source = _open(config)
    plan = make_plan(source.tensors, source.sketch(), source.weights, recipe, head_bits)
    for reason, names in plan.declined.items():
        logger.warning("%s and %d more layers stay as they are, because they %s", names[0], len(names) - 1, reason)
    errors: dict[str, float] = {}
    with new_checkpoint(source.folder, Path(out)) as output:
        bar = functools.partial(tqdm, desc="layers", unit="tensor", disable=not shows_progress)
        _round_all(source.tensors, plan, output, errors, bar)
        report = QuantizationReport(
            model=model,
            scheme=scheme,
            method="nearest",
            group_size=plan.recipe.grid.group_size,
            num_layers=len(errors),
            declined=plan.declined,
            bytes_before=sum(tensor.dtype.itemsize * tensor.shape.numel() for tensor in source.tensors.values()),
            bytes_after=output.num_bytes,
            errors=errors,
        )
        output.write_json(REPORT, report.as_dict())
        output.finish(_config(source.config, plan))
    return report


@dataclass(frozen=True, slots=True)
class _Source:
    """The model to quantise: its folder, its config.json as it is, its config, and its tensors, not read yet."""

    folder: Path
    config: dict[str, Any]
    hf_config: Any
    tensors: Mapping[str, StoredTensor]
    weights: Any

    def sketch(self) -> Any:
        """Returns the model on the meta device."""
        return build_model(self.hf_config, torch.float32, "meta")


def _open(config: EngineConfig) -> _Source:
    folder, place = resolve_model(config.model, config.hub), locate_model(config.model, config.hub)
    if find_gguf(place):
        raise ConfigError(f"{quote(config.model)} is a GGUF file; quantise the model's folder of safetensors")
    hf_config = load_hf_config(folder, config.hf_overrides, **config.model_code)
    given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if getattr(hf_config, "quantization_config", None) is not None:
        raise ConfigError(f"{quote(config.model)} is quantised already (config field 'quantization_config')")
    return _Source(folder, given, hf_config, dict(_tensors(place)), weight_map(place, hf_config, torch.float32))


def _tensors(place: Location) -> Iterable[tuple[str, StoredTensor]]:
    """Returns the tensors of a checkpoint, which are read from their files and not mapped: each is used once."""
    files = checkpoint_files(place)
    return iter_remote_tensors(files) if files[0].name.endswith(".safetensors") else iter_tensors(place)


def _round_all(
    tensors: Mapping[str, StoredTensor],
    plan: QuantizationPlan,
    output: CheckpointOutput,
    errors: dict[str, float],
    bar: Callable[..., Any],
) -> None:
    """Writes all tensors, and notes the error of each quantised one."""
    for name in bar(sorted(tensors)):
        stored = tensors[name]
        tensor = stored if isinstance(stored, Tensor) else stored.read()
        for written in plan.names_of(name):
            grid = plan.grid_of(written)
            if grid is None:
                output.add(written, tensor)
                continue
            rounded = round_to_grid(tensor, grid)
            errors[written.removesuffix(".weight")] = rounded.relative_error(tensor)
            for each, part in plan.stored(written, rounded).items():
                output.add(each, part)


def _config(given: Mapping[str, Any], plan: QuantizationPlan) -> dict[str, Any]:
    """Returns the content of config.json, in which a head with a matrix of its own is no longer tied."""
    config = {**given, "quantization_config": plan.as_config()}
    if plan.untied_from is not None:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), Mapping):
            config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return config
