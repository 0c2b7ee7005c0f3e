"""`CompressedTensorsConfig`: the settings of a checkpoint in the format compressed-tensors, each read or refused.

A group of the config names modules (`targets`) and says how their weights and inputs are quantised. The names of fields
and their values are those of the library compressed-tensors 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, quote
from ..weights.codes import InputQuant
from .settings import unsupported

__all__ = ["CompressedTensorsConfig", "Group", "Inputs", "Weights"]

PACKED, SMALL_FLOATS = "pack-quantized", ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized")

KINDS = {
    PACKED: ("int", tuple(range(1, 9))),
    "int-quantized": ("int", tuple(range(1, 9))),
    "float-quantized": ("float", (8,)),
    "naive-quantized": ("", (1, 2, 3, 4, 5, 6, 7, 8)),
    "nvfp4-pack-quantized": ("float", (4,)),
    "mxfp4-pack-quantized": ("float", (4,)),
    "mxfp6-pack-quantized": ("float", (6,)),
    "mxfp8-quantized": ("float", (8,)),
}
"""Format of a group -> the `type` of its weights (empty for both types) and their widths in bits."""

NOTHING_PACKED = ("dense", "fakequant", "mixed-precision")
"""Values of the field `format` of the whole checkpoint that say nothing about a group."""

GROUP_SIZES = {
    "nvfp4-pack-quantized": 16,
    "mxfp4-pack-quantized": 32,
    "mxfp6-pack-quantized": 32,
    "mxfp8-quantized": 32,
}
"""Format of a group -> the columns that share a scale, if the format fixes them."""

PATTERN = "re:"
"""Beginning of a target that is a regular expression, which a name must match from its start."""

STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
STATUSES = ("initialized", "calibration", "frozen", "compressed", "decompressed")

TOP_FIELDS = {
    *("quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "quantization_status", "version"),
    *("sparsity_config", "transform_config", "moe_sparsity_config", "global_compression_ratio", "run_compressed"),
}
GROUP_FIELDS = {"targets", "weights", "input_activations", "output_activations", "format"}
NUMBER_FIELDS = {
    *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"),
    # These say how the numbers were found, and in which types the library holds them.
    *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
}


@dataclass(frozen=True, slots=True)
class Weights:
    """How the weights of a group are quantised.

    Attributes:
        is_float: Whether the numbers are floats; otherwise they are integers.
        bits: Bits of a number.
        strategy: The numbers that share a scale: one of `STRATEGIES`.
        group_size: Neighbouring columns that share a scale, with the strategies `group` and `tensor_group`; else 0.
        block: Rows and columns that share a scale, with the strategy `block`; else empty.
        symmetric: Whether there are no zero points.
        reordered: Whether the columns of a group may be anywhere, as the tensor `weight_g_idx` says.
    """

    is_float: bool
    bits: int
    strategy: str
    group_size: int
    block: tuple[int, ...]
    symmetric: bool
    reordered: bool


@dataclass(frozen=True, slots=True)
class Inputs:
    """How the inputs of a group's layers are quantised.

    Attributes:
        static: Whether the checkpoint has a scale, `input_scale`, for the inputs of each layer.
        symmetric: Whether there is no zero point.
        quant: What layers are asked to do, apart from a fixed scale; None if no layer of ours does that.
        text: The settings in words, for a message.
    """

    static: bool
    symmetric: bool
    quant: InputQuant | None
    text: str


@dataclass(frozen=True, slots=True)
class Group:
    """One of the `config_groups`.

    Attributes:
        field: The name of its field, for messages.
        targets: Names of modules, patterns after `re:`, and names of classes.
        format: The way in which its matrices are stored: one of `KINDS`.
        weights: How weights are quantised.
        inputs: How inputs are quantised; None if they are not.
    """

    field: str
    targets: tuple[str, ...]
    format: str
    weights: Weights
    inputs: Inputs | None


class CompressedTensorsConfig:
    """The settings of a checkpoint.

    Args:
        config: The `quantization_config` of the checkpoint.

    Attributes:
        groups: The groups of modules that are quantised alike.
        keeps_kv_scales: Whether the checkpoint's scales of a KV cache, if there are any, are those of 8-bit floats.

    Raises:
        UnsupportedModelError: A field, or the value of a field, is not implemented; the message names it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        _check_fields(config, TOP_FIELDS, "")
        _one_of(config, "quantization_status", (None, *STATUSES), "")
        whole = _one_of(config, "format", (None, *NOTHING_PACKED, *KINDS), "")
        _names(config, "ignore", "")
        sparsity = _object(config, "sparsity_config", "")
        _one_of(sparsity, "format", (None, "dense"), "sparsity_config.")
        transforms = _object(config, "transform_config", "")
        _check_fields(transforms, ("config_groups",), "transform_config.")
        if _object(transforms, "config_groups", "transform_config."):
            raise unsupported(
                "transform_config", transforms, "absent or empty: rotations of weights and inputs are not implemented"
            )
        if config.get("moe_sparsity_config") is not None:
            raise unsupported("moe_sparsity_config", config["moe_sparsity_config"], "null")
        groups = _object(config, "config_groups", "")
        self.groups = [_read_group(groups, name, whole) for name in groups]
        self._targets = {target: group for group in self.groups for target in group.targets}
        patterns = sorted(target for target in self._targets if target.startswith(PATTERN))
        self._patterns = [(re.compile(each.removeprefix(PATTERN)), self._targets[each]) for each in patterns]
        self.keeps_kv_scales = _is_fp8_cache(_object(config, "kv_cache_scheme", ""))

    def group_of(self, module: str) -> Group:
        """Returns the group of a module whose weights are quantised.

        As in the library, names come before patterns, patterns in the order of the alphabet, and classes last. A module
        in `ignore` never comes here, unless the checkpoint has quantised weights of it all the same.

        Raises:
            CheckpointError: No group has the module among its targets.
        """
        matching = (group for pattern, group in self._patterns if pattern.match(module))
        kind = "Embedding" if is_embedding(module) else "Linear"
        found = self._targets.get(module) or next(matching, None) or self._targets.get(kind)
        if found is None:
            raise CheckpointError(
                f"{module} is quantised in the checkpoint, and no group of 'quantization_config.config_groups' is for "
                f"it: their targets are {quote(sorted(self._targets))}; check that config.json belongs to the weights"
            )
        return found


