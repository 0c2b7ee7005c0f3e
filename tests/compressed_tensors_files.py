"""Checkpoints in the format compressed-tensors, written from its published layout without its library.

A number of B bits is written as B bits of a stream, lowest first, and the stream is cut into words of 32 bits. That is
slow and plain. `quantise` also returns the matrix that a reader must get.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["PRESETS", "quantise", "write_compressed_tensors"]

_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP6 = torch.tensor([m / 8 for m in range(8)] + [2.0**e * (1 + m / 8) for e in range(3) for m in range(8)])


def _ints(bits: int, group: int | None = None, **more: Any) -> dict[str, Any]:
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **strategy, **more}


def _floats(strategy: str, bits: int = 8, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy, **more}


_MX = {"group_size": 32, "scale_dtype": "torch.uint8"}
_NV = {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
_INT8_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
_FP8_TOKEN = {**_INT8_TOKEN, "type": "float"}
_STATIC = {"strategy": "tensor", "dynamic": False}

PRESETS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "w4a16": ("pack-quantized", _ints(4, 16), None),
    "w4a16-asym": ("pack-quantized", _ints(4, 16, symmetric=False), None),
    "w4a16-channel": ("pack-quantized", _ints(4), None),
    "w4a16-channel-asym": ("pack-quantized", _ints(4, symmetric=False), None),
    "w4a16-actorder": ("pack-quantized", _ints(4, 16, actorder="weight"), None),
    "w4a16-g-idx": ("pack-quantized", _ints(4, 16, actorder="group"), None),
    "w4a16-asym-g-idx": ("pack-quantized", _ints(4, 16, symmetric=False, actorder="group"), None),
    "w8a16": ("pack-quantized", _ints(8, 16), None),
    "w8a16-channel": ("pack-quantized", _ints(8), None),
    "w8a16-asym": ("pack-quantized", _ints(8, 16, symmetric=False), None),
    "w2a16": ("pack-quantized", _ints(2, 16), None),
    "w3a16": ("pack-quantized", _ints(3, 16), None),
    "w3a16-asym": ("pack-quantized", _ints(3, 16, symmetric=False), None),
    "w5a16-channel": ("pack-quantized", _ints(5), None),
    "w6a16-asym": ("pack-quantized", _ints(6, 16, symmetric=False), None),
    "w7a16": ("pack-quantized", _ints(7, 16), None),
    "w4a8": ("int-quantized", _ints(4, 16), _INT8_TOKEN),
    "w4a8-packed": ("pack-quantized", _ints(4, 16), _INT8_TOKEN),
    "w4afp8": ("int-quantized", _ints(4, 16), _FP8_TOKEN),
    "w8a8": ("int-quantized", _ints(8), _INT8_TOKEN),
    "w8a8-tensor": ("int-quantized", _ints(8, strategy="tensor"), _INT8_TOKEN),
    "w8a8-asym-inputs": ("int-quantized", _ints(8), {**_INT8_TOKEN, "symmetric": False}),
    "w8a8-static": ("int-quantized", _ints(8), {**_INT8_TOKEN, **_STATIC}),
    "w8a8-static-asym": ("int-quantized", _ints(8), {**_INT8_TOKEN, **_STATIC, "symmetric": False}),
    "w8a16-naive": ("naive-quantized", _ints(8), None),
    "w8a16-naive-asym": ("naive-quantized", _ints(8, symmetric=False), None),
    "fp8": ("float-quantized", _floats("tensor"), {**_FP8_TOKEN, **_STATIC}),
    "fp8-dynamic": ("float-quantized", _floats("channel"), _FP8_TOKEN),
    "fp8-block": (
        "float-quantized",
        _floats("block", block_structure=[128, 128]),
        {**_FP8_TOKEN, "strategy": "group", "group_size": 128},
    ),
    "fp8-a16": ("naive-quantized", _floats("channel"), None),
    "fp8-a16-block": ("naive-quantized", _floats("block", block_structure=[16, 24]), None),
    "nvfp4-a16": ("nvfp4-pack-quantized", _floats("tensor_group", 4, **_NV), None),
    "nvfp4": (
        "nvfp4-pack-quantized",
        _floats("tensor_group", 4, **_NV),
        _floats("tensor_group", 4, **_NV) | {"dynamic": "local", "observer": "static_minmax"},
    ),
    "mxfp4-a16": ("mxfp4-pack-quantized", _floats("group", 4, **_MX), None),
    "mxfp4": ("mxfp4-pack-quantized", _floats("group", 4, **_MX), _floats("group", 4, **_MX) | {"dynamic": True}),
    "mxfp6-a16": ("mxfp6-pack-quantized", _floats("group", 6, **_MX), None),
    "mxfp8": ("mxfp8-quantized", _floats("group", **_MX), _floats("group", **_MX) | {"dynamic": True}),
}
"""Name of a kind of checkpoint -> its format, and its fields `weights` and `input_activations`."""


def quantise(
    weight: Tensor, form: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the tensors of a quantised matrix by the last part of their names, and the numbers that they stand for.

    Args:
        weight: `[rows, columns]`.
        form: The `format` of the matrix.
        weights: The fields of its weights.
        inputs: The fields of its inputs; None if they are not quantised.
    """
    if form.startswith(("nvfp4", "mxfp")):
        tensors, exact = _quantise_small_floats(weight, form, weights)
    elif weights["type"] == "float":
        tensors, exact = _quantise_fp8(weight, weights)
    else:
        tensors, exact = _quantise_integers(weight, form, weights)
    if inputs is not None and inputs["dynamic"] is False:
        tensors["input_scale"] = torch.tensor([0.08])
        if not inputs["symmetric"]:
            tensors["input_zero_point"] = torch.tensor([-9], dtype=torch.int8)
    if inputs is not None and inputs["dynamic"] == "local":
        tensors["input_global_scale"] = torch.tensor([123.0])
    return tensors, exact


