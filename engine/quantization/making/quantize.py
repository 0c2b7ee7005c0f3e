"""`quantize_model`: writes a quantised copy of a model folder, in the format of compressed-tensors.

Without rows the tensors are read, rounded and written one after another, so the model is never in memory as a whole.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...config import EngineConfig
from ...device import Device
from ...errors import ConfigError, quote
from ...gguf.files import find_gguf
from ...loading.model_source import locate_model, resolve_model
from ...models import build_model, load_hf_config, weight_map
from ...storage import Location
from ...weights.checkpoint import StoredTensor, checkpoint_files, iter_tensors, match_weights
from ...weights.model_slots import weight_slots
from ...weights.remote import iter_remote_tensors
from .calibration import Calibration
from .gptq import relative_product_error, round_for_inputs
from .grid import QuantisedWeight, round_to_grid
from .output import CheckpointOutput, new_checkpoint
from .plan import QuantizationPlan, make_plan
from .recipe import HEAD_BITS, find_recipe
from .report import QuantizationReport
from .rows import Row, read_rows

__all__ = ["quantize_model"]

logger = logging.getLogger(__name__)

REPORT = "quantization_report.json"

UNUSED = frozenset({"quantization", "tensor_parallel_size", "pipeline_parallel_size", "kv_cache_dtype", "load_format"})
"""Settings that a quantised copy does not depend on."""

HELD_OUT = 5
"""Every row of this number is kept for the perplexity."""


def quantize_model(
    model: str,
    out: str | Path,
    *,
    scheme: str,
    group_size: int | None = None,
    symmetric: bool = True,
    head_bits: int | None = None,
    rows: Sequence[Row] = (),
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
        rows: Texts, or conversations, which are lists of messages. With them weights are rounded for the inputs that
            layers get (GPTQ), except for those of `"fp8"` and of experts, and the perplexities before and after are
            computed on every fifth row, which is not used to round. At most 640 rows and 2,048 tokens of each are used.
        shows_progress: Whether a progress bar is shown.
        **settings: Further fields of `EngineConfig`, such as `revision`.

    Returns:
        The report, which is in the folder as quantization_report.json too.

    Raises:
        UserError: The model cannot be read or quantised, or the folder cannot be written.
    """
    for name in sorted(UNUSED & settings.keys()):
        raise ConfigError(f"{name} is a setting of an engine that generates, and has no effect here; leave it out")
    config = EngineConfig.from_kwargs(model=model, **settings)
    recipe = find_recipe(scheme, group_size, symmetric=symmetric)
    if head_bits not in (None, *HEAD_BITS):
        raise ConfigError(f"head_bits must be one of {', '.join(map(str, HEAD_BITS))}, or left out; got {head_bits!r}")
    source = _open(config)
    token_rows = read_rows(config, source.hf_config, rows) if rows else []
    plan = make_plan(source.tensors, source.sketch(), source.weights, recipe, head_bits)
    for reason, names in plan.declined.items():
        logger.warning("%s and %d more layers stay as they are, because they %s", names[0], len(names) - 1, reason)
    bar = functools.partial(tqdm, unit="layer" if token_rows else "tensor", disable=not shows_progress)
    with new_checkpoint(source.folder, Path(out)) as output:
        rounder = _Rounder(plan, output)
        found = _calibrate(config, source, rounder, token_rows, bar) if token_rows else _stream(source, rounder, bar)
        report = QuantizationReport(
            model=model,
            scheme=scheme,
            method="gptq" if rounder.used_rows else "nearest",
            group_size=plan.recipe.grid.group_size,
            num_layers=len(rounder.errors),
            declined=plan.declined,
            bytes_before=sum(tensor.dtype.itemsize * tensor.shape.numel() for tensor in source.tensors.values()),
            bytes_after=output.num_bytes,
            errors=rounder.errors,
            **found,
        )
        output.write_json(REPORT, report.as_dict())
        output.finish(_config(source.config, plan))
    return report


class _Rounder:
    """Rounds the tensors of a checkpoint as planned, and writes them."""

    def __init__(self, plan: QuantizationPlan, output: CheckpointOutput) -> None:
        self.plan = plan
        self.errors: dict[str, float] = {}
        self.used_rows = False
        self._output = output

    def write(self, name: str, tensor: Tensor, hessian: Tensor | None = None) -> QuantisedWeight | None:
        """Writes a tensor, and an untied head if it is made of it; returns what was rounded.

        Args:
            name: Its name in the checkpoint.
            tensor: The tensor.
            hessian: The sum of the outer products of the layer's inputs, for which the weights are rounded; None to
                round each to the nearest number.
        """
        rounded = None
        for written in self.plan.names_of(name):
            grid = self.plan.grid_of(written)
            if grid is None:
                self._output.add(written, tensor)
                continue
            if hessian is None or grid.is_float:
                rounded = round_to_grid(tensor, grid)
                error = rounded.relative_error(tensor)
            else:
                tensor, self.used_rows = tensor.to(hessian.device), True
                rounded = round_for_inputs(tensor, grid, hessian)
                error = relative_product_error(tensor, rounded, hessian)
            self.errors[written.removesuffix(".weight")] = error
            for each, part in self.plan.stored(written, rounded).items():
                self._output.add(each, part)
        return rounded


def _stream(source: _Source, rounder: _Rounder, bar: Callable[..., Any]) -> dict[str, Any]:
    """Rounds all tensors one after another."""
    for name in bar(sorted(source.tensors), desc="tensors"):
        stored = source.tensors[name]
        rounder.write(name, stored if isinstance(stored, Tensor) else stored.read())
    return {}


def _calibrate(
    config: EngineConfig, source: _Source, rounder: _Rounder, rows: list[list[int]], bar: Callable[..., Any]
) -> dict[str, Any]:
    """Rounds all tensors for the inputs that rows give the layers; returns what the report says about that."""
    device = Device.choose(config.device)
    dtype = device.resolve_dtype(config.dtype, source.hf_config.dtype)
    model = build_model(source.hf_config, dtype, device.torch_device).eval()
    sources = match_weights(weight_slots(model), source.place, source.weights)
    held_out = rows[::HELD_OUT]
    fit = [row for index, row in enumerate(rows) if index % HELD_OUT]
    calibration = Calibration(model, sources, source.weights, rounder.plan, fit, held_out)
    calibration.round_all(source.tensors, rounder.write, functools.partial(bar, desc="layers"))
    return {
        "num_calibration_tokens": sum(map(len, fit)),
        "num_evaluation_tokens": sum(map(len, held_out)),
        "perplexity_before": calibration.perplexity_before,
        "perplexity_after": calibration.perplexity_after,
    }


@dataclass(frozen=True, slots=True)
class _Source:
    """The model to quantise: its folder, its config.json as it is, its config, and its tensors, not read yet."""

    folder: Path
    place: Location
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
    return _Source(folder, place, given, hf_config, dict(_tensors(place)), weight_map(place, hf_config, torch.float32))


def _tensors(place: Location) -> Iterable[tuple[str, StoredTensor]]:
    """Returns the tensors of a checkpoint, which are read from their files and not mapped: each is used once."""
    files = checkpoint_files(place)
    return iter_remote_tensors(files) if files[0].name.endswith(".safetensors") else iter_tensors(place)


def _config(given: Mapping[str, Any], plan: QuantizationPlan) -> dict[str, Any]:
    """Returns the content of config.json, in which a head with a matrix of its own is no longer tied."""
    config = {**given, "quantization_config": plan.as_config()}
    if plan.untied_from is not None:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), Mapping):
            config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return config