def is_embedding(module: str) -> bool:
    """Returns whether a module is a table of embeddings, by the last part of its name."""
    last = module.rpartition(".")[2]
    return "emb" in last or last in ("wte", "wpe")


def _read_group(groups: Mapping[str, Any], name: str, whole: str | None) -> Group:
    field = f"config_groups.{name}"
    group = _object(groups, name, "config_groups.")
    _check_fields(group, GROUP_FIELDS, f"{field}.")
    form = _one_of(group, "format", (None, *KINDS), f"{field}.") or whole
    if form not in KINDS:
        raise unsupported(f"{field}.format", form, _listed(KINDS))
    if group.get("output_activations") is not None:
        raise unsupported(f"{field}.output_activations", group["output_activations"], "null")
    targets = tuple(_names(group, "targets", f"{field}."))
    for target in targets:
        if target.startswith(PATTERN):
            _check_pattern(target, f"{field}.targets")
    weights = _read_weights(_object(group, "weights", f"{field}."), form, f"{field}.weights")
    inputs = _read_inputs(_object(group, "input_activations", f"{field}."), f"{field}.input_activations.")
    return Group(field, targets, form, weights, inputs)


def _read_weights(fields: Mapping[str, Any], form: str, field: str) -> Weights:
    if not fields:
        raise unsupported(
            field, None, "an object: groups that quantise only inputs, as those of attention, are not implemented"
        )
    at = f"{field}."
    _check_fields(fields, NUMBER_FIELDS, at)
    kind, widths = KINDS[form]
    kind = _one_of(fields, "type", (kind,) if kind else ("int", "float"), at, default="int")
    bits = _one_of(fields, "num_bits", widths if kind == "int" or form in GROUP_SIZES else (8,), at, default=8)
    symmetric = _one_of(fields, "symmetric", (True,) if kind == "float" else (True, False), at, default=True)
    _one_of(fields, "dynamic", (False,), at, default=False)
    order = _one_of(fields, "actorder", (None, False, True, "weight", "static", "group", "dynamic"), at)
    strategy, size = _shared_by(fields, STRATEGIES, at)
    if size != GROUP_SIZES.get(form, size):
        raise unsupported(f"{at}group_size", size, f"{GROUP_SIZES[form]} with format={form!r}")
    block = _block(fields, strategy, at)
    return Weights(kind == "float", bits, strategy, size, block, symmetric, order in (True, "group", "dynamic"))