def _quantise_integers(weight: Tensor, form: str, weights: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    bits, (rows, columns) = weights["num_bits"], weight.shape
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    num_groups = columns // (weights.get("group_size") or columns)
    groups = torch.arange(columns) * num_groups // columns
    if weights.get("actorder") == "group":
        groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
    ordered = weight[:, torch.argsort(groups, stable=True)].unflatten(1, (num_groups, -1))
    if weights["strategy"] == "tensor":
        ordered = weight.reshape(1, 1, -1)
    if weights["symmetric"]:
        scales, zeros = ordered.abs().amax(-1) / high, torch.zeros(ordered.shape[:2])
    else:
        smallest, largest = ordered.amin(-1).clamp(max=0), ordered.amax(-1).clamp(min=0)
        scales = (largest - smallest) / (high - low)
        zeros = (low - smallest / scales).round().clamp(low, high)
    scales = scales.bfloat16()
    scale, zero = (each.float().expand(rows, -1)[:, groups] for each in (scales, zeros))
    values = (weight / scale + zero).round().clamp(low, high)
    stored_scales = scales.flatten() if weights["strategy"] == "tensor" else scales
    tensors = {"weight_scale": stored_scales}
    if not weights["symmetric"]:
        tensors["weight_zero_point"] = zeros.to(torch.int8)
    if weights.get("actorder") == "group":
        tensors["weight_g_idx"] = groups.int()
    if form == "pack-quantized":
        tensors["weight_packed"] = _pack(values - low, bits)
        tensors["weight_shape"] = torch.tensor([rows, columns])
        if not weights["symmetric"]:
            tensors["weight_zero_point"] = _pack(zeros.t() - low, bits).t()
    else:
        tensors["weight"] = values.to(torch.int8)
    return tensors, (values - zero) * scale


def _quantise_fp8(weight: Tensor, weights: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = weight.shape
    block = {"tensor": [rows, columns], "channel": [1, columns], "group": [1, 32]}.get(weights["strategy"])
    tall, wide = block or weights["block_structure"]
    padded = F.pad(weight, (0, -columns % wide, 0, -rows % tall)).unflatten(1, (-1, wide)).unflatten(0, (-1, tall))
    peaks = padded.abs().amax((1, 3))
    if weights["strategy"] == "group":
        exponents = torch.log2(peaks / 256).floor()
        stored, scales = (exponents + 127).to(torch.uint8), torch.exp2(exponents)
    else:
        scales = (peaks / 448).bfloat16()
        stored = scales.flatten() if weights["strategy"] == "tensor" else scales
    scale = scales.float().repeat_interleave(tall, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    values = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": stored}, values.float() * scale


def _quantise_small_floats(weight: Tensor, form: str, weights: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    if form == "mxfp8-quantized":
        return _quantise_fp8(weight, weights)
    bits, table = weights["num_bits"], _FP6 if weights["num_bits"] == 6 else _FP4
    peaks = weight.unflatten(1, (-1, weights["group_size"])).abs().amax(-1)
    if form.startswith("nvfp4"):
        whole = 448 * 6 / weight.abs().amax()
        stored = (peaks / 6 * whole).to(torch.float8_e4m3fn)
        scales = stored.float() / whole
        tensors = {"weight_scale": stored, "weight_global_scale": whole.reshape(1)}
    else:
        exponents = torch.log2(peaks / 4).floor()
        scales = torch.exp2(exponents)
        tensors = {"weight_scale": (exponents + 127).to(torch.uint8)}
    scale = scales.repeat_interleave(weights["group_size"], 1)
    codes = ((weight / scale).abs().unsqueeze(-1) - table).abs().argmin(-1)
    negative = (weight < 0) & (codes > 0)
    tensors["weight_packed"] = _pack(codes + (negative << bits - 1), bits, torch.uint8)
    return tensors, table[codes] * torch.where(negative, -1.0, 1.0) * scale


def _pack(values: Tensor, bits: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Writes `[rows, columns]` unsigned integers as a stream of bits for each row, in words of the dtype."""
    stream = (values.long().unsqueeze(-1) >> torch.arange(bits) & 1).flatten(1)
    width = 8 * dtype.itemsize
    words = F.pad(stream, (0, -stream.shape[1] % width)).unflatten(1, (-1, width))
    whole = (words << torch.arange(width)).sum(-1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(dtype)


def write_compressed_tensors(
    source: Path,
    target: Path,
    groups: Mapping[str, Sequence[str]],
    *,
    ignore: Sequence[str] = ("lm_head",),
    edit: Callable[[dict[str, Tensor]], None] | None = None,
    key: str = "quantization_config",
    **config: Any,
) -> Path:
    """Writes a quantised copy of a checkpoint to `target`, and what it stands for in float32 to `source` itself.

    Args:
        source: Folder of a plain checkpoint, whose quantised matrices are replaced by the numbers that are stored.
        target: Folder to write.
        groups: Key of `PRESETS` -> targets of the group: names, patterns that begin with `re:`, `Linear`, `Embedding`.
        ignore: Modules to leave plain, by name or pattern.
        edit: Changes the tensors of the quantised checkpoint.
        key: The field of config.json.
        **config: Further fields of the quantization config.

    Returns:
        `target`.
    """
    plain = load_file(source / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        module = name.removesuffix(".weight")
        preset = _preset_of(module, groups, ignore) if name.endswith(".weight") and tensor.dim() == 2 else None
        if preset is None:
            stored[name] = tensor.bfloat16()
            plain[name] = tensor.bfloat16().float()
            continue
        tensors, plain[name] = quantise(tensor, *PRESETS[preset])
        stored |= {f"{module}.{leaf}": each.contiguous() for leaf, each in tensors.items()}
    if edit is not None:
        edit(stored)
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, source / "model.safetensors")
    settings = json.loads((target / "config.json").read_text())
    settings[key] = _config(groups, ignore, **config)
    (target / "config.json").write_text(json.dumps(settings))
    return target


def _preset_of(module: str, groups: Mapping[str, Sequence[str]], ignore: Sequence[str]) -> str | None:
    if any(_matches(module, pattern) for pattern in ignore):
        return None
    presets = {target: preset for preset, targets in groups.items() for target in targets}
    names = sorted(presets, key=lambda target: (target.startswith("re:"), target))
    kind = "Embedding" if "embed" in module else "Linear"
    return next((presets[target] for target in names if _matches(module, target)), presets.get(kind))


def _matches(module: str, pattern: str) -> bool:
    return bool(re.match(pattern[3:], module)) if pattern.startswith("re:") else pattern == module


def _config(groups: Mapping[str, Sequence[str]], ignore: Sequence[str], **fields: Any) -> dict[str, Any]:
    described = {
        f"group_{index}": {
            "targets": [*targets],
            "weights": {"group_size": None, **PRESETS[preset][1]},
            "input_activations": PRESETS[preset][2],
            "output_activations": None,
            "format": PRESETS[preset][0],
        }
        for index, (preset, targets) in enumerate(groups.items())
    }
    formats = {PRESETS[preset][0] for preset in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": described,
        "ignore": [*ignore],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.1",
        **fields,
    }