def _shared_by(fields: Mapping[str, Any], strategies: Collection[str], at: str) -> tuple[str, int]:
    """Returns which numbers share a scale, and the size of a group if it is those of a group; else 0."""
    size = fields.get("group_size") or 0
    if not isinstance(size, int) or isinstance(size, bool) or size < -1:
        raise unsupported(f"{at}group_size", size, "null, -1 or a positive integer")
    strategy = _one_of(fields, "strategy", (None, *strategies), at)
    strategy = strategy or ("group" if size > 0 else "channel" if size and "channel" in strategies else "tensor")
    if (size > 0) != (strategy in ("group", "tensor_group")):
        allowed = f"a positive integer if strategy is group or tensor_group, and only then; strategy is {strategy!r}"
        raise unsupported(f"{at}group_size", fields.get("group_size"), allowed)
    return strategy, max(size, 0)


def _block(fields: Mapping[str, Any], strategy: str, at: str) -> tuple[int, ...]:
    given = fields.get("block_structure")
    if given is None and strategy != "block":
        return ()
    sizes = given.split("x") if isinstance(given, str) else given
    if isinstance(sizes, list) and len(sizes) == 2 and strategy == "block":
        numbers = [int(size) if str(size).isdecimal() else 0 for size in sizes]
        if min(numbers) > 0:
            return tuple(numbers)
    raise unsupported(f"{at}block_structure", given, "[rows, columns] with strategy='block', and null with others")


def _read_inputs(fields: Mapping[str, Any], at: str) -> Inputs | None:
    if not fields:
        return None
    _check_fields(fields, NUMBER_FIELDS, at)
    kind = _one_of(fields, "type", ("int", "float"), at, default="int")
    bits = _one_of(fields, "num_bits", (4, 6, 8), at, default=8)
    symmetric = _one_of(fields, "symmetric", (True, False), at, default=True)
    dynamic = _one_of(fields, "dynamic", (True, False, "local"), at, default=False)
    strategy, size = _shared_by(fields, ("token", "tensor", "group", "tensor_group"), at)
    _one_of(fields, "actorder", (None, False), at)
    # Powers of two as scales, and one scale for all rows of a batch, are what no layer has.
    is_fixed = strategy == "tensor" and dynamic is False
    is_by_row = strategy in ("token", "group") and dynamic is True and symmetric
    is_ours = bits == 8 and (is_fixed or (is_by_row and fields.get("scale_dtype") != "torch.uint8"))
    quant = InputQuant("fp8" if kind == "float" else "int", size) if is_ours else None
    how = "" if symmetric else " with zero points"
    text = f"{bits}-bit {'floats' if kind == 'float' else 'integers'}{how} (strategy={strategy!r}, dynamic={dynamic})"
    return Inputs(dynamic is False, symmetric, quant, text)


def _is_fp8_cache(fields: Mapping[str, Any]) -> bool:
    """Returns whether scales of a KV cache are for 8-bit floats; True if the field is absent."""
    at = "kv_cache_scheme."
    _check_fields(fields, NUMBER_FIELDS, at)
    kind = _one_of(fields, "type", ("int", "float"), at, default="int" if fields else "float")
    strategy = _one_of(fields, "strategy", (None, "tensor", "attn_head", "channel", "group", "token"), at)
    bits, symmetric = fields.get("num_bits", 8), fields.get("symmetric", True)
    return kind == "float" and bits == 8 and symmetric is True and strategy in (None, "tensor", "attn_head")


def _check_fields(fields: Mapping[str, Any], known: Collection[str], at: str) -> None:
    for field, value in fields.items():
        if field not in known:
            raise unsupported(f"{at}{field}", value, f"absent; known fields are {_listed(sorted(known))}")


def _one_of(fields: Mapping[str, Any], field: str, allowed: Collection[Any], at: str, default: Any = None) -> Any:
    """Returns a field that must have one of some values; texts are compared without regard to case."""
    given = fields.get(field)
    value = default if given is None else given
    found = value.lower() if isinstance(value, str) else value
    if not any(type(found) is type(each) and found == each for each in allowed):
        raise unsupported(f"{at}{field}", value, _listed(allowed))
    return found


def _object(fields: Mapping[str, Any], field: str, at: str) -> Mapping[str, Any]:
    value = fields.get(field)
    if value is not None and not isinstance(value, Mapping):
        raise unsupported(f"{at}{field}", value, "an object")
    return value or {}


def _names(fields: Mapping[str, Any], field: str, at: str) -> list[str]:
    value = fields.get(field) or []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise unsupported(f"{at}{field}", value, "a list of names")
    return value


def _check_pattern(target: str, field: str) -> None:
    try:
        re.compile(target.removeprefix(PATTERN))
    except re.error as error:
        raise unsupported(field, target, f"a regular expression after re: ({error})") from error


def _listed(values: Collection[Any]) -> str:
    return ", ".join("null" if value is None else str(value) for value in values)
